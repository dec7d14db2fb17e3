"""A training of the zoo that takes a second; a module of its own, which a process loads without transformers."""

from __future__ import annotations

from evomerge.zoo.models import TINY
from tools.zoo.sizes import Size, Training

SHORT = Size(
    prefix="tiny-",
    layers=1,
    hidden=16,
    feed_forward=16,
    base=(Training({"facts": 6, "reverse": 6}, 20, 4e-3),),
    experts={name.removeprefix("tiny-"): (Training({"facts": 2}, 2, 1e-3, seed=k),) for k, name in enumerate(TINY[1:])},
)
