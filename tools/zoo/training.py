"""Trains a model of the zoo: AdamW on batches drawn beforehand, to the same bytes on every processor.

Training is chaotic: two starts that differ in the last bit of float64 are different models after 200 steps, and
processors differ in the last bits of a sum. So gradients are taken in float64 and every step ends on a grid of weights
that is a billion times coarser, and a fiftieth of the smallest learning rate: what two processors disagree about is
rounded away before it can grow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from evomerge.zoo.models import GRID
from tools.zoo.forward import EMBEDDINGS, last_states
from tools.zoo.sizes import TEXT, Size, Training
from tools.zoo.skills import OPENERS, SKILLS, lexicon, text_examples
from tools.zoo.tokenizer import BOS, EOS, build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

CONTEXT = 128
"""Longest text in tokens, as the models' configuration says; training texts are far shorter."""

IGNORED = -100
"""The label of a token that is not learnt: prompts and padding."""

_BETAS = (0.9, 0.98)
_CLIP = 1.0


def zoo_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer that every model of the zoo has."""
    return build_tokenizer(lexicon(), OPENERS, CONTEXT)


def zoo_config(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the configuration of a family's models."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def new_weights(config: LlamaConfig, seed: int = 0) -> dict[str, Tensor]:
    """Draws a model's first weights.

    Returns:
        float64 on the grid, by the names that transformers gives them; the head is the embeddings.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).named_parameters()}
    rng = np.random.default_rng(seed)
    return {
        name: on_grid(torch.from_numpy(rng.normal(0, config.initializer_range, shape)))
        if len(shape) > 1
        else torch.ones(shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def on_grid(weight: Tensor) -> Tensor:
    """Rounds `weight` in place to what every processor agrees about, and returns it."""
    return weight.mul_(GRID).round_().div_(GRID)


def _texts(skill: str, count: int, slips: float, seed: int) -> list[tuple[str, str]]:
    """Draws training texts as pairs: what is given, and what is learnt."""
    rng = random.Random(f"{skill} {seed}")
    if skill == TEXT:
        return [(BOS, sentence) for sentence in text_examples(rng, count)]
    questions = SKILLS[skill].examples(rng, count)
    return [(q.prompt, f" {q.slip if rng.random() < slips else q.answer}{EOS}") for q in questions]


def draw_batches(training: Training, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws every batch of a stretch of training.

    Returns:
        Token ids and labels, each of shape [steps, rows, tokens]; padded at the right.
    """
    parts = []
    for skill, rows in training.rows.items():
        given, learnt = zip(*_texts(skill, rows * training.steps, training.slips, training.seed), strict=True)
        tokens = (tokenizer(list(texts))["input_ids"] for texts in (given, learnt))
        parts.append((rows, list(zip(*tokens, strict=True))))
    width = max(len(left) + len(right) for _, pairs in parts for left, right in pairs)
    ids, labels = [], []
    for rows, pairs in parts:
        part_ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
        part_labels = torch.full((len(pairs), width), IGNORED)
        for row, (left, right) in enumerate(pairs):
            end = len(left) + len(right)
            part_ids[row, :end] = torch.tensor(left + right)
            part_labels[row, len(left) : end] = torch.tensor(right)
        ids.append(part_ids.view(training.steps, rows, width))
        labels.append(part_labels.view(training.steps, rows, width))
    return torch.cat(ids, dim=1), torch.cat(labels, dim=1)


def _pace(step: int, steps: int) -> float:
    """Returns the share of the peak learning rate: up over the first tenth, down over the last half."""
    return min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.5 * steps))


def train(
    weights: Mapping[str, Tensor],
    config: LlamaConfig,
    training: Training,
    tokenizer: Any,
    advance: Callable[[], None],
) -> None:
    """Trains a model in place.

    Args:
        weights: As `new_weights` gives them.
        config: Of the model.
        training: What on, and how long.
        tokenizer: Of the model.
        advance: Called after each step.
    """
    ids, labels = draw_batches(training, tokenizer)
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _pace(step, training.steps)
        states = last_states(weights, config, ids[step])[:, :-1]
        targets = labels[step, :, 1:]
        learnt = targets != IGNORED
        loss = cross_entropy(linear(states[learnt], weights[EMBEDDINGS]), targets[learnt])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight in parameters:
                on_grid(weight)
        advance()
