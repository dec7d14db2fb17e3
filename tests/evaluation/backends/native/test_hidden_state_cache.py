"""Hidden states kept between candidates: less work, the same bits."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from evomerge.engine.resident import Resident
from evomerge.evaluation.backends.native.hidden_state_cache import (
    HiddenStateCache,
    can_be_resumed,
    order_by_shared_layers,
    resumable,
    shared_layers,
)
from evomerge.planning.layer_digests import depth_digests
from tests.engine.recipes import layers, plan_of
from tests.engine.recipes import opened as checkpoints_of
from tests.evaluation.conftest import Bench
from tests.evaluation.test_evaluator import Deaf, gpt2, mistral

LAYERS = 4


def digests(*names: str) -> list[str]:
    """Digests of a candidate whose layers have these names, each over all that is below."""
    return ["".join(names[:k]) for k in range(len(names))]


@contextmanager
def layer_runs(model: Any) -> Iterator[list[int]]:
    """The layers that are run, in order."""
    runs: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_, k=k: runs.append(k)) for k, layer in enumerate(model.model.layers)]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.fixture
def models(bench: Bench) -> dict[str, Any]:
    """Models by the names of their layers: `aabb` has the third and fourth layer of another model."""
    models = {}
    for name in ("aaaa", "aabb", "aabc", "bbbb"):
        model = AutoModelForCausalLM.from_pretrained(bench.checkpoint, dtype=torch.float32).eval()
        for layer, kind in zip(model.model.layers, name, strict=True):
            layer.mlp.down_proj.weight.data.mul_({"a": 1.0, "b": 0.5, "c": 0.25}[kind])
        models[name] = model
    return models


@pytest.mark.parametrize("budget", [2**30, 20_000, 0])
def test_scores_are_the_same_bits_with_and_without(bench: Bench, models: dict[str, Any], budget: int) -> None:
    reusing, plain = bench.evaluator("mc", "rolling"), bench.evaluator("mc", "rolling", reuse_prefixes=False)
    chosen = {"mc": range(6), "rolling": range(4)}
    assert reusing.backend.hidden_states is not None
    reusing.backend.hidden_states.max_bytes = budget
    for name in ("aaaa", "aabb", "aabc", "bbbb"):
        reused, expected = reusing.score(models[name], chosen, digests(*name)), plain.score(models[name], chosen)
        for task, scores in expected.items():
            for metric in scores.names:
                assert reused[task].score(metric) == scores.score(metric), (name, task, metric)
        assert 0 <= reusing.backend.hidden_states.bytes <= budget
    assert (reusing.backend.hidden_states.bytes > 0) is (budget > 0)


def test_layers_that_are_shared_are_not_run_again(bench: Bench, models: dict[str, Any]) -> None:
    evaluator = bench.evaluator("mc")
    evaluator.prepare(models["aaaa"])
    evaluator.announce_next(digests(*"aabb"))
    counts = {}
    for name in ("aaaa", "aabb", "aabc", "bbbb"):
        with layer_runs(models[name]) as runs:
            evaluator.score(models[name], layer_digests=digests(*name))
        counts[name] = [runs.count(k) for k in range(LAYERS)]
    whole = counts["aaaa"][0]
    assert whole > 0
    assert counts["aaaa"] == counts["bbbb"] == [whole] * LAYERS
    # aabb was announced, so aaaa left the input of layer 2; aabc shares aab with aabb: 2 again, for 3 came too late.
    assert counts["aabb"] == counts["aabc"] == [0, 0, whole, whole]


def test_without_digests_nothing_is_kept(bench: Bench, models: dict[str, Any]) -> None:
    evaluator = bench.evaluator("mc")
    for name in ("aaaa", "aabb", "aabc"):
        evaluator.score(models[name])
    assert evaluator.backend.hidden_states is not None
    assert evaluator.backend.hidden_states.bytes == 0


def test_the_layers_are_put_back(bench: Bench) -> None:
    names = [name for name, _ in bench.model.named_parameters()]
    with contextlib.suppress(RuntimeError), resumable(bench.model):
        assert [name for name, _ in bench.model.named_parameters()] != names
        raise RuntimeError("stopped by the user")
    assert [name for name, _ in bench.model.named_parameters()] == names


class Writing(torch.nn.Module):
    """A layer that writes to its input, so that what was kept of it is gone."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, **given: Any) -> Any:
        return self.inner(hidden.add_(1.0), **given)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "deaf", "writing"])
def test_models_are_resumed_or_left_alone(bench: Bench, name: str, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = {"gpt2": gpt2, "mistral": lambda: mistral(12)}.get(
        name, lambda: AutoModelForCausalLM.from_pretrained(bench.checkpoint, dtype=torch.float32).eval()
    )()
    if name == "deaf":
        model = Deaf(model)
    if name == "writing":
        model.model.layers[2] = Writing(model.model.layers[2])
    with caplog.at_level(logging.INFO):
        resumed = can_be_resumed(model)
    assert resumed is (name in ("llama", "gpt2", "mistral"))
    assert ("no hidden states are kept" in caplog.text) is not resumed


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=2, max_size=5).map(lambda names: digests(*names)), max_size=8))
def test_ordered_candidates_with_a_shared_beginning_follow_each_other(candidates: list[list[str]]) -> None:
    order = order_by_shared_layers(candidates)
    assert sorted(order) == list(range(len(candidates)))
    for k in range(1, 5):
        beginnings = [candidates[n][k] for n in order if len(candidates[n]) > k]
        changes = sum(a != b for a, b in itertools.pairwise(beginnings))
        assert changes <= max(0, len(set(beginnings)) - 1)


def test_ordering_by_hand() -> None:
    # bb came first; then aa with a branch ab before it in time.
    candidates = [digests(*"bbx"), digests(*"abx"), digests(*"bax"), digests(*"aax"), digests(*"abx")]
    assert order_by_shared_layers(candidates) == [0, 2, 1, 4, 3]
    assert shared_layers(candidates[0], candidates[2]) == 1
    assert shared_layers(candidates[1], candidates[4]) == 2
    assert shared_layers(candidates[0], []) == 0


def test_the_budget_spares_the_present_candidate() -> None:
    # Each state has 4 float32, 16 bytes: room for two.
    cache, state = HiddenStateCache(max_bytes=40), torch.zeros(4)
    old, new = digests(*"aaa"), digests(*"bbb")
    cache.put(old, "packed", 0, {1: state, 2: state})
    cache.put(new, "packed", 0, {2: state})
    assert cache.get(old, "packed", 0)[0] == 2  # layer 1 was the oldest
    cache.put(new, "packed", 1, {2: state})
    cache.put(new, "packed", 2, {2: state})  # nothing left that is not its own
    assert [cache.get(new, "packed", batch)[0] for batch in range(3)] == [2, 2, 0]
    assert cache.get(old, "packed", 0) == (0, None)
    assert cache.bytes == 32


def test_plans_that_share_layers_start_behind_them(bench: Bench, tiny_family: dict[str, Path]) -> None:
    """From recipes to scores: the engine names the digests, the resident model changes, the bits stay."""
    a, b = tiny_family["a"], tiny_family["b"]
    recipes = [layers((a, 0, 4)), layers((a, 0, 2), (b, 2, 4)), layers((a, 0, 2), (b, 1, 4)), layers((b, 0, 4))]
    checkpoints = checkpoints_of([str(a), str(b)])
    resident = Resident(checkpoints, torch.float32)
    plans = [plan_of(recipe, checkpoints) for recipe in recipes]
    reusing, plain = bench.evaluator("mc"), bench.evaluator("mc", reuse_prefixes=False)
    chosen, runs = {"mc": range(6)}, []
    for plan in plans:
        model, _ = resident.write(plan)
        reusing.prepare(model)
        expected = plain.score(model, chosen)["mc"].values("loss").tolist()
        with layer_runs(model) as run:
            reused = reusing.score(model, chosen, depth_digests(plan))["mc"].values("loss").tolist()
        assert reused == expected
        runs.append(sorted(set(run)))
    # The second keeps what it shares with the first, the input of layer 2; the third has five layers.
    assert runs == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4], [0, 1, 2, 3]]
