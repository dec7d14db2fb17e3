"""Sources that know nothing: sizes of their differences from the base stay, tensor by tensor; their places do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.checkpoints.checkpoint import open_checkpoints
from evomerge.errors import SpecError
from evomerge.problem.problem import open_problem
from evomerge.problem.shuffled_sources import shuffled
from evomerge.spec.load import parse_spec
from tests.frame import search_spec


def test_only_places_change(tiny_family: dict[str, Path]) -> None:
    base, source = str(tiny_family["base"]), str(tiny_family["a"])
    opened = open_checkpoints([base, source])
    changed = shuffled(opened, base, seed=3)
    assert changed[base] is opened[base]
    moved = 0
    for name in opened[source].tensors:
        origin = opened[base].tensor(name).float()
        before, after = (one[source].tensor(name).float() - origin for one in (opened, changed))
        assert torch.allclose(before.flatten().sort().values, after.flatten().sort().values, atol=1e-6), name
        moved += not torch.equal(before, after)
    assert moved > 1


def test_another_seed_is_another_model(tiny_family: dict[str, Path]) -> None:
    base, source = str(tiny_family["base"]), str(tiny_family["a"])
    opened = open_checkpoints([base, source])
    one, same, other = (shuffled(opened, base, seed)[source] for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, opened[source].fingerprint}) == 3
    largest = max(one.tensors, key=lambda name: one.tensor(name).numel())
    assert torch.equal(one.tensor(largest), same.tensor(largest))
    assert not torch.equal(one.tensor(largest), other.tensor(largest))


def test_a_search_says_so_and_needs_a_base(tiny_family: dict[str, Path]) -> None:
    spec = search_spec(tiny_family)
    spec["models"]["shuffled"] = True
    problem, plain = open_problem(parse_spec(spec)), open_problem(parse_spec(search_spec(tiny_family)))
    for reference, one in plain.checkpoints.items():
        changed = problem.checkpoints[reference].fingerprint != one.fingerprint
        assert changed == (reference != problem.spec.models.base)
    del spec["models"]["base"]
    with pytest.raises(SpecError, match=r"models.*shuffled.*base"):
        parse_spec(spec)
