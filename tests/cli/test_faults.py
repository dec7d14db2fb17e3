"""Commands over damaged files: a small sample of what `bench/faults.py` tries for an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import COMMANDS, DAMAGES, QUICK, World


@pytest.fixture(scope="module")
def world(tiny_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"), tiny_family)


@given(data=st.data(), damage=st.sampled_from(sorted(DAMAGES)), seed=st.integers(0, 2**32))
@settings(max_examples=max(8, settings().max_examples // 8), suppress_health_check=list(HealthCheck))
def test_a_result_or_a_refusal_that_names_the_file(world: World, data: st.DataObject, damage: str, seed: int) -> None:
    command = data.draw(st.sampled_from(QUICK))
    attempt = world.attempt(command, data.draw(st.sampled_from(world.files(command))), damage, seed)
    assert not attempt.broken, attempt


def test_every_command_reads_files_that_are_there(world: World) -> None:
    assert all(world.files(command) for command in COMMANDS)
