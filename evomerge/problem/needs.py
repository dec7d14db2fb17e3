"""What a search needs of memory, and a merge of time: from the headers of its models, before anything is read of them.

An estimate, made of what the engine and the native backend hold at once. The weights of a candidate and what it
computes with have to fit where it lives; the models that it is merged from live where there is room: on the device,
else in pinned memory of the host, else in their files, which the operating system maps and may drop again.

It is a lower bound on a processor: merges of 1.1B in bfloat16 by two threads, with 16 items scored, peaked at 6.1 GB of
the process's own memory (linear) and 7.2 GB (TIES), where this says 3.2; about 1 GB of that was freed and kept by the
allocator, the rest is not explained. They took 23 s and more on a busy machine, where this says 7.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import parse_dtype, torch_dtype
from evomerge.engine.device.sources import BLOCK
from evomerge.errors import SpecError
from evomerge.evaluation.backends.native.logprobs import CPU_STATES, CPU_TOKENS, GPU_TOKENS, MAX_LOGITS
from evomerge.spec.schema import SearchSpec
from evomerge.system.memory import available, own_memory

PROCESS = 600 * 10**6
"""Bytes of Python with torch, transformers and lm-eval."""

CONTEXT = 10**9
"""Bytes that the libraries of a device take of it and of the host, and what its allocator cannot use."""

PINNED_SHARE = 0.5
"""Of the host's memory, what may be pinned."""

RATES = {"device": 500e9, "pinned": 10e9, "mapped": 2e9, "read": 0.5e9}
"""Bytes a second at which models are merged from where they live: a GPU's memory under several passes, a bus of 16
lanes, two cores on mapped files in memory, and files that have to be read from a disk again."""

_PIECE = 1 << 21  # elements that a thread merges at once on a processor


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        host: Bytes of memory.
        device: Bytes of the device that models live on; None for the processor.
        threads: That merge, on the processor.
    """

    host: int
    device: int | None = None
    threads: int = 2


@dataclass(frozen=True)
class Needs:
    """What a search needs.

    Attributes:
        machine: Where.
        dtype: What candidates compute in.
        device: Bytes by what they hold, on the device; empty where models live on the processor.
        host: The same in the host's own memory.
        sources: Bytes of the models by where they live: keys of `RATES`.
    """

    machine: Machine
    dtype: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    sources: Mapping[str, int]

    @property
    def _memories(self) -> list[tuple[str, Mapping[str, int], int]]:
        host = ("host", self.host, self.machine.host)
        return [host] if self.machine.device is None else [("device", self.device, self.machine.device), host]

    @property
    def seconds(self) -> float:
        """Seconds to materialise a candidate that changes in all its tensors."""
        return sum(size / RATES[where] for where, size in self.sources.items())

    def lines(self) -> list[str]:
        """Says it."""
        memories = [
            f"{name} memory: {_gb(sum(parts.values()))} of {_gb(room)}: {_parts(parts)}"
            for name, parts, room in self._memories
        ]
        sources = ", ".join(f"{_gb(size)} {_WHERE[where]}" for where, size in self.sources.items() if size)
        rates = ", ".join(f"{RATES[where] / 1e9:g} GB/s {where}" for where, size in self.sources.items() if size)
        return [
            *memories,
            f"the models: {sources}",
            f"to materialise a candidate: about {self.seconds:.2g} s, at {rates}; an estimate from bytes alone",
            *([] if self.machine.device is not None else [_LOWER_BOUND]),
        ]

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            SpecError: It does not fit, with the numbers.
        """
        problems = []
        for name, parts, room in self._memories:
            needed = sum(parts.values())
            if needed > room:
                problems.append(
                    f"memory: {_gb(needed)} of {name} memory are needed, {_gb(room)} there: {_parts(parts)}"
                )
        if problems:
            raise SpecError(problems)


_LOWER_BOUND = (
    "memory and time are at least that: merging and scoring 1.1B took 2.3 times the memory and 3 times the time or more"
)
"""What was measured on a processor."""

_WHERE = {
    "device": "kept on the device",
    "pinned": "in pinned host memory",
    "mapped": "in mapped files",
    "read": "of mapped files that do not fit beside that and are read again for each candidate",
}


def this_machine(name: str, threads: int, *, host: int | None = None, device: int | None = None) -> Machine:
    """Says what there is here, but for what is given: memory that is free, and what this process has already.

    Args:
        name: The device that models live on; one that is not there has no memory.
        threads: That merge.
        host, device: Bytes that another machine has.
    """
    if host is None:
        free = available()
        host = free + own_memory() if free is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on = torch.device(name)
    if on.type == "cpu":
        return Machine(host, None, threads)
    if device is None and on.type == "cuda" and torch.cuda.is_available():
        device = torch.cuda.mem_get_info(on)[0]
    if device is None:
        raise SpecError(f"memory: nobody knows how much of it {name!r} has; say so with --device-memory")
    return Machine(host, device, threads)


def search_needs(
    spec: SearchSpec, checkpoints: Mapping[str, Checkpoint], reference: Checkpoint, machine: Machine
) -> Needs:
    """Estimates what a search needs.

    Args:
        spec: The search; of its models only `checkpoints` are looked at.
        checkpoints: The models, by reference.
        reference: The one that has the candidates' shapes.
        machine: Where it is to run.
    """
    dtype = spec.evaluation.dtype
    if dtype == "auto":
        dtype = "float32" if machine.device is None else "bfloat16"
    width, workers = torch_dtype(parse_dtype(dtype)).itemsize, spec.run.workers
    weights = sum(math.prod(info.shape) for info in reference.tensors.values()) * width
    copies = 2 if spec.evaluation.backend == "vllm" else 1
    stored = sum(checkpoint.nbytes for checkpoint in checkpoints.values())
    live = {
        "a candidate's weights": weights * copies * workers,
        "activations": _activations(reference.config, width, spec, machine) * workers,
    }
    blocks = 4 * (len(checkpoints) + 2)
    if machine.device is None:
        host = {"the process": PROCESS * workers, **live, "blocks": blocks * _PIECE * machine.threads * workers}
        read = max(0, min(stored, stored - (machine.host - sum(host.values()))))
        return Needs(machine, dtype, {}, host, {"mapped": stored - read, "read": read})
    device = {**live, "blocks": blocks * BLOCK * workers, "the device's libraries": CONTEXT * workers}
    kept = max(0, min(stored, (machine.device - sum(device.values())) // workers))
    pinned = min(stored - kept, int(PINNED_SHARE * machine.host) // workers)
    host = {"the process": (PROCESS + CONTEXT) * workers, **({"pinned": pinned * workers} if pinned else {})}
    mapped = stored - kept - pinned
    read = max(0, min(mapped, mapped - (machine.host - sum(host.values()))))
    device |= {"models": kept * workers} if kept else {}
    sources = {"device": kept, "pinned": pinned, "mapped": mapped - read, "read": read}
    return Needs(machine, dtype, device, host, sources)


def _activations(config: Mapping[str, Any], width: int, spec: SearchSpec, machine: Machine) -> int:
    """What one batch of log-likelihoods holds at once: a layer's states, its mask, and logits in float32."""
    text = {**config, **(config.get("text_config") or {})}
    hidden = int(text.get("hidden_size", 0))
    experts = int(text.get("moe_intermediate_size") or 0) * int(text.get("num_experts_per_tok") or 0)
    inner = max(int(text.get("intermediate_size") or 0), experts, hidden)
    low, high = CPU_TOKENS
    on_cpu = max(low, min(high, CPU_STATES // max(1, hidden)))
    tokens = spec.evaluation.batch_tokens or (on_cpu if machine.device is None else GPU_TOKENS)
    logits = min(tokens * int(text.get("vocab_size", 0)), MAX_LOGITS)
    return tokens * (3 * inner + 6 * hidden) * width + tokens * tokens * width + 4 * logits


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {_gb(size)}" for what, size in parts.items())


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e9:.2f} GB"
