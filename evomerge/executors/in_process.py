"""Scores candidates one at a time in this process, and turns what goes wrong with one into its outcome."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from evomerge.errors import BadInput, OutputError
from evomerge.study.candidate import Candidate, Outcome, Proposal

log = logging.getLogger(__name__)


class InProcess:
    """An executor that scores one proposal at a time, in this process, when its outcome is asked for.

    Args:
        evaluate: Scores one proposal.
        begin: Called by `begin_generation`.
    """

    slots = 1

    def __init__(
        self,
        evaluate: Callable[[Proposal], Outcome],
        begin: Callable[[tuple[Candidate, ...]], None] | None = None,
    ) -> None:
        self._evaluate = evaluate
        self._begin = begin
        self._submitted: deque[Proposal] = deque()

    def begin_generation(self, history: tuple[Candidate, ...]) -> None:
        """Hands the history on."""
        if self._begin is not None:
            self._begin(history)

    def submit(self, proposal: Proposal) -> None:
        """Takes a proposal."""
        self._submitted.append(proposal)

    def next_finished(self) -> tuple[Proposal, Outcome]:
        """Scores the proposal."""
        proposal = self._submitted.popleft()
        return proposal, attempt(self._evaluate, proposal)

    def close(self) -> None:
        """Forgets what was submitted."""
        self._submitted.clear()


def attempt(evaluate: Callable[[Proposal], Outcome], proposal: Proposal) -> Outcome:
    """Returns the outcome, with the time it took; a candidate that raises has failed and the run goes on.

    Raises:
        OutputError, BadInput: The run's trouble, not the candidate's.
    """
    begin = time.perf_counter()
    try:
        outcome = _checked(evaluate(proposal))
    except (OutputError, BadInput):
        raise
    except Exception as error:
        log.warning("candidate %d failed", proposal.number, exc_info=True)
        outcome = Outcome(None, state="failed", failure=f"{type(error).__name__}: {error}")
    return replace(outcome, seconds={**outcome.seconds, "total": time.perf_counter() - begin})


def _checked(outcome: Outcome) -> Outcome:
    """The outcome, or the failure that it is: a done candidate has a finite fitness."""
    values = [outcome.fitness, *(outcome.objectives or ())]
    if outcome.state == "failed":
        return replace(outcome, fitness=None, objectives=None, failure=outcome.failure or "unknown: no reason given")
    if outcome.state == "done" and not all(value is not None and math.isfinite(value) for value in values):
        failure = f"not finite: the fitness is {outcome.fitness}"
        return replace(outcome, state="failed", fitness=None, objectives=None, failure=failure)
    return outcome
