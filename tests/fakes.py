"""Searches without models: the parts of a search that a formula takes the place of, here and in worker processes."""

from __future__ import annotations

from typing import Any

from evomerge.executors.pool import Opened
from evomerge.problem.fake_evaluator import FakeRunner, fake_problem
from evomerge.run.search import SearchParts, open_worker
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from tests.frame import changed

FAKE = SearchParts(fake_problem, FakeRunner, lambda problem, runner: [], "tests.fakes:open_fake_worker")


def open_fake_worker(*arguments: Any) -> Opened:
    """What a worker opens of a fake search."""
    return open_worker(*arguments, parts=FAKE)


def fake_spec(**changes: Any) -> SearchSpec:
    """A search whose models need not exist; `changes` as for `search_spec`."""
    spec: dict[str, Any] = {
        "name": "fake",
        "models": {"base": "/models/base", "sources": {name: f"/models/{name}" for name in "abc"}},
        "space": {"methods": ["linear", "task_arithmetic", "dare_ties"], "layer_groups": 2},
        "evaluation": {
            "tasks": [{"task": "choice", "metric": "acc"}, {"task": "text", "metric": "bits_per_byte", "weight": 2.0}],
            "splits": {"search": 0.5, "select": 0.25, "test": 0.25},
            "guard": ["answer"],
            "cache": False,
            "dtype": "float32",
        },
        "search": {"algorithm": "ga", "population": 4, "candidates": 18, "finalists": 3},
        "run": {"keep": 0},
    }
    return parse_spec(changed(spec, changes))
