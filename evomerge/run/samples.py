"""A few generated samples, to see whether a merged model still speaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.evaluation.evaluator import Evaluator


def prompt_of(evaluator: Evaluator, task: str) -> str:
    """A prompt from a task's first item: its context, or the first words of its text where it has none."""
    instance = evaluator.requests(task).by_item[0][0]
    context = instance.args[0] if len(instance.args) > 1 else ""
    if context.strip():
        return str(context)
    words = str(instance.args[-1]).split()
    return " ".join(words[: max(2, len(words) // 2)])


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What a model goes on to write after a prompt, greedily.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        prompt: The text to go on from.
        tokens: At most this many tokens.
    """
    import torch

    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        output = model.generate(**encoded, do_sample=False, max_new_tokens=tokens, pad_token_id=pad)
    return str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
