"""Frankenmerge (mergekit's passthrough): stack copies of layers, each from the model and the position asked for.

A practice of the community without a paper of its own; Kim et al. 2023 (SOLAR), https://arxiv.org/abs/2312.15166,
describe the case of one model, Akiba et al. 2024, https://arxiv.org/abs/2403.13187, section 3.2, the search over it.

Nothing is merged here: the engine copies the layers that a recipe's slices, or its pattern, name.
"""

from __future__ import annotations

from evomerge.methods.contract import Method, Parameter

METHOD = Method(
    name="frankenmerge",
    paper="Kim et al. 2023, SOLAR, https://arxiv.org/abs/2312.15166; "
    "Akiba et al. 2024, https://arxiv.org/abs/2403.13187",
    summary="Stack copies of layers from several models.",
    parameters=(
        Parameter("pattern", kind="text", help="Model of each output layer, ABBA; a short pattern cycles."),
        Parameter(
            "scale",
            default=1.0,
            per_source=True,
            gene=(0.5, 1.5),
            help="Factor on every tensor of the slice.",
        ),
        Parameter(
            "residual_scale",
            default=1.0,
            per_source=True,
            gene=(0.5, 1.5),
            help="Factor on what a block last writes to the residual stream.",
        ),
        Parameter(
            "seed", kind="int", low=0, help="Seed of the random pattern, when neither slices nor pattern is given."
        ),
    ),
    merge=None,
    needs_base=False,
    copies_layers=True,
    order_matters=True,
    aliases=("passthrough",),
)
