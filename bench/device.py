"""Merging where the model is scored: what it moves, what it costs beside the scoring, and whether that is near a copy.

    python bench/device.py                   # at most eight minutes, whatever it runs on

On a GPU: a synthetic Llama of 7B parameters, three sources of one base in bfloat16, and the real models of models/, if
they are there. The weights are random and repeat every four layers; nothing that is measured depends on their values.
Without a GPU a small size goes through the same torch path on the processor: that it works is all that this shows.

For every method: bytes that a candidate reads and writes, the floor (these bytes over the rate of a copy, measured in
the same run), seconds of the first candidate, which also finds out what is asked of whole tensors, and of later ones,
with the sources on the device and with most of them streamed to it (there the floor is what the bus needs); peak memory
of the device; seconds to score 300 multiple-choice items, and the share of a candidate that is not scoring.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import LlamaConfig

from bench.materialise import open_models
from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import DTYPE_BYTES
from evomerge.checkpoints.header import TensorInfo
from evomerge.engine.device.copier import streams_of
from evomerge.engine.resident import Resident, empty_model
from evomerge.evaluation.backends.native.logprobs import TreeLogprobs
from evomerge.planning.operation import inputs_of
from evomerge.planning.plan import Plan, make_plan
from evomerge.recipe import parse_recipe
from evomerge.report.tables import table

LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 4096}
HEADS, REPEAT = {"num_attention_heads": 32, "num_key_value_heads": 32}, 4
STREAMED = 4 << 30  # bytes of a GPU for sources, of which one operation's and the next one's take half
ITEMS, CHOICES, CONTEXT, CHOICE = 300, 4, 64, 8

METHODS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "slerp": {},
}


class RandomWeights:
    """Weights that were drawn, in memory."""

    files: tuple[Path, ...] = ()

    def __init__(self, name: str, values: Mapping[str, torch.Tensor]) -> None:
        self._name = name
        self._values = dict(sorted(values.items()))
        self.tensors = {
            key: TensorInfo(key, tuple(value.shape), "BF16", 0, value.numel() * DTYPE_BYTES["BF16"])
            for key, value in self._values.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._values[name]

    def release(self, name: str) -> None:
        """Releases nothing."""

    def fingerprint(self, *, anew: bool = False) -> str:
        return self._name


def synthetic(sizes: Mapping[str, int], device: torch.device) -> dict[str, Checkpoint]:
    """A base and three sources near it, drawn on the device."""
    made = LlamaConfig(**sizes, **HEADS, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config = json.loads(made.to_json_string(use_diff=False))
    shapes = {name: value.shape for name, value in empty_model(config, torch.device("cpu")).state_dict().items()}
    base: dict[str, torch.Tensor] = {}
    generator = torch.Generator(device).manual_seed(1)
    models: dict[str, Checkpoint] = {}
    for model in ("base", "m0", "m1", "m2"):
        drawn: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            first = _first_alike(name)
            if first not in drawn:
                values = torch.randn(shape, generator=generator, device=device) * (0.02 if model == "base" else 0.002)
                values = values if model == "base" else values + base[first].to(device)
                drawn[first] = values.bfloat16().cpu()
            drawn[name] = drawn[first]
        base = base or drawn
        models[model] = Checkpoint(model, None, config, RandomWeights(model, drawn))
    return models


def _first_alike(name: str) -> str:
    parts = name.split(".")
    return ".".join(str(int(part) % REPEAT) if part.isdigit() else part for part in parts)


def plan_of(method: str, draw: float, names: list[str], checkpoints: Mapping[str, Checkpoint]) -> Plan:
    """A candidate's plan; another one for every draw. `names` begins with the base."""
    values = METHODS[method]
    own = [
        {"weight": 0.2 + 0.1 * draw + 0.1 * k} | ({"density": values["density"] + 0.1 * draw} if values else {})
        for k in range(len(names) - 1)
    ]
    models = [{"model": name, "parameters": each} for name, each in zip(names[1:], own, strict=True)]
    recipe: dict[str, Any] = {"merge_method": method, "models": models}
    if method not in ("linear", "slerp"):
        recipe["base_model"] = names[0]
    return make_plan(parse_recipe(recipe), checkpoints)


def moved(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> tuple[int, int]:
    """(bytes that a candidate reads, bytes that it writes)."""
    reads = [checkpoints[i.model].tensors[i.tensor].nbytes for op in plan.operations for i in inputs_of(op)]
    return sum(reads), sum(math.prod(op.shape) * DTYPE_BYTES[op.dtype] for op in plan.operations)


@dataclass(frozen=True)
class Machine:
    """What is measured on.

    Attributes:
        device: The device.
        copies: Bytes a second of a copy on it, read and written.
        bus: Bytes a second from pinned memory to it; 0 where there is none between.
    """

    device: torch.device
    copies: float
    bus: float

    @property
    def module(self) -> Any:
        return streams_of(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Times work until the device has done it."""
        begin = time.perf_counter()
        work()
        if self.module is not None:
            self.module.synchronize(self.device)
        return time.perf_counter() - begin

    def peak(self) -> float:
        """Returns the most gigabytes of the device in use since the last call; those of the process, without one."""
        if self.module is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        most = self.module.max_memory_allocated(self.device)
        self.module.reset_peak_memory_stats(self.device)
        return float(most) / 1e9


def find_machine(size: int) -> Machine:
    """Finds the device, and how fast it copies `size` bytes."""
    name = next((name for name in ("cuda", "xpu") if torch.get_device_module(name).is_available()), "cpu")
    machine = Machine(torch.empty(0, device=name).device, 0.0, 0.0)
    one, other = (torch.ones(size // 2, dtype=torch.bfloat16, device=machine.device) for _ in range(2))
    copies = 2 * size / min(machine.seconds(partial(other.copy_, one)) for _ in range(6))
    if machine.module is None:
        return Machine(machine.device, copies, 0.0)
    here = torch.ones(size // 2, dtype=torch.bfloat16, pin_memory=True)
    bus = size / min(machine.seconds(partial(other.copy_, here, non_blocking=True)) for _ in range(6))
    return Machine(machine.device, copies, bus)


def scoring_seconds(model: Any, machine: Machine) -> float:
    """Scores multiple-choice items of random tokens; the second time counts."""
    vocabulary = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(2)

    def tokens(count: int) -> list[int]:
        return [int(t) for t in torch.randint(3, vocabulary, (count,), generator=generator)]

    contexts = [tokens(CONTEXT) for _ in range(ITEMS)]
    items = [[(context, tokens(CHOICE)) for _ in range(CHOICES)] for context in contexts]
    logprobs = TreeLogprobs(vocabulary, 2048, None)
    with torch.inference_mode():
        logprobs.prepare(model)
        packed = logprobs.pack(items)
        return min(machine.seconds(partial(logprobs.compute, model, packed)) for _ in range(2))


HEAD = [
    *("model", "method", "moved GB", "floor s", "first s", "later s", "later / floor", "peak GB", "score s"),
    *("not scoring", "streamed s", "bus floor s", "streamed / bus", "peak GB, streamed"),
]


def candidates(
    checkpoints: Mapping[str, Checkpoint], machine: Machine, end: float, **options: Any
) -> Iterator[tuple[str, list[float], float, Any]]:
    """(method, seconds of each of three candidates, peak memory, the model), while there is time.

    One candidate goes before all: it has the sources brought to where they stay.
    """
    resident = Resident(checkpoints, torch.bfloat16, str(machine.device), compiled=False, **options)
    resident.write(plan_of("linear", 1.0, list(checkpoints), checkpoints))
    for method in METHODS:
        if time.perf_counter() < end:
            plans = [plan_of(method, draw, list(checkpoints), checkpoints) for draw in (0.0, 0.3, 0.6)]
            machine.peak()
            seconds = [machine.seconds(partial(resident.write, plan)) for plan in plans]
            yield method, seconds, machine.peak(), resident.write(plans[-1])[0]


def rows(label: str, checkpoints: Mapping[str, Checkpoint], machine: Machine, end: float) -> list[list[str]]:
    """Measures every method on one family: first with all sources on the device that fit, then with few of them."""
    lines: dict[str, list[str]] = {}
    score, model = 0.0, None
    for method, (first, *later), peak, model in candidates(checkpoints, machine, end):
        score = score or scoring_seconds(model, machine)
        bytes_moved = sum(moved(plan_of(method, 0.0, list(checkpoints), checkpoints), checkpoints))
        floor, seconds = bytes_moved / machine.copies, statistics.median(later)
        line = [label, method, f"{bytes_moved / 1e9:.2f}", f"{floor:.3f}", f"{first:.3f}", f"{seconds:.3f}"]
        share = f"{seconds / (seconds + score):.0%}"
        lines[method] = [*line, f"{seconds / floor:.1f}x", f"{peak:.1f}", f"{score:.2f}", share]
    del model  # the device has to hold another one
    if machine.bus:
        for method, (_, *later), peak, _ in candidates(checkpoints, machine, end, device_memory=STREAMED):
            bus = moved(plan_of(method, 0.0, list(checkpoints), checkpoints), checkpoints)[0] / machine.bus
            seconds = statistics.median(later)
            lines[method] += [f"{seconds:.3f}", f"{bus:.3f}", f"{seconds / bus:.2f}x", f"{peak:.1f}"]
    lines |= {method: [label, method, "no time left"] for method in METHODS.keys() - lines.keys()}
    return [[*lines[method], *[""] * (len(HEAD) - len(lines[method]))] for method in METHODS]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds, bytes and memory of merging on a device.")
    parser.add_argument("--models", type=Path, default=Path("models"), help="a folder with base and fine-tunes")
    parser.add_argument("--minutes", type=float, default=7.0, help="when no further method is begun")
    arguments = parser.parse_args()
    end = time.perf_counter() + 60 * arguments.minutes
    machine = find_machine(1 << 30 if torch.cuda.is_available() else 1 << 25)
    sizes, on_gpu = (LARGE, True) if machine.module is not None else (SMALL, False)
    made = [("Llama 7B, random" if on_gpu else "Llama, small, random", synthetic(sizes, machine.device))]
    if on_gpu and (arguments.models / "base").is_dir():
        made.append((str(arguments.models), open_models(arguments.models, 3)[1]))
    lines = [row for label, models in made for row in rows(label, models, machine, end)]
    name = machine.module.get_device_name(machine.device) if on_gpu else "the processor"
    bus = f", the bus at {machine.bus / 1e9:.1f} GB/s" if machine.bus else ""
    rate = f"a copy runs at {machine.copies / 1e9:.1f} GB/s, read and written"
    print(f"On {name}, torch {torch.__version__}: {rate}{bus}.\n")
    print(table(HEAD, lines))
    if not on_gpu:
        print("\nThere is no GPU here: a small size went through the torch path on the processor. That it works is all")
        print("that these numbers show. They say nothing about a GPU, nor about the compiled path.")


if __name__ == "__main__":
    main()
