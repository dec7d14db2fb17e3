"""The score cache: small files that several processes share, none of which can do harm."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from evomerge.evaluation.score_store import RunScores, ScoreCache, key_of
from evomerge.evaluation.scores import ItemScores, ResponseJacobian

ITEMS = {"t": ("t:1", "t:4")}


def scores(value: float = 1 / 3) -> dict[str, ItemScores]:
    return {"t": ItemScores("t", ITEMS["t"], {"acc": (np.array([value, 0.5]), np.ones(2))}, {"acc": True})}


def filled(folder: Path, count: int) -> list[str]:
    """A cache of files one second apart, oldest first."""
    cache = ScoreCache(folder)
    keys = [key_of({"n": n}) for n in range(count)]
    for n, key in enumerate(keys):
        cache.put(key, scores(float(n)))
        os.utime(folder / key[:2] / f"{key}.npz", (1000 + n, 1000 + n))
    return keys


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    cache, key = ScoreCache(tmp_path), key_of({"plan": "a"})
    assert cache.get(key, ITEMS) is None
    assert list(tmp_path.iterdir()) == []
    cache.put(key, scores())
    found = ScoreCache(tmp_path).get(key, ITEMS)
    assert found is not None
    assert np.array_equal(found["t"].metrics["acc"][0], [1 / 3, 0.5])
    assert key_of({"plan": "b"}) != key == key_of({"plan": "a"})


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other text"])
def test_a_damaged_file_is_ignored_and_replaced(tmp_path: Path, damage: str) -> None:
    cache, key = ScoreCache(tmp_path), key_of({})
    cache.put(key, scores())
    path = next(tmp_path.glob("*/*.npz"))
    whole = path.read_bytes()
    middle = whole.index(b"table0.npy") + 30  # in the compressed numbers
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
            "other text": b"not an archive",
        }[damage]
    )
    assert cache.get(key, ITEMS) is None
    cache.put(key, scores())
    assert path.read_bytes() == whole
    assert cache.get(key, ITEMS) is not None


def test_scores_of_other_items_are_ignored(tmp_path: Path) -> None:
    cache, key = ScoreCache(tmp_path), key_of({})
    cache.put(key, scores())
    assert cache.get(key, {"t": ("t:1", "t:5")}) is None
    assert cache.get(key, {"u": ITEMS["t"]}) is None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    keys = filled(tmp_path, 6)
    size = next(tmp_path.glob("*/*.npz")).stat().st_size
    cache = ScoreCache(tmp_path, limit=4 * size + size // 2)
    assert cache.get(keys[0], ITEMS) is not None  # used just now
    cache.shrink()
    assert [key for key in keys if cache.get(key, ITEMS) is not None] == [keys[0], *keys[3:]]


def test_what_a_killed_process_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.put(key_of({}), scores())
    folder = next(tmp_path.iterdir())
    old, new = folder / ".a.npz.1.partial", folder / ".b.npz.2.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    cache.shrink()
    assert not old.exists()
    assert new.exists()
    assert cache.get(key_of({}), ITEMS) is not None


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ScoreCache(tmp_path / "file")
    cache.put(key_of({}), scores())
    assert cache.get(key_of({}), ITEMS) is None


def test_scores_of_a_run_come_back(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    store = RunScores(tmp_path)
    values = np.array([0.1, 1 / 3])
    scores = {"t": ItemScores("t", ("t:0", "t:4"), {"acc": (values, np.ones(2))}, {"acc": True}, {}, {"f1": 0.25})}
    assert store.load("plan", "test") is None
    store.save("plan", "test", scores)
    kept = store.load("plan", "test")
    assert kept is not None
    assert kept["t"].items == ("t:0", "t:4")
    assert np.array_equal(kept["t"].metrics["acc"][0], values)
    assert kept["t"].score("f1").value == 0.25
    assert store.load("plan", "search") is None


def test_jacobians_are_kept_and_that_there_are_none_too(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    store = RunScores(tmp_path)
    assert store.load_jacobian("plan") is None
    store.save_jacobian("plan", {})
    part = ResponseJacobian(np.array([-1.0, -2.5]), np.array([[0.5, 1 / 3], [0.0, 2.0]]), np.ones(2), np.array([0, 0]))
    store.save_jacobian("other", {"t": part})
    assert store.load_jacobian("plan") == {}
    kept = store.load_jacobian("other")
    assert kept is not None
    for name in ("loglikelihoods", "derivatives", "lengths", "items"):
        np.testing.assert_array_equal(getattr(kept["t"], name), getattr(part, name))
