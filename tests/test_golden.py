"""Searches, merges and scores give what they gave before, to the bit on the machine that the golden files are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden import make


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("name", make.SEARCHES)
def test_a_search_has_the_same_record_result_and_winner(name: str, tmp_path: Path) -> None:
    today = make.search_results(name, tmp_path)
    assert make.first_difference(make.golden(name), json.loads(make.render(today))) is None


@pytest.mark.parametrize("method", make.MERGES)
def test_merges_have_the_same_bits(method: str, tmp_path: Path) -> None:
    expected = make.golden("merges")
    expected["merges"] = {key: entry for key, entry in expected["merges"].items() if key.split("/")[0] == method}
    assert len(expected["merges"]) >= 3
    used = {entry["tensors"] for entry in expected["merges"].values()}
    expected["tensors"] = {key: names for key, names in expected["tensors"].items() if key in used}
    today = make.merge_results([method], tmp_path)
    assert make.first_difference(expected, json.loads(make.render(today))) is None


def test_every_method_has_golden_merges() -> None:
    assert sorted(make.method_names()) == sorted(make.MERGES)
    assert {key.split("/")[0] for key in make.golden("merges")["merges"]} == set(make.MERGES)


def test_scores_are_the_same(tmp_path: Path) -> None:
    today = make.evaluation(tmp_path)
    assert make.first_difference(make.golden("eval"), json.loads(make.render(today))) is None


def test_a_difference_is_told_with_its_place() -> None:
    golden = make.golden("ga")
    today = json.loads(make.render(golden))
    assert make.first_difference(golden, today) is None
    today["result"]["new"] = 1.0
    assert make.first_difference(golden, today) is None
    today["candidates"][3]["fitness"] += 1e-3
    difference = make.first_difference(golden, today)
    assert difference is not None
    assert difference.startswith("candidates > 3 > fitness: golden ")


def test_elsewhere_what_rounding_explains_is_no_difference() -> None:
    golden, scores = make.golden("ga"), make.golden("merges")
    for document in (golden, scores):
        document["fingerprint"] = {**document["fingerprint"], "cpu": "another"}
    today = json.loads(make.render(make.golden("ga")))
    today["candidates"][3]["fitness"] += 5e-4
    today["candidates"][-1]["fitness"] += 1.0
    assert make.first_difference(golden, today) is None
    today["candidates"][3]["fitness"] += 1e-3
    difference = make.first_difference(golden, today)
    assert difference is not None
    assert difference.startswith("candidates > 3 > fitness: golden ")
    merged = json.loads(make.render(make.golden("merges")))
    entry = merged["merges"]["ties/density/short/float32"]
    entry["sha256"] = "another"
    assert make.first_difference(scores, merged) is None
    entry["sums"][0][1] += 1e-4 * entry["sums"][0][0]
    difference = make.first_difference(scores, merged)
    assert difference is not None
    assert difference.startswith("merges > ties/density/short/float32 > sums > 0: golden ")


def test_renamed_words_are_read_as_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "RENAMED", {"mutation": "change", "done": "scored"})
    value = {"operator": "blend + mutation: scale", "state": "done", "done": [{"undone": "mutations"}]}
    expected = {"operator": "blend + change: scale", "state": "scored", "scored": [{"undone": "mutations"}]}
    assert make.renamed(value) == expected
