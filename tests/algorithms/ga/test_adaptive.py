"""What the record says about operators: counted by hand on a few candidates."""

from dataclasses import replace

import numpy as np
import pytest

from evomerge.algorithms.ga.adaptive import BOUNDS, CAUTION, Experience, operators_of, pick
from evomerge.algorithms.operators import LARGEST, SMALLEST, step_size
from evomerge.study.candidate import Candidate
from tests.algorithms.landscapes import make_space

SPACE = make_space(methods=("task_arithmetic",))


def candidate(
    number: int, fitness: float, parents: tuple[int, ...], operator: str, unit: float = 0.5, **more
) -> Candidate:
    genome = SPACE.genome(np.full(len(SPACE.reals), unit))
    generation = 1 if parents else 0
    return Candidate(
        number, generation, genome, {}, str(number), parents, operator, **{"state": "done", "fitness": fitness, **more}
    )


HISTORY = [
    candidate(0, 0.5, (), "parent:base"),
    candidate(1, 0.6, (), "parent:math"),
    candidate(2, 0.7, (0, 1), "line + mutation: whole model"),  # better than both
    candidate(3, 0.55, (0, 1), "line"),  # better than one of them only
    candidate(4, 0.8, (2,), "mutation: all genes", unit=0.6),  # better, by a step of 0.1 in every gene
    candidate(5, 0.9, (4,), "centroid of 3", state="pruned"),  # an estimate is no success
    candidate(6, None, (4,), "centroid of 5", state="failed"),
]


def test_operators_of_reads_what_the_lineage_shows():
    assert list(operators_of("centroid of 12 + mutation: method, whole model")) == ["centroid", "method", "whole model"]
    assert list(operators_of("quasi-Newton gradient")) == ["gradient"]


def test_successes_and_uses_are_counted():
    found = Experience.of(SPACE, HISTORY)
    assert found.uses == {"line": (1, 2), "whole model": (1, 1), "all genes": (1, 1), "centroid": (0, 2)}
    assert found.steps == pytest.approx((0.1,), abs=1e-3)


def test_favour_is_the_rate_over_the_rate_of_all():
    # 3 of 6 uses succeeded: rate (3 + 1) / (6 + CAUTION); `line` is (1 + CAUTION rate) / (2 + CAUTION) over it.
    rate = 4 / (6 + CAUTION)
    assert Experience.of(SPACE, HISTORY).favour("line") == pytest.approx((1 + CAUTION * rate) / (2 + CAUTION) / rate)
    assert Experience.of(SPACE, HISTORY).favour("never used") == pytest.approx(1.0)
    assert Experience.of(SPACE, []).favour("line") == pytest.approx(1.0)


def test_favour_keeps_within_its_bounds():
    won = Experience({"good": (500, 500), "bad": (0, 500)})
    assert BOUNDS[0] <= won.favour("bad") < 1 < won.favour("good") <= BOUNDS[1]
    assert Experience({"good": (99, 99), "bad": (0, 9000)}).favour("good") == BOUNDS[1]


def test_pick_follows_weights_and_experience():
    rng = np.random.default_rng(0)
    drawn = [pick(rng, {"a": 3.0, "b": 1.0}, None) for _ in range(4000)]
    assert drawn.count("a") / 4000 == pytest.approx(0.75, abs=0.03)
    skilled = Experience({"a": (0, 200), "b": (100, 200)})
    drawn = [pick(rng, {"a": 3.0, "b": 1.0}, skilled) for _ in range(4000)]
    wanted = 3 * skilled.favour("a") / (3 * skilled.favour("a") + skilled.favour("b"))
    assert drawn.count("a") / 4000 == pytest.approx(wanted, abs=0.03)
    assert wanted < 0.5


def test_old_candidates_are_forgotten():
    later = [replace(HISTORY[3], number=n) for n in range(7, 7 + 256)]
    assert Experience.of(SPACE, [*HISTORY, *later]).uses == {"line": (0, 256)}


def test_steps_stay_within_bounds_and_near_what_served():
    rng = np.random.default_rng(1)
    free = [step_size(rng) for _ in range(500)]
    taught = [step_size(rng, (0.2,)) for _ in range(500)]
    assert all(SMALLEST <= s <= LARGEST for s in [*free, *taught])
    assert np.median(free) < 0.08 < 0.12 < np.median(taught)
