"""A genome is canonical, hashable, and survives JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.space.genome import Genome, LayerGene

scalars = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.one_of(st.floats(-10, 10, allow_nan=False), st.integers(-5, 5), st.sampled_from(["ties", "dare"])),
    max_size=6,
)
layers = st.lists(
    st.builds(LayerGene, st.sampled_from(["a", "b"]), st.integers(0, 40), st.floats(0.5, 1.5)), max_size=6
)


@given(scalars, layers)
def test_json_round_trip_gives_the_same_genome(values: dict[str, float | int | str], genes: list[LayerGene]) -> None:
    genome = Genome.of(values, genes)
    again = Genome.from_json(json.loads(json.dumps(genome.to_json())))
    assert again == genome
    assert hash(again) == hash(genome)


def test_floats_are_rounded_to_four_decimals_and_zero_has_no_sign() -> None:
    genome = Genome.of({"b": 0.123449, "a": -0.00001}, [LayerGene("x", 3, 0.99999)])
    assert genome.scalars == (("a", 0.0), ("b", 0.1234))
    assert str(genome.values["a"]) == "0.0"
    assert genome.layers == (LayerGene("x", 3, 1.0),)


def test_a_genome_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Genome.of({"a": 1.0}).scalars = ()  # type: ignore[misc]
