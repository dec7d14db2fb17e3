"""A double of a live vLLM engine, for tests without vLLM: `VLLMBackend(options, connect_double)`.

It starts with random weights, takes new ones by the same call, keeps a copy of a tied head as vLLM does on a processor,
and is asked through lm-eval, which cuts long inputs where it cuts them for vLLM and leaves special tokens in texts.
What stands in for vLLM's kernels is a model of transformers. The tests of the backend run on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.evaluation.backends.vllm import Engine, Weights

_GENERATED = 2
"""Tokens by which lm-eval cuts log-likelihoods' inputs shorter for vLLM than for transformers."""


class DoubleLLM:
    """In place of `vllm.LLM`.

    Args:
        folder: Config and tokenizer.
        dtype: What it computes in.

    Attributes:
        model: The model that answers.
        calls: The calls so far, by name.
        llm_engine: Itself, and so is the `engine_core` in that: what is shut down.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        self.model.to(getattr(torch, dtype))
        self.calls: list[str] = []
        self.llm_engine = self.engine_core = self
        self._tied = False

    def keep_own_head(self) -> None:
        """Gives a tied head a matrix of its own, which a reload does not reach; HFLM ties what it is given."""
        import torch

        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self._tied = head.weight is embedding.weight
        if self._tied:
            head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
            head.cpu_linear, head.quant_method = True, self

    def collective_rpc(self, method: str, kwargs: Mapping[str, Any]) -> list[None]:
        """Calls what the workers of an engine have: `reload_weights`."""
        getattr(self, method)(**kwargs)
        self.calls.append(method)
        return [None]

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Any]]) -> None:
        """Takes weights; refuses names that it does not know, and to leave tensors as they were."""
        import torch

        parameters = dict(self.model.named_parameters())
        if self._tied:
            del parameters["lm_head.weight"]
        missing = set(parameters)
        with torch.no_grad():
            for name, tensor in weights_iterator:
                if name not in parameters:
                    raise ValueError(f"There is no module or parameter named {name!r}")
                parameters[name].copy_(tensor)
                missing.discard(name)
        if missing:  # vLLM says so in its log, and goes on
            raise RuntimeError(f"weights were not loaded: {sorted(missing)}")

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """Calls a function with the model of each worker."""
        self.calls.append(function.__name__)
        return [function(self.model)]

    def process_weights_after_loading(self, module: Any) -> None:
        """Packs a head again from what it shares."""
        module.weight.data.copy_(self.model.get_input_embeddings().weight)

    def reset_prefix_cache(self) -> bool:
        """Forgets earlier prompts."""
        self.calls.append("reset_prefix_cache")
        return True

    def shutdown(self) -> None:
        """Gives the model's memory back."""
        self.calls.append("shutdown")
        del self.model


def connect_double(folder: Path, weights: Weights, arguments: Mapping[str, Any]) -> Engine:
    """Starts a double, as `connect_vllm` starts vLLM."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    class DoubleLM(HFLM):  # type: ignore[misc]  # lm-eval's own, known only here
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = False) -> Any:
            return super().tok_decode(tokens, skip_special_tokens=False)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self._max_length += _GENERATED
            try:
                return super().generate_until(requests, disable_tqdm=disable_tqdm)
            finally:
                self._max_length -= _GENERATED

    llm = DoubleLLM(folder, arguments["dtype"])
    lm = DoubleLM(
        pretrained=llm.model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=arguments["max_model_len"] - _GENERATED,
        batch_size=4,
        think_end_token=arguments["think_end_token"],
    )
    llm.keep_own_head()
    return Engine(lm, llm)
