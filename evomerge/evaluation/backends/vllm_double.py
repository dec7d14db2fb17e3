"""A double of a live vLLM engine, for tests without a GPU: `VLLMBackend(options, connect_double)`.

It starts with random weights, takes new ones by the same four calls in the same order, and is asked through lm-eval.
What stands in for vLLM's kernels is a model of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evomerge.evaluation.backends.vllm import Client, Engine, Weights


class DoubleLLM:
    """In place of `vllm.LLM`.

    Args:
        folder: Config and tokenizer.

    Attributes:
        model: The model that answers.
        calls: The calls so far, by name.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        self.calls: list[str] = []
        self._missing: set[str] | None = None

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        """Opens the channel."""
        _ = request["init_info"]
        self.calls.append("init")

    def start_weight_update(self) -> None:
        """Begins a round."""
        if "init" not in self.calls or self._missing is not None:
            raise RuntimeError("a weight update starts after the channel is open and the last round is finished")
        self._missing = {name for name, _ in self.model.named_parameters()}
        self.calls.append("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        """Takes some tensors; refuses names that it does not know."""
        import torch

        if self._missing is None:
            raise RuntimeError("weights come between the start and the finish of an update")
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in request["update_info"]["weights"]:
                parameters[name].copy_(tensor)
                self._missing.discard(name)
        self.calls.append("update")

    def finish_weight_update(self) -> None:
        """Ends a round; refuses to leave tensors as they were."""
        if self._missing is None or self._missing:
            raise RuntimeError(f"an update has to bring every tensor; missing: {sorted(self._missing or ())}")
        self._missing = None
        self.calls.append("finish")

    def reset_prefix_cache(self) -> bool:
        """Forgets earlier prompts."""
        self.calls.append("reset")
        return True


def connect_double(folder: Path, weights: Weights, max_length: int, think_end_token: str | None = None) -> Engine:
    """Starts a double, as `connect_vllm` starts vLLM."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    llm = DoubleLLM(folder)
    llm.model.to(weights.model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = HFLM(
        pretrained=llm.model,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=4,
        think_end_token=think_end_token,
    )
    client = Client(llm)
    client.init_weight_transfer_engine({})

    def send() -> None:
        client.start_weight_update()
        client.update_weights({"weights": list(weights)})
        client.finish_weight_update()

    return Engine(lm, llm, send)
