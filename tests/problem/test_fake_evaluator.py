"""The formula that tests run on instead of models: the same everywhere, and something to be searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.evaluation.splits import SEARCH
from evomerge.problem.fake_evaluator import ITEMS, LAYERS, FakeRunner, fake_problem, quality
from evomerge.run.folder import RunFolder
from evomerge.run.search import start
from tests.fakes import FAKE, fake_spec
from tests.run.test_search import lasting

RECIPE: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": f"/models/{name}", "parameters": {"weight": 0.5}} for name in "ab"],
}


def test_an_items_scores_depend_on_the_recipe_and_the_item_alone() -> None:
    problem = fake_problem(fake_spec())
    one, other = FakeRunner(problem), FakeRunner(fake_problem(fake_spec(name="another")))
    selection = problem.splits[SEARCH]
    assert {task: len(items) for task, items in selection.items()} == {"choice": ITEMS // 2, "text": ITEMS // 2}
    whole, _ = one.scores(one.plan(RECIPE), selection)
    part, _ = other.scores(other.plan(RECIPE), {"choice": selection["choice"][3:5]})
    assert part["choice"].items == whole["choice"].items[3:5]
    assert np.array_equal(part["choice"].values("acc"), whole["choice"].values("acc")[3:5])
    assert set(np.unique(whole["choice"].values("acc"))) <= {0.0, 1.0}
    assert len(np.unique(whole["text"].values("bits_per_byte"))) > 10
    assert one.sizes(one.plan(RECIPE))["layers"] == LAYERS


def test_every_number_of_a_recipe_counts() -> None:
    values = [quality({**RECIPE, "parameters": {"t": t}}) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert len(set(values)) == 5
    assert all(0.3 <= value <= 0.8 for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_workers_give_the_same_search(executor: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if executor == "ray":
        request.getfixturevalue("ray_cluster")
    changes: dict[str, Any] = {"evaluation__racing": True, "search__candidates": 40, "run__executor": executor}
    start(fake_spec(**{**changes, "run__executor": "local"}), folder=tmp_path / "one", parts=FAKE)
    start(fake_spec(run__workers=2, **changes), folder=tmp_path / "two", parts=FAKE)
    one, two = (RunFolder.existing(tmp_path / name) for name in ("one", "two"))
    assert lasting(one.candidates()) == lasting(two.candidates())
    assert one.result() == two.result()
