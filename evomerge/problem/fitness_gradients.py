"""How the fitness of a candidate changes with its genes: the slopes that a search may climb along.

By the chain rule: from the fitness to the items' log-likelihoods, by one pass backward to the model's weights, from
there to the numbers in the recipe by differences of merges, and from these to the genes that set them. The pass is over
a sample of the items: a step needs a direction, which a few of them give, and its candidate is scored on all.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.parameter_gradients import ParameterKey, ParameterRange, float_parameters, parameter_gradients
from evomerge.errors import CandidateError, RecipeError
from evomerge.evaluation.splits import Selection
from evomerge.objective.fitness import Fitness, Scores
from evomerge.planning.operation import Operation
from evomerge.planning.plan import Plan
from evomerge.problem.problem import Workbench
from evomerge.space.decode import LiteralRecipe, active_genes, decode_literally
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace

log = logging.getLogger(__name__)

COST = 5.0
"""What slopes cost, in scores of the same items: about 4 for the pass forward and backward, the rest for the merges.

Measured in processor seconds on 135M models in bfloat16."""

SHARE = 0.25
"""Of a task's items, drawn anew for every candidate; bench/results/search.md says why so few."""
LEAST = 16
"""Items of a task, where it has them."""

Effects = Mapping[str, Mapping[ParameterKey, Mapping[str, float]]]
"""Output tensor -> number in its settings -> gene -> derivative of the number with respect to the gene."""


def genes_of_settings(space: SearchSpace, genome: Genome, literal: LiteralRecipe, plan: Plan) -> Effects:
    """Finds which genes set which numbers in the plan of a genome's literal recipe, and how."""
    active = active_genes(space, genome)
    free = {gene.name for gene in space.reals if gene.name in active and gene.low < gene.high}
    effects: dict[str, dict[ParameterKey, dict[str, float]]] = defaultdict(dict)
    for op in plan.operations:
        for entry in float_parameters(op.settings):
            tensor = op.output if entry[1] is None else op.sources[entry[1]].tensor
            factors = literal.gene_gradient(op.slice_index, entry, tensor, op.t)
            by_gene = {gene: factor for gene, factor in factors.items() if gene in free}
            if by_gene:
                effects[op.output][entry] = by_gene
    return effects


def sample(selection: Selection, seed: str) -> dict[str, tuple[int, ...]]:
    """Draws the items that slopes are taken on.

    Args:
        selection: Task to items.
        seed: Names the draw.

    Returns:
        Task to places in its selection, ascending.
    """
    drawn = {}
    for task, items in sorted(selection.items()):
        count = min(len(items), max(LEAST, round(SHARE * len(items))))
        drawn[task] = tuple(sorted(random.Random(f"{seed} {task}").sample(range(len(items)), count)))
    return drawn


def fitness_slopes(
    bench: Workbench,
    fitness: Fitness,
    selection: Selection,
    genome: Genome,
    scores: Scores,
    places: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, float] | None:
    """The derivative of the fitness with respect to each active real gene, by name, in units of the gene.

    Args:
        bench: Models and tasks.
        fitness: What steers.
        selection: The items that steer.
        genome: The candidate's genes.
        scores: Its scores on the selection.
        places: Task to places in the selection: items that stand for all of their task. None for all items.

    Returns:
        None where there is none: no active real genes, no metric that changes smoothly, or a model that has no
        gradient.
    """
    pulls = _smooth(bench, fitness.score_gradients(scores))
    if not pulls:
        return None
    if places is not None:
        pulls = {
            task: {metric: pull[list(places[task])] * (len(pull) / len(places[task])) for metric, pull in row.items()}
            for task, row in pulls.items()
        }
        selection = {task: tuple(selection[task][place] for place in places[task]) for task in pulls}
    try:
        literal = decode_literally(bench.space, genome)
        plan = bench.plan(literal.recipe)
        effects = genes_of_settings(bench.space, genome, literal, plan)
        work = [(op, _bounds(bench, effects[op.output])) for op in plan.operations if op.output in effects]
        found = _of_settings(bench, plan, selection, pulls, work)
    except (CandidateError, RecipeError) as error:
        log.warning("no slopes: %s", error)
        return None
    if found is None:
        return None
    total = {gene: 0.0 for by_entry in effects.values() for by_gene in by_entry.values() for gene in by_gene}
    for output in sorted(found):
        for entry, slope in found[output].items():
            for gene, factor in effects[output][entry].items():
                total[gene] += slope * factor
    return dict(sorted(total.items()))


def _of_settings(
    bench: Workbench,
    plan: Plan,
    selection: Selection,
    pulls: Mapping[str, Mapping[str, NDArray[np.float64]]],
    work: Sequence[tuple[Operation, Mapping[ParameterKey, ParameterRange]]],
) -> dict[str, dict[ParameterKey, float]] | None:
    """The derivative of the fitness with respect to the numbers in the plan's settings."""
    if not work:
        return None
    model, _ = bench.resident.write(plan)
    parameters = {name for name, _ in model.named_parameters()}
    if not parameters <= {op.output for op in plan.operations}:
        log.warning("no slopes: the parameters of %s are not the tensors of its checkpoints", type(model).__name__)
        return None
    names = [op.output for op, _ in work if op.output in parameters]
    gradient = bench.evaluator.weight_gradient(model, selection, pulls, names)
    return None if gradient is None else parameter_gradients(work, gradient, bench.resident.store, plan.family)


def _smooth(
    bench: Workbench, pulls: Mapping[str, Mapping[str, NDArray[np.float64]]]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Without the metrics that jump between right and wrong: they change nowhere else."""
    kept = {
        task: {metric: pull for metric, pull in row.items() if bench.tasks[task].smooth_metric(metric) == metric}
        for task, row in pulls.items()
    }
    return {task: row for task, row in kept.items() if row}


def _bounds(
    bench: Workbench, by_entry: Mapping[ParameterKey, Mapping[str, float]]
) -> dict[ParameterKey, ParameterRange]:
    """The range of each number: where all its genes may be."""
    ranges = {gene.name: (gene.low, gene.high) for gene in bench.space.reals}
    return {
        entry: (max(ranges[gene][0] for gene in genes), min(ranges[gene][1] for gene in genes))
        for entry, genes in by_entry.items()
    }
