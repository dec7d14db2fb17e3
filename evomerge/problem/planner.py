"""The plans of a generation, made before any of it is scored: those that share their first layers follow each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evomerge.evaluation.backends.native.hidden_state_cache import LayerDigests, order_by_shared_layers
from evomerge.planning.plan import Plan
from evomerge.problem.problem import Workbench
from evomerge.study.candidate import Proposal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Planned:
    """A proposal's plan, its digests by depth, and the seconds that both took."""

    plan: Plan
    depths: LayerDigests
    seconds: float


class Planner:
    """Plans proposals; those that were arranged are planned once, and each announces the next.

    Args:
        bench: Models and tasks.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._waiting: dict[str, _Planned] = {}  # by recipe_hash
        self._next: dict[str, LayerDigests] = {}  # recipe_hash to the digests of the one that is scored after it

    def arrange(self, proposals: Sequence[Proposal]) -> list[int]:
        """An order of the proposals, as positions: those that share their first layers follow each other.

        One that cannot be planned shares nothing with any; it fails in its own turn.
        """
        self._waiting = {}
        for proposal in proposals:
            try:
                self._waiting[proposal.recipe_hash] = self._plan(proposal)
            except Exception as error:  # raised again, and recorded, when its turn comes
                log.info("candidate %d is not arranged: %s", proposal.number, error)
        depths = [self._depths(proposal) for proposal in proposals]
        order = order_by_shared_layers(depths)
        self._next = {proposals[one].recipe_hash: depths[other] for one, other in pairwise(order)}
        return order

    def __call__(self, proposal: Proposal) -> tuple[Plan, float]:
        """The plan of the proposal that is about to be scored, and the seconds that it took.

        Raises:
            RecipeError: When its recipe is not possible.
        """
        planned = self._waiting.pop(proposal.recipe_hash, None) or self._plan(proposal)
        self._bench.evaluator.announce_next(self._next.pop(proposal.recipe_hash, ()))
        return planned.plan, planned.seconds

    def _plan(self, proposal: Proposal) -> _Planned:
        started = time.perf_counter()
        plan = self._bench.plan(proposal.recipe)
        depths = self._bench.depths(plan)
        return _Planned(plan, depths, time.perf_counter() - started)

    def _depths(self, proposal: Proposal) -> LayerDigests:
        planned = self._waiting.get(proposal.recipe_hash)
        return planned.depths if planned else ()
