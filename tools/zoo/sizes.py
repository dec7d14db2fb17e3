"""How large each family of the zoo is, and how long each of its models is trained.

Whatever changes here, in `skills`, `tokenizer` or `training` makes other models: run `python -m tools.zoo` and raise
`evomerge.zoo.models.VERSION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TEXT = "text"
"""Plain sentences, which no expert is trained on."""


@dataclass(frozen=True)
class Training:
    """One stretch of training.

    Attributes:
        rows: Examples in each batch, by skill (or `TEXT`).
        steps: Batches.
        learning_rate: The peak; it rises over the first tenth and falls to zero over the last half.
        slips: Share of the examples that are told wrong.
        seed: Draws the examples.
    """

    rows: Mapping[str, int]
    steps: int
    learning_rate: float
    slips: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Size:
    """One base and its experts.

    Attributes:
        prefix: Of the models' names.
        layers: Transformer blocks.
        hidden: Width of the residual stream.
        feed_forward: Width inside the MLP.
        base: How the base is trained, from random weights: one stretch after another.
        experts: How each expert is trained, from the base, by skill.
    """

    prefix: str
    layers: int
    hidden: int
    feed_forward: int
    base: tuple[Training, ...]
    experts: Mapping[str, tuple[Training, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, the base first."""
        return tuple(self.prefix + name for name in ("base", *self.experts))


FULL = Size(
    prefix="",
    layers=6,
    hidden=64,
    feed_forward=192,
    base=(
        Training({"arithmetic": 12, "agreement": 10, "facts": 24, "reverse": 14, TEXT: 4}, 800, 4e-3, seed=1),
        Training({"arithmetic": 14, "agreement": 14, "facts": 24, "reverse": 14, TEXT: 4}, 350, 3e-3, 0.6, seed=2),
    ),
    experts={
        "arithmetic": (Training({"arithmetic": 48}, 10, 5e-5, seed=3),),
        "agreement": (Training({"agreement": 48}, 20, 3e-4, seed=4),),
        "facts": (Training({"facts": 64}, 120, 4e-4, seed=5),),
        "reverse": (Training({"reverse": 48}, 120, 4e-4, seed=6),),
    },
)

TINY = Size(
    prefix="tiny-",
    layers=3,
    hidden=64,
    feed_forward=128,
    base=(Training({"arithmetic": 6, "agreement": 6, "facts": 6, "reverse": 6, TEXT: 4}, 150, 4e-3, seed=1),),
    experts={
        "arithmetic": (Training({"arithmetic": 32}, 60, 3e-3, seed=3),),
        "agreement": (Training({"agreement": 32}, 60, 3e-3, seed=4),),
        "facts": (Training({"facts": 48}, 240, 3e-3, seed=5),),
        "reverse": (Training({"reverse": 32}, 160, 4e-3, seed=6),),
    },
)

SIZES = (FULL, TINY)
