"""Which row goes where: mergekit's rules, by hand and against a slow reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.checkpoints.header import TensorInfo
from evomerge.errors import RecipeError
from evomerge.planning.vocabulary.aligned_weights import AlignedWeights
from evomerge.planning.vocabulary.row_maps import Vocabularies, map_rows
from evomerge.recipe import ModelToken, TokenRule, ZeroToken

TOKENS = {"a": 0, "b": 1, "c": 2, "d": 4}  # 3 is a gap
HELD = Vocabularies(
    {"A": {"a": 0, "b": 1}, "B": {"b": 0, "c": 1}, "C": {"c": 2, "b": 1, "z": 0}}, dict.fromkeys("ABC", 3), "A"
)


def test_rows_by_hand() -> None:
    """a is A's alone; b everybody's; c is in B and C but not in the base A, so A gets their mean; d is nobody's."""
    maps = map_rows(TOKENS, 6, HELD)
    assert {model: own.tolist() for model, own in maps.own.items()} == {
        "A": [0, 1, -1, -1, -1, -1],
        "B": [-1, 0, 1, -1, -1, -1],
        "C": [-1, 1, 2, -1, -1, -1],
    }
    assert maps.defaults == {0: (("A", 0),), 2: (("B", 1), ("C", 2)), 4: ()}
    assert maps.blank.tolist() == [3, 5]
    assert maps.unknown == ("d",)


def test_the_base_stands_in_before_the_mean() -> None:
    held = Vocabularies({"A": {}, "B": {"x": 0}, "C": {"x": 1}}, dict.fromkeys("ABC", 3), "C")
    assert map_rows({"x": 0}, 1, held).defaults == {0: (("C", 1),)}


def test_a_token_beyond_the_rows_is_none() -> None:
    held = Vocabularies({"A": {"x": 0}, "B": {"x": 3}}, dict.fromkeys("AB", 3), None)
    assert map_rows({"x": 0}, 1, held).own["B"].tolist() == [-1]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (TokenRule("B"), (("B", 1),)),
        (TokenRule(ZeroToken()), ()),
        (TokenRule(ModelToken("C", token="b")), (("C", 1),)),
        (TokenRule(ModelToken("A", token_id=2)), (("A", 2),)),
        (TokenRule(None), (("B", 1), ("C", 2))),
    ],
)
def test_rules(rule: TokenRule, expected: Any) -> None:
    maps = map_rows(TOKENS, 5, HELD, {"c": rule})
    assert maps.defaults[2] == expected
    assert maps.own["B"][2] == 1


def test_a_forced_rule_counts_in_every_model() -> None:
    maps = map_rows(TOKENS, 5, HELD, {"b": TokenRule(ModelToken("C", token="z"), force=True)})
    assert [own[1] for own in maps.own.values()] == [-1, -1, -1]
    assert maps.defaults[1] == (("C", 0),)


def test_rules_that_lead_nowhere() -> None:
    rules = {
        "a": TokenRule("B"),
        "b": TokenRule(ModelToken("A", token_id=3), force=True),
        "c": TokenRule("X"),
        "d": TokenRule(ModelToken("A", token="zz")),
    }
    with pytest.raises(RecipeError) as error:
        map_rows(TOKENS, 5, HELD, rules)
    assert error.value.problems == (
        "tokenizer.tokens.a.source: B has no token 'a'",
        "tokenizer.tokens.b.source: A has 3 rows, there is no token_id 3",
        "tokenizer.tokens.c.source: X is not among the merged models: A, B, C",
        "tokenizer.tokens.d.source: A has no token 'zz'",
    )


class Held:
    """Tensors in memory, behind the interface of weights."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], print_: str = "print") -> None:
        self._tensors, self._print = tensors, print_
        names = {torch.float32: "F32", torch.bfloat16: "BF16"}
        self.tensors = {n: TensorInfo(n, tuple(t.shape), names[t.dtype]) for n, t in tensors.items()}
        self.files = (Path(print_),)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        assert name in self._tensors

    def fingerprint(self, *, anew: bool = False) -> str:
        return self._print


vocabularies = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)


@given(st.lists(vocabularies, min_size=1, max_size=4), vocabularies, st.integers(0, 3), st.booleans(), st.data())
def test_rows_against_a_reference(
    lists: list[list[str]], output: list[str], padding: int, with_base: bool, data: st.DataObject
) -> None:
    """Every model's table, token by token, in float64: own row; else the only one; else the base's; else the mean."""
    seed = data.draw(st.integers(0, 99))
    generator = np.random.default_rng(seed)
    tokens = {f"m{i}": {t: row for row, t in enumerate(words)} for i, words in enumerate(lists)}
    tables = {m: generator.normal(size=(len(words), 3)).astype(np.float32) for m, words in tokens.items()}
    base = "m0" if with_base else None
    held = Vocabularies(tokens, {m: len(words) for m, words in tokens.items()}, base)
    wanted = {t: row for row, t in enumerate(output)}
    maps = map_rows(wanted, len(output) + padding, held)
    weights = {m: Held({"e": torch.from_numpy(table)}) for m, table in tables.items()}
    for model in tokens:
        found = AlignedWeights(model, weights, ("e",), maps, exact=False).read("e").numpy()
        expected = []
        for token in output:
            having = [m for m in tokens if token in tokens[m]]
            if model in having:
                having = [model]
            elif base in having:
                having = [base]
            rows = [tables[m][tokens[m][token]].astype(np.float64) for m in having]
            expected.append(np.mean(rows, axis=0) if rows else np.zeros(3))
        expected += [np.mean(expected[: len(output)], axis=0)] * padding
        np.testing.assert_allclose(found, np.array(expected), rtol=1e-6, atol=1e-7)


def test_computed_rows_are_rounded_once() -> None:
    """A mean of bfloat16 rows stays in float32 when the recipe says what the output is; copies keep their dtype."""
    weights = {
        m: Held({"e": torch.tensor([[value]], dtype=torch.bfloat16)}) for m, value in (("B", 1.0), ("C", 1.0078125))
    }
    weights["A"] = Held({"e": torch.zeros(1, 1, dtype=torch.bfloat16)})
    held = Vocabularies({"A": {}, "B": {"x": 0}, "C": {"x": 0}}, dict.fromkeys("ABC", 1), None)
    maps = map_rows({"x": 0}, 1, held)
    exact = AlignedWeights("A", weights, ("e",), maps, exact=True)
    assert exact.tensors["e"].dtype == "F32"
    assert exact.read("e").item() == 1.00390625  # (1 + (1 + 2**-7)) / 2, between two bfloat16 numbers
    rounded = AlignedWeights("A", weights, ("e",), maps, exact=False)
    assert rounded.tensors["e"].dtype == "BF16"
    assert rounded.read("e").item() == 1.0  # to the even neighbour
    assert AlignedWeights("B", weights, ("e",), maps, exact=True).tensors["e"].dtype == "BF16"


def test_the_fingerprint_covers_rows_and_donors() -> None:
    """The same model under another map, or with another donor, is another model; under the same ones it is the same."""
    table = torch.arange(6.0).view(2, 3)
    held = Vocabularies({"A": {"x": 0}, "B": {"x": 1, "y": 0}}, dict.fromkeys("AB", 2), None)

    def print_of(tokens: dict[str, int], donor: str = "b") -> str:
        weights = {"A": Held({"e": table}, "a"), "B": Held({"e": table}, donor)}
        return AlignedWeights("A", weights, ("e",), map_rows(tokens, 2, held), exact=False).fingerprint()

    prints = [print_of({"x": 0, "y": 1}), print_of({"y": 0, "x": 1}), print_of({"x": 0, "y": 1}, "other")]
    assert len(set(prints)) == 3
    assert prints[0] == print_of({"x": 0, "y": 1})


def test_rows_that_stay_are_the_stored_ones() -> None:
    """No copy is made of a table that is only cut, nor of any other tensor."""
    weights = {"A": Held({"e": torch.arange(6.0).view(3, 2), "q": torch.ones(2)})}
    held = Vocabularies({"A": {"x": 0, "y": 1, "z": 2}}, {"A": 3}, None)
    cut = AlignedWeights("A", weights, ("e",), map_rows({"x": 0, "y": 1}, 2, held), exact=True)
    assert cut.read("e").data_ptr() == weights["A"].read("e").data_ptr()
    assert cut.read("q") is weights["A"].read("q")
    assert cut.tensors["e"].shape == (2, 2)
    assert cut.files == weights["A"].files
