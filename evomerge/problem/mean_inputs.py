"""Mean magnitudes of the inputs of a model's matrices over a few texts: what `activations:` of a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.checkpoints.reference import resolve_reference
from evomerge.engine.resident import Resident
from evomerge.errors import BadInput
from evomerge.planning.plan import make_plan
from evomerge.recipe import parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.system.files import write_atomic

LONGEST = 512
"""Tokens of a text that are read."""


def write_mean_inputs(model: str, texts: Sequence[str], out: Path, *, max_length: int = LONGEST) -> Path:
    """Runs a model over texts, one after another, and writes what each `torch.nn.Linear` of it read.

    Args:
        model: The base: a folder, a Hub id, `base+adapter`, or `zoo:NAME`.
        texts: 16 to 64 of what the merged model is for.
        out: A `.safetensors` file: for each matrix, by its name, the mean over all tokens of each input's magnitude.
        max_length: Tokens of a text that are read.

    Returns:
        `out`.

    Raises:
        BadInput: When the model cannot be run, or there is no text.
        OutputError: When writing fails.
    """
    reference = resolve_reference(model, Path.cwd())
    checkpoint = reconcile({reference: open_checkpoint(reference)}).checkpoints[reference]
    tokenizer = checkpoint.load_tokenizer().loaded
    encoded = [ids for text in texts if (ids := tokenizer(text)["input_ids"][:max_length])]
    if not encoded:
        raise BadInput("texts: give at least one that has a token")
    plan = make_plan(parse_recipe(single_model(reference)), {reference: checkpoint})
    live, _ = Resident({reference: checkpoint}, torch.float32).write(plan)
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs = given[0].reshape(-1, given[0].shape[-1]).abs().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + inputs if name in sums else inputs

    linear = [(name, module) for name, module in live.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(partial(add, f"{name}.weight")) for name, module in linear]
    try:
        with torch.inference_mode():
            for ids in encoded:
                live(input_ids=torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    count = sum(map(len, encoded))
    write_atomic(out, save({name: (total / count).float() for name, total in sums.items()}))
    return out
