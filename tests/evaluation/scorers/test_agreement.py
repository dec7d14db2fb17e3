"""Divergence from what each source expects: its value, its derivatives, texts that mean nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import TaskError
from evomerge.evaluation.backends.registry import Directions
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.scorers import agreement
from evomerge.evaluation.scorers.agreement import agreement_task
from tests.evaluation.conftest import Bench

ROWS = [
    {"source": "one", "text": "the river is under the stone"},
    {"source": "two", "text": "a cloud was"},
    {"source": "one", "text": "seven"},
]


def noisy(model: Any, seed: int, scale: float = 0.05) -> Any:
    """A copy of a model with other weights, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return other


@pytest.fixture
def models(bench: Bench) -> dict[str, Any]:
    """Two sources and a merge."""
    return {name: noisy(bench.model, seed) for seed, name in enumerate(("one", "two", "merge"))}


def evaluator(bench: Bench, models: dict[str, Any], **options: Any) -> Evaluator:
    """An evaluator of the texts that has read what the sources expect."""
    task = agreement_task("agreement", ROWS, Path("texts.jsonl"), ["one", "two"])
    evaluator = Evaluator([task], bench.tokenizer, bench.model.config, **options)
    for name in task.scorer.references:
        evaluator.read_reference(models[name], name)
    return evaluator


def divergence(tokenizer: Any, source: Any, merge: Any, text: str, most: int) -> tuple[float, int]:
    """The sum over positions, the long way."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[first, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.inference_mode():
        of_source, of_merge = (torch.log_softmax(m(input_ids=ids).logits[0], dim=-1) for m in (source, merge))
    top = of_source.topk(most, dim=-1)
    log_p = top.values - top.values.logsumexp(dim=-1, keepdim=True)
    return float((log_p.exp() * (log_p - of_merge.gather(1, top.indices))).sum()), ids.shape[1]


@pytest.mark.parametrize("most", [4, 10**6])
def test_the_divergence_is_that_of_the_distributions(
    bench: Bench, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(agreement, "TOP_TOKENS", most)
    scores = evaluator(bench, models).score(models["merge"])["agreement"]
    most = min(most, models["one"].config.vocab_size)
    expected = [divergence(bench.tokenizer, models[r["source"]], models["merge"], r["text"], most) for r in ROWS]
    assert scores.items == ("agreement.one:0", "agreement.two:1", "agreement.one:2")
    assert scores.columns("divergence")[1].tolist() == [count for _, count in expected]
    assert scores.columns("divergence")[0] == pytest.approx([total for total, _ in expected], rel=1e-5)
    assert not scores.higher_is_better["divergence"]


def test_a_source_agrees_with_itself(bench: Bench, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "TOP_TOKENS", 10**6)
    values = evaluator(bench, models).score(models["one"])["agreement"].values("divergence")
    assert values[[0, 2]] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert values[1] > 0.01


def test_the_derivatives_are_those_of_small_steps(bench: Bench, models: dict[str, Any]) -> None:
    merge, run = models["merge"], evaluator(bench, models)
    selection = {"agreement": (0, 1, 2)}
    generator = torch.Generator().manual_seed(9)
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    names += [
        name for name, _ in merge.named_parameters() if "layers.1" in name and ("down" in name or "q_proj" in name)
    ]
    parameters = {name: p for name, p in merge.named_parameters() if name in names}
    moves = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    directions = {name: [Directions(np.array([k]), move[None])] for k, (name, move) in enumerate(moves.items())}
    jacobian = run.jacobian(merge, selection, directions, len(moves))["agreement"]
    assert jacobian.lengths.tolist() == run.score(merge, selection)["agreement"].columns("divergence")[1].tolist()
    metric = run.smooth_metric("agreement", "divergence", (0, 1, 2), jacobian.loglikelihoods)
    assert metric is not None
    numerators, slopes = metric(jacobian.loglikelihoods)
    assert numerators == pytest.approx(run.score(merge, selection)["agreement"].columns("divergence")[0], rel=1e-4)
    step = 1e-4
    for k, (name, move) in enumerate(moves.items()):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name].add_(sign * step * move)
            sides.append(run.score(merge, selection)["agreement"].columns("divergence")[0])
            with torch.no_grad():
                parameters[name].sub_(sign * step * move)
        expected = (sides[0] - sides[1]) / (2 * step)
        assert slopes * jacobian.derivatives[:, k] == pytest.approx(expected, rel=2e-2, abs=2e-2), name


def test_batches_have_a_digest_of_what_sources_expect(bench: Bench, models: dict[str, Any]) -> None:
    first = evaluator(bench, models).batch_digest({"agreement": (0,)})
    assert first == evaluator(bench, models).batch_digest({"agreement": (0,)})
    assert first != evaluator(bench, {**models, "one": models["merge"]}).batch_digest({"agreement": (0,)})


def test_only_the_native_backend_knows(bench: Bench, models: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="only backend native"):
        evaluator(bench, {name: model.float() for name, model in models.items()}, backend="hf")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "three", "text": "x"}, r"item 0: no source is called the text 'three'; there are one, two"),
        ({"source": "on", "text": "x"}, r"no source is called the text 'on' \(did you mean 'one'\?\)"),
        ({"text": "x"}, "no source is called nothing"),
        ({"source": "one", "text": " "}, "a text is expected under 'text', got the text ' '"),
        ({"source": "one"}, "a text is expected under 'text', got nothing"),
    ],
)
def test_rows_that_mean_nothing(row: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        agreement_task("agreement", [row], Path("texts.jsonl"), ["one", "two"])
