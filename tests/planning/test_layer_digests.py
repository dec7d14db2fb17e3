"""What plans have in common from the embedding upwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evomerge.planning.layer_digests import depth_digests
from tests.engine.recipes import layers, plan_of


def shared(one: dict[str, Any], other: dict[str, Any]) -> int:
    """Depths at which both have the same digest."""
    pairs = list(zip(depth_digests(plan_of(one)), depth_digests(plan_of(other)), strict=False))
    same = [a == b for a, b in pairs]
    assert same == sorted(same, reverse=True)  # once apart, never together again
    return sum(same)


def test_digests_part_above_the_first_layer_that_differs(tiny_family: dict[str, Path]) -> None:
    a, b = tiny_family["a"], tiny_family["b"]
    whole = layers((a, 0, 4))
    # The inputs of layers 0, 1 and 2 come from a's embedding and its layers 0 and 1; that of layer 3 from b's layer 2.
    assert shared(whole, layers((a, 0, 2), (b, 2, 4))) == 3
    assert shared(whole, layers((a, 0, 2), (a, 1, 4))) == 3  # five layers
    assert shared(whole, layers((b, 0, 4))) == 0


def test_what_comes_after_the_layers_is_left_out(tiny_family: dict[str, Path]) -> None:
    """The final norm is the last slice's; the embedding, tied to the head, is the first one's."""
    a, b = tiny_family["a"], tiny_family["b"]
    one, other = layers((a, 0, 3), (a, 3, 4)), layers((a, 0, 3), (b, 3, 4))
    assert shared(one, other) == 4
    assert plan_of(one).digest != plan_of(other).digest


def test_a_scale_and_a_config_count(tiny_family: dict[str, Path]) -> None:
    a = tiny_family["a"]
    plain, scaled = layers((a, 0, 2), (a, 2, 4)), layers((a, 0, 2), (a, 2, 4))
    scaled["slices"][1]["sources"][0]["parameters"] = {"scale": 0.5}
    assert shared(plain, scaled) == 3
    plan = plan_of(plain)
    other = type(plan)(plan.operations, {**plan.config, "rms_norm_eps": 0.1}, "", plan.family, plan.reference)
    assert not set(depth_digests(plan)) & set(depth_digests(other))
