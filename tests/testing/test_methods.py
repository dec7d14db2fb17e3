"""The checks of methods find what is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.methods.contract import Block, Method, Parameter, Settings, merge_method
from evomerge.methods.registry import METHODS
from evomerge.methods.shared_parameters import WEIGHT
from evomerge.testing.methods import check_method


@merge_method(WEIGHT, paper="Nobody 2026")
def weighted_sum(block: Block, settings: Settings) -> Tensor:
    """Base plus weighted deltas.

    More is not in the summary.
    """
    weights = settings.column("weight")
    return sum((w * d for w, d in zip(weights, block.deltas, strict=True)), torch.zeros_like(block.sources[0]))


def test_the_decorator_declares_what_the_function_says() -> None:
    assert isinstance(weighted_sum, Method)
    assert (weighted_sum.name, weighted_sum.summary) == ("weighted_sum", "Base plus weighted deltas.")
    assert (weighted_sum.parameters, weighted_sum.paper, weighted_sum.needs_base) == ((WEIGHT,), "Nobody 2026", True)


def doing(merge: Any) -> Method:
    return replace(weighted_sum, merge=merge)


def in_place(block: Block, settings: Settings) -> Tensor:
    return block.sources[0].mul_(2.0)


def by_block(block: Block, settings: Settings) -> Tensor:
    return block.sources[0] - block.sources[0].mean()


def first_alone(block: Block, settings: Settings) -> Tensor:
    return block.sources[0].clone()


def infinite(block: Block, settings: Settings) -> Tensor:
    return torch.full_like(block.sources[0], torch.inf)


def in_double(block: Block, settings: Settings) -> Tensor:
    return block.sources[0].double()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (doing(in_place), "blocks change it|writes into what it is given"),
        (doing(by_block), "blocks change it"),
        (doing(first_alone), "at weight 0 takes part|not close"),
        (doing(in_double), "makes torch.float64"),
        (replace(METHODS["linear"], merge=infinite), "is not finite"),
        (replace(weighted_sum, summary="no sentence"), "no sentence"),
        (replace(weighted_sum, name="Weighted sum"), "no name for a recipe"),
        (replace(weighted_sum, parameters=(replace(WEIGHT, low=0.0, default=-1.0),)), "not within its bounds"),
        (replace(weighted_sum, parameters=(WEIGHT, Parameter("k", kind="choice", help="K."))), "a choice has choices"),
    ],
)
def test_what_is_broken_is_said(method: Method, message: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_method(method)


def test_a_method_of_ours_keeps_it_all() -> None:
    check_method(weighted_sum)
    check_method(METHODS["frankenmerge"])
