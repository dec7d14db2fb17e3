"""How the fitness of a candidate changes with its genes: the gradient that a search may step along.

By the chain rule: from the fitness to the items' log-likelihoods, by one pass backward to the model's weights, from
there to the numbers in the recipe by differences of merges, and from these to the genes that set them. The pass is over
a sample of the items: a step needs a direction, which a few of them give, and its candidate is scored on all.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from evomerge.engine.parameter_gradients import ParameterKey, ParameterRange, float_parameters
from evomerge.errors import CandidateError, RecipeError
from evomerge.evaluation.splits import Selection
from evomerge.evaluation.tasks.task import Task
from evomerge.objective.fitness import Fitness, Scores
from evomerge.planning.plan import Plan
from evomerge.problem.model_runner import Runner
from evomerge.space.decode import LiteralRecipe, active_genes, decode_literally
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.system.arrays import FloatArray

log = logging.getLogger(__name__)

COST = 5.0
"""What a gradient costs, in scores of the same items: about 4 for the pass forward and backward, the rest for the
merges. Measured in processor seconds on 135M models in bfloat16."""

SAMPLED_SHARE = 0.25
"""Of a task's items, drawn anew for every candidate; bench/results/search.md says why so few."""
SAMPLED_LEAST = 16
"""Items of a task, where it has them."""

GeneFactors = Mapping[str, Mapping[ParameterKey, Mapping[str, float]]]
"""Output tensor -> number in its settings -> gene -> derivative of the number with respect to the gene."""


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


def sample_items(selection: Selection, seed: str) -> dict[str, tuple[int, ...]]:
    """Draws the items that a gradient is taken on.

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


def fitness_gradients(
    space: SearchSpace,
    runner: Runner,
    tasks: Mapping[str, Task],
    fitness: Fitness,
    selection: Selection,
    genome: Genome,
    scores: Scores,
    sample: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, float] | None:
    """Differentiates the fitness with respect to each active real gene.

    Args:
        space: The search space.
        runner: Plans and runs models.
        tasks: The tasks by name.
        fitness: What steers.
        selection: The items that steer.
        genome: The candidate's genes.
        scores: Its scores on the selection.
        sample: Task to indices into the selection: items that stand for all of their task. None for all items.

    Returns:
        Derivative by name of gene, in units of the gene. None where there is none: no active real genes, no metric that
        changes smoothly, or a model that has no gradient.
    """
    numerators = _smooth(tasks, fitness.score_gradients(scores))
    if not numerators:
        return None
    if sample is not None:
        numerators = {
            task: {metric: d[list(sample[task])] * (len(d) / len(sample[task])) for metric, d in row.items()}
            for task, row in numerators.items()
        }
        selection = {task: tuple(selection[task][k] for k in sample[task]) for task in numerators}
    try:
        literal = decode_literally(space, genome)
        plan = runner.plan(literal.recipe)
        factors = genes_of_settings(space, genome, literal, plan)
        of_settings = _setting_gradients(space, runner, plan, factors, selection, numerators)
    except (CandidateError, RecipeError) as error:
        log.warning("no gradients: %s", error)
        return None
    if of_settings is None:
        return None
    total = {gene: 0.0 for by_key in factors.values() for by_gene in by_key.values() for gene in by_gene}
    for output in sorted(of_settings):
        for key, derivative in of_settings[output].items():
            for gene, factor in factors[output][key].items():
                total[gene] += derivative * factor
    return dict(sorted(total.items()))


def _setting_gradients(
    space: SearchSpace,
    runner: Runner,
    plan: Plan,
    factors: GeneFactors,
    selection: Selection,
    numerators: Mapping[str, Mapping[str, FloatArray]],
) -> dict[str, dict[ParameterKey, float]] | None:
    """The derivative of the fitness with respect to the numbers in the plan's settings."""
    ranges = [(op, _ranges(space, factors[op.output])) for op in plan.operations if op.output in factors]
    if not ranges:
        return None
    gradients = runner.weight_gradients(plan, selection, numerators, [op.output for op, _ in ranges])
    return None if gradients is None else runner.parameter_gradients(plan, ranges, gradients)


def _smooth(
    tasks: Mapping[str, Task], numerators: Mapping[str, Mapping[str, FloatArray]]
) -> dict[str, dict[str, FloatArray]]:
    """Without the metrics that jump between right and wrong: they change nowhere else."""
    kept = {
        task: {metric: derivative for metric, derivative in row.items() if tasks[task].smooth_metric(metric) == metric}
        for task, row in numerators.items()
    }
    return {task: row for task, row in kept.items() if row}


def _ranges(
    space: SearchSpace, by_key: Mapping[ParameterKey, Mapping[str, float]]
) -> dict[ParameterKey, ParameterRange]:
    """The range of each number: where all its genes may be."""
    ranges = {gene.name: (gene.low, gene.high) for gene in space.reals}
    return {
        key: (max(ranges[gene][0] for gene in genes), min(ranges[gene][1] for gene in genes))
        for key, genes in by_key.items()
    }
