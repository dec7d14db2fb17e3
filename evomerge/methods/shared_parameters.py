"""Parameters that several methods have in common: declared once, so that they mean the same everywhere.

A default is mergekit's; a method whose paper or mergekit counterpart differs uses `dataclasses.replace`.
"""

from __future__ import annotations

from dataclasses import replace

from evomerge.methods.contract import Parameter

WEIGHT = Parameter(
    "weight",
    per_source=True,
    required=True,
    gene=(0.0, 1.5),
    paper=1.0,
    takes_part=True,
    only_ratios="normalize",
    help="Share of the source; a source at weight 0 takes no part.",
)
DENSITY = Parameter(
    "density",
    default=1.0,
    per_source=True,
    low=0.0,
    high=1.0,
    gene=(0.05, 1.0),
    help="Fraction of each delta that is kept.",
)
DROP_RATE = Parameter(
    "drop_rate",
    per_source=True,
    low=0.0,
    high=1.0,
    instead_of="density",
    help="Probability to drop an element of a delta: 1 - density.",
)
SHARE = replace(
    WEIGHT, default=1.0, required=False, only_ratios=True, help="Share of the source, relative to the others."
)
OUR_WEIGHT = "counts here; mergekit's method of this name passes it over"
LAMBDA = Parameter("lambda", default=1.0, gene=(0.3, 2.0), help="Factor on the merged delta.")
NORMALIZE = Parameter("normalize", default=True, kind="bool", help="Divide by the sum of the weights.")
RESCALE = Parameter("rescale", default=True, kind="bool", help="Divide what is kept by the density.")
RESCALE_TO_MASS = Parameter(
    "rescale",
    default=False,
    kind="bool",
    help="Scale what is kept of a delta up to the sum of magnitudes that the delta had.",
)
INT8_MASK = Parameter("int8_mask", default=False, kind="bool", help="Accepted for mergekit's sake; no effect.")
SCOPE = Parameter(
    "scope",
    default="tensor",
    kind="choice",
    choices=("tensor", "model"),
    help="What is measured: each tensor, or the flattened whole model.",
)
SPECTRAL = Parameter(
    "spectral",
    default=True,
    kind="bool",
    help="Work on the singular vectors of matrices; false averages them, as everything else is.",
)
