from __future__ import annotations

import io
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import TaskError
from evomerge.evaluation.scores import (
    BITS,
    EXP,
    ItemScores,
    Score,
    bootstrap_sums,
    concatenate,
    dump_scores,
    load_scores,
    paired_difference,
    score_table,
    table_from_json,
    table_to_json,
)


def scores(task: str = "t", **metrics: list[float]) -> ItemScores:
    """Means of the given values."""
    n = len(next(iter(metrics.values())))
    columns = {name: (np.array(values, dtype=float), np.ones(n)) for name, values in metrics.items()}
    return ItemScores(task, tuple(f"{task}:{k}" for k in range(n)), columns, dict.fromkeys(metrics, True))


def ratio(numerators: list[float], denominators: list[float], transform: str) -> ItemScores:
    columns = {"m": (np.array(numerators), np.array(denominators))}
    items = tuple(f"t:{k}" for k in range(len(numerators)))
    return ItemScores("t", items, columns, {"m": False}, {"m": transform})


def test_mean_by_hand() -> None:
    # Mean of 1, 0, 1, 1 is 3/4; sample variance (3 * 1/16 + 9/16) / 3 = 1/4; error sqrt(1/4 / 4) = 1/4.
    assert scores(acc=[1, 0, 1, 1]).score("acc") == Score(0.75, 0.25, 4)


def test_bits_per_byte_by_hand() -> None:
    # Sums -6 nats over 12 bytes: 0.5 nats a byte. Terms (a - r b) / mean(b): (-2 + 2)/6, (-4 + 4)/6: no spread.
    got = ratio([-2.0, -4.0], [4.0, 8.0], BITS).score("m")
    assert got.value == pytest.approx(0.5 / math.log(2))
    assert got.stderr == pytest.approx(0.0)
    # Sums -6 over 8: r = -3/4. Terms (-2 + 3)/4 = 1/4 and (-4 + 3)/4 = -1/4; sample sd sqrt(1/8); over sqrt(2): 1/4.
    got = ratio([-2.0, -4.0], [4.0, 4.0], BITS).score("m")
    assert got.value == pytest.approx(0.75 / math.log(2))
    assert got.stderr == pytest.approx(0.25 / math.log(2))


def test_perplexity_is_the_exponential_with_the_error_of_the_delta_method() -> None:
    got = ratio([-2.0, -4.0], [4.0, 4.0], EXP).score("m")
    assert got.value == pytest.approx(math.exp(0.75))
    assert got.stderr == pytest.approx(0.25 * math.exp(0.75))


def test_an_item_without_a_value_does_not_count() -> None:
    part = ratio([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], "mean")
    assert part.score("m").value == 0.5
    assert part.score("m").n == 2
    assert np.isnan(part.values("m")[2])


def test_nothing_scored_is_no_score() -> None:
    with pytest.raises(TaskError, match="nothing was scored"):
        ratio([0.0], [0.0], "mean").score("m")
    assert ratio([0.0], [0.0], "mean").scores() == {}


def test_one_item_has_no_error() -> None:
    assert scores(acc=[1]).score("acc") == Score(1.0, None, 1)


def test_an_unknown_metric_is_named_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"'t' has no metric 'ac' \(did you mean 'acc'\?\); it has acc, prob"):
        scores(acc=[1, 0], prob=[0.5, 0.5]).score("ac")


def test_a_corpus_metric_has_a_value_and_no_error() -> None:
    part = ItemScores("t", ("a", "b"), {}, {"f1": True}, {}, {"f1": 0.5})
    assert part.score("f1") == Score(0.5, None, 2)
    assert not part.is_itemwise("f1")
    with pytest.raises(TaskError, match="no metric 'f1'"):
        paired_difference(part, part, "f1")


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=20))
def test_paired_difference_of_means_is_the_mean_of_the_differences(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    difference, stderr = paired_difference(scores(m=a), scores(m=b), "m")
    each = np.array(a) - np.array(b)
    assert difference == pytest.approx(each.mean(), abs=1e-9)
    assert stderr == pytest.approx(each.std(ddof=1) / math.sqrt(len(each)), abs=1e-9)


def test_paired_error_is_smaller_than_that_of_two_separate_scores() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(size=200)
    a, b = scores(m=list(hard + 0.1)), scores(m=list(hard + 0.1 * generator.normal(size=200)))
    _, stderr = paired_difference(a, b, "m")
    assert stderr is not None
    assert stderr < 0.2 * (a.score("m").stderr or 0)


def test_a_candidate_does_not_differ_from_itself() -> None:
    part = ratio([-2.0, -5.0, -1.0], [4.0, 8.0, 3.0], BITS)
    assert paired_difference(part, part, "m") == (0.0, 0.0)


def test_paired_difference_needs_the_same_items() -> None:
    with pytest.raises(TaskError, match="same items"):
        paired_difference(scores(m=[1, 0]), scores(m=[1, 0, 1]), "m")


def test_influence_explains_the_error() -> None:
    part = ratio([-2.0, -5.0, -1.0], [4.0, 8.0, 3.0], BITS)
    value, influence = part.influence("m")
    assert value == part.score("m").value
    assert influence.mean() == pytest.approx(0, abs=1e-12)
    assert influence.std(ddof=1) / math.sqrt(3) == pytest.approx(part.score("m").stderr)


def test_taking_and_joining_are_inverse() -> None:
    whole = scores(acc=[1, 0, 1, 1, 0])
    parts = [whole.take([0, 1]), whole.take([2, 3, 4])]
    joined = concatenate(parts)
    assert joined.items == whole.items
    assert joined.score("acc") == whole.score("acc")
    with pytest.raises(TaskError, match="scored twice"):
        concatenate([parts[0], parts[0]])
    with pytest.raises(TaskError, match="different tasks"):
        concatenate([whole, scores("other", acc=[1])])


def test_archive_round_trip_gives_the_same_scores_and_bytes() -> None:
    before = {
        "t": ratio([-2.0, -5.0], [4.0, 8.0], BITS),
        "u": ItemScores("u", ("u:0",), {}, {"f1": True}, {}, {"f1": 0.5}),
        "v": scores("v", acc=[0.1, 1 / 3]),
    }
    buffer, again = io.BytesIO(), io.BytesIO()
    dump_scores(buffer, before)
    dump_scores(again, before)
    assert buffer.getvalue() == again.getvalue()
    buffer.seek(0)
    after = load_scores(buffer)
    assert list(after) == list(before)
    for name, part in before.items():
        assert after[name].items == part.items
        assert after[name].scores() == part.scores()
        assert after[name].higher_is_better == part.higher_is_better


def test_json_round_trip() -> None:
    table = score_table({"t": scores(acc=[1, 0]), "u": scores("u", acc=[1])})
    json = table_to_json(table)
    assert json["u"]["acc"] == {"value": 1.0, "stderr": None, "n": 1}
    assert table_from_json(json) == table


def test_bootstrap_sums_by_enumeration() -> None:
    """Rows 0, 1, 3 of one column: the 27 equally likely samples of three rows, and their sums."""
    expected = Counter(sum(rows) for rows in itertools.product([0.0, 1.0, 3.0], repeat=3))
    sums = bootstrap_sums(np.array([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]]), 20_000, np.random.default_rng(0))
    assert np.all(sums[:, 1] == 3)
    seen = Counter(sums[:, 0].tolist())
    assert set(seen) == set(expected)
    for total, count in expected.items():
        assert seen[total] / 20_000 == pytest.approx(count / 27, abs=0.015)


def test_bootstrap_sums_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(1).random((50, 3))
    whole = bootstrap_sums(columns, 40, np.random.default_rng(0))
    monkeypatch.setattr("evomerge.evaluation.scores._MAX_COUNTS", 300)
    np.testing.assert_allclose(bootstrap_sums(columns, 40, np.random.default_rng(0)), whole, rtol=1e-12)
