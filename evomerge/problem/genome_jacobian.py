"""How every log-likelihood moves with a candidate's genes: what a search's steps are made from.

By the chain rule: from log-likelihoods, by one pass backward, to the directions in which the numbers in the recipe move
the weights, which are differences of merges; and from these numbers to the genes that set them.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from evomerge.engine.setting_derivatives import ParameterKey, ParameterRange, float_parameters
from evomerge.errors import CandidateError, RecipeError
from evomerge.evaluation.scores import ResponseJacobian
from evomerge.evaluation.splits import Selection
from evomerge.planning.plan import Plan
from evomerge.problem.model_runner import Runner
from evomerge.space.decode import LiteralRecipe, active_genes, decode_literally
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace

log = logging.getLogger(__name__)

COST = 5.0
"""What a Jacobian costs, in scores of the same items: measured in processor seconds on 135M models, four sources."""
SAMPLED_SHARE, SAMPLED_LEAST = 0.25, 32
"""Of a task's items, drawn anew for every candidate, and how many at least, where it has them: a step needs a
direction, which a part of them gives, and its candidate is scored on all."""

GeneFactors = Mapping[str, Mapping[ParameterKey, Mapping[str, float]]]
"""Output tensor -> number in its settings -> gene -> derivative of the number with respect to the gene."""


def sample_items(selection: Selection, seed: str) -> dict[str, tuple[int, ...]]:
    """Draws the items that a Jacobian is taken on.

    Args:
        selection: Task to items.
        seed: Names the draw.

    Returns:
        Task to indices into its selection, ascending.
    """
    drawn = {}
    for task, items in sorted(selection.items()):
        count = min(len(items), max(SAMPLED_LEAST, round(SAMPLED_SHARE * len(items))))
        drawn[task] = tuple(sorted(random.Random(f"{seed} {task}").sample(range(len(items)), count)))
    return drawn


def genes_of_settings(space: SearchSpace, genome: Genome, literal: LiteralRecipe, plan: Plan) -> GeneFactors:
    """Finds which genes set which numbers in the plan of a genome's literal recipe, and how."""
    active = active_genes(space, genome)
    free = {gene.name for gene in space.reals if gene.name in active and gene.low < gene.high}
    factors: dict[str, dict[ParameterKey, dict[str, float]]] = defaultdict(dict)
    for op in plan.operations:
        for key in float_parameters(op.settings):
            tensor = op.output if key[1] is None else op.sources[key[1]].tensor
            by_gene = literal.gene_gradient(op.slice_index, key, tensor, op.t)
            of_free = {gene: factor for gene, factor in by_gene.items() if gene in free}
            if of_free:
                factors[op.output][key] = of_free
    return factors


def genome_jacobian(
    space: SearchSpace, runner: Runner, selection: Selection, genome: Genome
) -> dict[str, ResponseJacobian]:
    """Differentiates log-likelihoods with respect to each real gene, in units of the genes' ranges.

    Args:
        space: The search space.
        runner: Plans and runs models.
        selection: Task to items.
        genome: The candidate's genes.

    Returns:
        By task, of those scored by log-likelihoods; empty where there are no derivatives: no active real genes, or a
        model that has none.
    """
    try:
        literal = decode_literally(space, genome)
        plan = runner.plan(literal.recipe)
        factors = genes_of_settings(space, genome, literal, plan)
        work = [(op, _ranges(space, factors[op.output])) for op in plan.operations if op.output in factors]
        if not work:
            return {}
        by_setting, settings = runner.jacobian(plan, work, selection)
    except (CandidateError, RecipeError) as error:
        log.warning("no derivatives: %s", error)
        return {}
    width = space.high - space.low
    positions = {gene.name: k for k, gene in enumerate(space.reals)}
    by_gene = np.zeros((len(settings), len(positions)))
    for row, (output, key) in enumerate(settings):
        for gene, factor in factors[output][key].items():
            by_gene[row, positions[gene]] = factor * width[positions[gene]]
    return {task: replace(part, derivatives=part.derivatives @ by_gene) for task, part in by_setting.items()}


def _ranges(space: SearchSpace, by_key: Mapping[ParameterKey, Mapping[str, Any]]) -> dict[ParameterKey, ParameterRange]:
    """The range of each number: where all its genes may be."""
    ranges = {gene.name: (gene.low, gene.high) for gene in space.reals}
    return {
        key: (max(ranges[gene][0] for gene in genes), min(ranges[gene][1] for gene in genes))
        for key, genes in by_key.items()
    }
