"""A control: training in place of merging. Whoever has items to search on could train on them.

An adapter of the base gets as many item evaluations as the search had, on the same items, by the same fitness.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import CandidateError, EvoMergeError
from evomerge.evaluation.splits import Selection
from evomerge.evaluation.tasks.requests import SOFT, Pair, SoftTargets
from evomerge.objective.fitness import Fitness, Scores
from evomerge.problem.model_runner import ModelRunner, likelihood_term
from evomerge.recipe.parse import single_model
from evomerge.system.quiet import torch_seeded

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
"""Of the adapter: what PEFT's examples and most people use."""
BATCH = 16
"""Items of a training step."""
COST = 3
"""What training on an item costs, in scores of it: a pass forward, and one backward of twice the products."""
SNAPSHOTS = 4
"""How often an adapter is kept, evenly over its training: the best is chosen as a search's winner is."""


def train_lora(
    runner: ModelRunner, reference: str, fitness: Fitness, selection: Selection, folder: Path, *, items: int, seed: int
) -> list[Path]:
    """Trains an adapter on the very items, and for the very fitness, of a search.

    Args:
        runner: Runs the model; its live model is given back.
        reference: The model that is adapted.
        fitness: What rises with training: of metrics that vary with log-likelihoods.
        selection: The search items.
        folder: Where the adapters go, in PEFT's layout.
        items: Item evaluations that training may cost.
        seed: Of the order of the items and of the adapter's first values.

    Returns:
        The adapters' folders, the longest trained last; those that are there already are kept.

    Raises:
        EvoMergeError: No task is scored by log-likelihoods, or the model cannot be adapted.
    """
    steps = max(SNAPSHOTS, items // (COST * BATCH))
    kept = {math.ceil(steps * k / SNAPSHOTS): folder / f"adapter-{k}" for k in range(1, SNAPSHOTS + 1)}
    if all((path / "adapter_config.json").is_file() for path in kept.values()):
        return list(kept.values())
    plan = runner.plan(single_model(reference))
    scores, _ = runner.scores(plan, selection)
    trained = {task: positions for task, positions in selection.items() if _has_loglikelihoods(runner, task, positions)}
    if not trained:
        raise EvoMergeError(
            "search.controls: lora: no task that steers is scored by log-likelihoods, so there is no gradient"
        )
    model = _with_adapter(runner.materialise(plan), seed)
    try:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        batches = _batches(trained, seed)
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - (step - 1) / steps)
            optimizer.zero_grad()
            _climb(model, runner, fitness, scores, selection, next(batches))
            optimizer.step()
            if step in kept:
                model.save_pretrained(kept[step])
    finally:
        runner.release()
    return list(kept.values())


def _with_adapter(model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model  # a part of the extra `lora`

    with torch_seeded(seed):
        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, settings)


def _has_loglikelihoods(runner: ModelRunner, task: str, positions: Sequence[int]) -> bool:
    by_item = runner.evaluator.requests(task)
    by_item.build(positions)
    kinds = {request.request_type for k in positions for request in by_item.by_item[k]}
    return bool(kinds) and not kinds & {"generate_until", SOFT}


def _batches(selection: Selection, seed: int) -> Iterator[list[tuple[str, int]]]:
    """Task and index into its selection, `BATCH` at a time: all in random order, then all again."""
    draw = random.Random(seed)
    everything = [(task, k) for task, positions in sorted(selection.items()) for k in range(len(positions))]
    order: list[tuple[str, int]] = []
    while True:
        while len(order) < BATCH:
            order += draw.sample(everything, len(everything))
        yield order[:BATCH]
        order = order[BATCH:]


def _climb(
    model: Any,
    runner: ModelRunner,
    fitness: Fitness,
    scores: Scores,
    selection: Selection,
    batch: Sequence[tuple[str, int]],
) -> None:
    """Adds the gradient of the loss, which is the fitness of a batch of items with its sign turned."""
    total = sum(goal.weight for goal in fitness.goals)
    for goal in fitness.goals:
        chosen = sorted({k for task, k in batch if task == goal.task})
        if not chosen:
            continue
        positions = [selection[goal.task][k] for k in chosen]
        requests = runner.evaluator.requests(goal.task)
        owners, pairs = _pairs(runner, requests.by_item, positions)
        values = _loglikelihoods(model, pairs, runner.evaluator.max_length)
        by_request = torch.zeros(owners[-1] + 1, dtype=torch.float64).index_add(0, torch.tensor(owners), values)
        at = by_request.detach().numpy()
        of_items = np.repeat(np.arange(len(positions)), [len(requests.by_item[k]) for k in positions])
        task, part = runner.evaluator.tasks[goal.task], scores[goal.task].take(chosen)
        term = likelihood_term(runner, task, goal, positions, at, of_items, part)
        if term is None:
            continue
        _, slopes = term.value(at, np.ones(len(positions), dtype=np.bool_))
        share = goal.weight / total
        torch.autograd.backward(-share * (torch.from_numpy(slopes) * by_request).sum())


def _pairs(runner: ModelRunner, by_item: Any, positions: Sequence[int]) -> tuple[list[int], list[Pair]]:
    """The token pairs of all requests of some items, and which request each is of."""
    asked = [runner.evaluator.encoder.pairs(request) for k in positions for request in by_item[k]]
    encoded = [[pair for pair in pairs if not isinstance(pair, SoftTargets)] for pairs in asked]
    return [n for n, pairs in enumerate(encoded) for _ in pairs], list(chain(*encoded))


def _loglikelihoods(model: Any, pairs: Sequence[Pair], max_length: int) -> Tensor:
    """The log-likelihood of each continuation, [pairs], in float64, with its graph."""
    device = next(model.parameters()).device
    texts = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    longest = max(map(len, texts)) - 1
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask, scored, targets = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (text, (_, continuation)) in enumerate(zip(texts, pairs, strict=True)):
        length, count = len(text) - 1, min(len(continuation), len(text) - 1)
        ids[row, :length], targets[row, :length] = torch.tensor(text[:-1]), torch.tensor(text[1:])
        mask[row, :length], scored[row, length - count : length] = 1, 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    rows, columns = scored.to(device).nonzero(as_tuple=True)
    log_probs = torch.log_softmax(logits[rows, columns].float(), dim=-1)
    of_targets = log_probs.gather(1, targets.to(device)[rows, columns, None])[:, 0].double()
    if not bool(torch.isfinite(of_targets).all()):
        raise CandidateError("search.controls: lora: the log-likelihoods are not finite any more")
    return torch.zeros(len(texts), dtype=torch.float64, device=device).index_add(0, rows, of_targets).cpu()
