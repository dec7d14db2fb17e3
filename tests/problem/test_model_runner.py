"""A generation is planned once, ordered by the layers that its candidates share, and each announces the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import RecipeError
from evomerge.evaluation.backends.native.hidden_state_cache import HiddenStateCache
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.run.folder import RunFolder
from evomerge.run.search import start
from evomerge.space.genome import Genome
from evomerge.spec.load import parse_spec
from evomerge.study.candidate import Proposal
from tests.frame import files, search_spec
from tests.run.test_search import lasting


@pytest.fixture(scope="module")
def runner(tiny_family: dict[str, Path]) -> ModelRunner:
    return ModelRunner(open_problem(parse_spec(search_spec(tiny_family))))


def stacked(family: Mapping[str, Path], number: int, pattern: str) -> Proposal:
    """A proposal whose layers come from these models, one letter for each layer."""
    slices = [{"sources": [{"model": str(family[name]), "layer_range": [k, k + 1]}]} for k, name in enumerate(pattern)]
    recipe = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    return Proposal(number, 1, Genome({}), recipe, f"{number} {pattern}", (), "by hand")


def test_those_that_share_layers_follow_each_other_and_announce_the_next(
    runner: ModelRunner, tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aabb` and `aaba` share three layers; `bbbb` came between them, and a recipe that is not possible before them."""
    planned, announced = [], []
    plan = runner.plan

    def counting(recipe: Mapping[str, Any], **options: Any) -> Any:
        planned.append(recipe)
        return plan(recipe, **options)

    monkeypatch.setattr(runner, "plan", counting)
    monkeypatch.setattr(runner.evaluator, "announce_next", announced.append)
    proposals = [stacked(tiny_family, k, pattern) for k, pattern in enumerate(["aabb", "bbbb", "aaba"])]
    nothing = Proposal(3, 1, Genome({}), {"merge_method": "linear"}, "nothing", (), "by hand")
    order = runner.arrange([nothing, *proposals])
    assert [k - 1 for k in order] == [-1, 0, 2, 1]
    with pytest.raises(RecipeError):
        runner.plan_next(nothing)
    plans = [runner.plan_next(proposals[k])[0] for k in (0, 2, 1)]
    assert plans == [plan(proposals[k].recipe) for k in (0, 2, 1)]
    assert announced == [runner.layer_digests(plans[1]), runner.layer_digests(plans[2]), ()]
    assert [p.recipe for p in proposals] == planned[1:4]
    assert len(planned) == 5  # the impossible one twice


def test_what_was_not_arranged_is_planned_in_its_turn(runner: ModelRunner, tiny_family: dict[str, Path]) -> None:
    proposal = stacked(tiny_family, 0, "abab")
    plan, seconds = runner.plan_next(proposal)
    assert plan == runner.plan(proposal.recipe)
    assert seconds > 0


def test_a_run_that_starts_behind_shared_layers_is_the_run_that_does_not(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same candidates, result and kept scores, bit for bit, with racing too; and some passes do start behind."""
    starts = []
    get = HiddenStateCache.get

    def noting(self: HiddenStateCache, *place: Any) -> Any:
        found = get(self, *place)
        starts.append(found[0])
        return found

    monkeypatch.setattr(HiddenStateCache, "get", noting)
    changes: dict[str, Any] = {
        "evaluation__racing": True,
        "space__methods": ["frankenmerge"],
        "search__population": 6,
        "search__finalists": 1,
        "run__keep": 0,
    }
    for name, reuse in (("reusing", True), ("plain", False)):
        spec = parse_spec(search_spec(tiny_family, evaluation__reuse_prefixes=reuse, **changes))
        start(spec, folder=tmp_path / name)
    assert any(starts)
    reusing, plain = (RunFolder.existing(tmp_path / name) for name in ("reusing", "plain"))
    assert lasting(reusing.candidates()) == lasting(plain.candidates())
    assert reusing.result() == plain.result()
    assert dict(files(tmp_path / "reusing" / "scores")) == dict(files(tmp_path / "plain" / "scores"))
