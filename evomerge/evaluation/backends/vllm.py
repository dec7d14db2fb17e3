"""The backend for large models on a GPU: lm-eval's own VLLM around a live vLLM engine that takes every candidate.

Written against the API that vLLM documents for versions 0.29 to 0.32 (docs.vllm.ai, "Weight Transfer", the IPC backend)
and lm-eval 0.4.13. It has been run with the double in `vllm_double` in vLLM's place, never yet with vLLM itself.

The engine starts once, with random weights, for an architecture. Before every score the candidate's tensors, which are
on the same GPU already, are handed over by CUDA IPC: nothing is written to the disk. Models of another number of layers
need an engine of their own, which takes as long as vLLM takes to start: frankenmerge is slow here. Log-likelihoods
come from `prompt_logprobs` and texts from `SamplingParams`, as lm-eval asks for them; vLLM generates at least one token
and decides batches itself, so the longest inputs are cut by two tokens more, and rounding may differ between two runs.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import BadInput
from evomerge.evaluation.backends.hf import PROBE, ask_lm
from evomerge.evaluation.backends.registry import Backend, BackendOptions
from evomerge.evaluation.tasks.requests import Requests
from evomerge.system.hashing import digest
from evomerge.system.quiet import quiet

GPU_SHARE = 0.5
"""Of the GPU's memory, what vLLM may take: the resident model and the merging need theirs beside it."""


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


class Client:
    """What vLLM's trainer side talks to: the engine in this process.

    Args:
        llm: A `vllm.LLM`.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Opens the channel; once."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begins a round."""
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Hands over some tensors."""
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends a round. The version's name is left out: nobody here asks the engine for it."""
        self.llm.finish_weight_update()


@dataclass(frozen=True)
class Engine:
    """A live engine.

    Attributes:
        lm: lm-eval's model around it.
        llm: The engine itself.
        send: Hands the current weights over.
    """

    lm: Any
    llm: Any
    send: Callable[[], None]


Connect = Callable[[Path, Weights, int, str | None], Engine]
"""(folder with config and tokenizer, weights, longest input, end of thinking) to an engine."""


class VLLMBackend(Backend):
    """Answers requests with lm-eval's VLLM.

    Args:
        options: As for every backend; the tokenizer, the longest input and the end of thinking are used.
        connect: Starts an engine; vLLM's own unless given.

    Raises:
        BadInput: vLLM is not installed.
    """

    def __init__(self, options: BackendOptions, connect: Connect | None = None) -> None:
        if connect is None and importlib.util.find_spec("vllm") is None:
            raise BadInput('backend vllm: vLLM is not installed; run pip install "evomerge[vllm]"')
        self.tokenizer = options.encoder.tokenizer
        self.max_length = options.encoder.max_length
        end = options.think_end_token  # VLLM sees the special tokens of a text, and takes no token's number
        self.think_end_token = str(self.tokenizer.decode([end])) if isinstance(end, int) else end
        self._connect = connect or connect_vllm
        self._version = importlib.metadata.version("vllm") if connect is None else ""
        self._engine: Engine | None = None
        self._weights: Weights | None = None
        self._architecture: str | None = None

    def prepare(self, model: Any) -> None:
        """Hands the model over to the engine, which is started for an architecture that it does not have yet.

        Raises:
            BadInput: The model is not on a GPU.
            CandidateError: The model's log-likelihoods are not finite.
        """
        engine = self._engine_for(model)
        engine.send()
        engine.llm.reset_prefix_cache()  # it holds what the last candidate made of the prompts
        with quiet():
            ask_lm(engine.lm, PROBE, [0])

    def respond(self, model: Any, requests: Requests, indices: Sequence[int]) -> list[list[list[Any]]]:
        """Returns the responses of the model that was prepared last: for each item, for each instance, one per repeat.

        Raises:
            CandidateError: A log-likelihood is not finite.
        """
        if self._engine is None or self._weights is None or self._weights.model is not model:
            self.prepare(model)
        assert self._engine is not None
        with quiet():
            return ask_lm(self._engine.lm, requests, indices)

    def digest(self, requests: Requests, indices: Sequence[int]) -> str:
        """Returns the identity of what is asked together; vLLM, of some version, makes its batches of that itself."""
        text = repr(("vllm", self._version, self.max_length, tuple(indices)))
        return digest(text)

    def _engine_for(self, model: Any) -> Engine:
        architecture = f"{model.dtype} {model.config.to_json_string(use_diff=False)}"
        if self._weights is not None:
            self._weights.model = model
        if self._engine is not None and architecture == self._architecture:
            return self._engine
        self._engine = None
        gc.collect()  # the old engine gives its memory back before the new one asks for it
        self._weights = Weights(model)
        with tempfile.TemporaryDirectory(prefix="evomerge-vllm-") as folder, quiet():
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self._engine = self._connect(Path(folder), self._weights, self.max_length, self.think_end_token)
        self._architecture = architecture
        return self._engine


def connect_vllm(folder: Path, weights: Weights, max_length: int, think_end_token: str | None = None) -> Engine:
    """Starts vLLM on the current GPU.

    Raises:
        BadInput: The model is not on a GPU.
    """
    if weights.model.device.type != "cuda":
        raise BadInput(f"backend vllm shares the candidates' GPU: device has to be cuda, got {weights.model.device}")
    # What names a tensor on the GPU is pickled on its way to the engine, a child process of ours.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    class Source(WeightSource):  # type: ignore[misc]  # vLLM's base class, known only here
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            return iter(weights)

    lm = VLLM(
        pretrained=str(folder),
        dtype=str(weights.model.dtype).removeprefix("torch."),
        max_model_len=max_length,
        think_end_token=think_end_token,
        load_format="dummy",
        weight_transfer_config=WeightTransferConfig(backend="ipc"),
        gpu_memory_utilization=GPU_SHARE,
    )
    trainer = WeightTransferTrainerFactory.trainer_init(
        init_info=IPCTrainerInitInfo(rank=0), client=Client(lm.model), source=Source()
    )
    return Engine(lm, lm.model, trainer.send_weights)
