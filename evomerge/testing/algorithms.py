"""What every search algorithm promises, as functions to call from tests: of ours, and of packages that add their own.

from evomerge.testing.algorithms import check_algorithm

def test_contract():
    check_algorithm(my_algorithm)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evomerge.algorithms.random_search import random_search
from evomerge.algorithms.registry import RegisteredAlgorithm
from evomerge.space.baselines import baselines
from evomerge.space.build import build_space
from evomerge.space.decode import decode, genome_hash, why_invalid
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Outcome, Proposal, first_generation
from evomerge.study.interfaces import AlgorithmSettings

History = tuple[Candidate, ...]


def example_space(*, patterns: bool = False) -> SearchSpace:
    """Builds a space of three models of six layers.

    Args:
        patterns: Of layer patterns; otherwise of methods, weights and densities.
    """
    return build_space(
        base="models/base",
        sources={"math": "models/math", "code": "models/code", "law": "models/law"},
        layer_count=6,
        outer=("model.embed_tokens.weight", "model.norm.weight"),
        tensor_group_filters={"attention": ("self_attn",), "mlp": ("mlp",)},
        methods=("frankenmerge",) if patterns else ("task_arithmetic", "ties", "dare_ties"),
        layer_groups=2,
        frankenmerge={"min_layers": 4, "max_layers": 8} if patterns else {},
    )


def example_history(space: SearchSpace, count: int = 24) -> History:
    """Makes up a history: generation 0 and random candidates, every seventh failed, and every seventh pruned."""
    start = first_generation(baselines(space), count)
    drawn = random_search(space, (), range(len(start), count), 1, 99, AlgorithmSettings())
    return tuple(_scored(proposal) for proposal in (*start, *drawn))


def _scored(proposal: Proposal) -> Candidate:
    rng = np.random.default_rng(int(proposal.recipe_hash[:8], 16))
    outcome = Outcome(float(rng.uniform(0.3, 0.8)))
    if proposal.number % 7 == 5:
        outcome = Outcome(None, state="failed", failure="CandidateError: not finite")
    elif proposal.number % 7 == 6:
        outcome = replace(outcome, state="pruned")
    return Candidate.of(proposal, outcome)


def check_proposals(
    space: SearchSpace, history: History, proposals: Sequence[Proposal], numbers: range, generation: int
) -> None:
    """Checks that proposals are all new, numbered as asked for, within the space, and say where they come from."""
    _require([p.number for p in proposals] == list(numbers), f"numbers: {[p.number for p in proposals]} for {numbers}")
    for p in proposals:
        where = f"proposal {p.number}"
        _require(space.contains(p.genome), f"{where}: its genome is no point of the space")
        _require(why_invalid(space, p.genome) is None, f"{where}: {why_invalid(space, p.genome)}")
        _require(p.recipe == decode(space, p.genome), f"{where}: its recipe is not its genome's")
        _require(p.recipe_hash == genome_hash(space, p.genome), f"{where}: its hash is not its genome's")
        _require(p.generation == generation and p.operator, f"{where}: generation {p.generation}, {p.operator!r}")
        scored = {c.number for c in history if c.state != "failed"}  # a pruned one counts with its estimate
        _require(set(p.parents) <= scored, f"{where}: a parent has no score: {p.parents}")
    hashes = [p.recipe_hash for p in proposals]
    _require(len(set(hashes)) == len(hashes), "two proposals are the same merge")
    _require(not set(hashes) & {c.recipe_hash for c in history}, "a proposal is in the history")


def check_algorithm(algorithm: RegisteredAlgorithm, settings: AlgorithmSettings | None = None) -> None:
    """Checks everything that an algorithm promises, on a space of numbers and on one of layer patterns.

    Raises:
        AssertionError: It breaks a promise; the message says which.
    """
    _require(algorithm.option_problems(dict(algorithm.options)) == [], "its own default options are refused")
    for patterns in (False, True):
        _check_on(algorithm, example_space(patterns=patterns), settings or AlgorithmSettings())


def _check_on(algorithm: RegisteredAlgorithm, space: SearchSpace, settings: AlgorithmSettings) -> None:
    history = example_history(space)

    def ask(past: History, count: int = 4, seed: int = 3) -> list[Proposal]:
        return algorithm(space, past, range(len(past), len(past) + count), 2, seed, settings)

    first = ask(history)
    check_proposals(space, history, first, range(len(history), len(history) + 4), 2)
    ask(history[:10], count=1)
    _require(ask(history) == first, "the same call gives other proposals: something is remembered between calls")
    _require(ask(history, count=2) == first[:2], "fewer numbers do not give the first of the same proposals")
    _require(ask(history, seed=4) != first, "another seed gives the same proposals")
    check_proposals(space, (), ask(()), range(4), 2)
    failed = tuple(replace(c, state="failed", fitness=None) for c in history)
    check_proposals(space, failed, ask(failed), range(len(failed), len(failed) + 4), 2)


def _require(holds: object, text: str) -> None:
    if not holds:
        raise AssertionError(text)
