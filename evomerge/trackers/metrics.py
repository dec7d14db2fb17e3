"""Sends a search's numbers to an experiment tracker: what is recorded of each candidate, once each, by its number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evomerge.study.candidate import Candidate, score_values
from evomerge.study.interfaces import Level, SearchInfo, Tracker

log = logging.getLogger("evomerge.trackers")


class Sink(Protocol):
    """One run of an experiment tracker's own client, opened or gone on with."""

    @property
    def last(self) -> int:
        """The last candidate that it has; -1 where it has none, or takes all anew."""
        ...

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a candidate."""
        ...

    def close(self) -> None:
        """Ends the session; another may go on with the run."""
        ...


@dataclass
class MetricsTracker:
    """Writes every recorded candidate to a sink. One that fails is given up with a warning: the search goes on.

    Args:
        open_sink: Opens the sink of a run, given the run's name, its folder and what the search is.
    """

    open_sink: Callable[[str, str, Mapping[str, Any]], Sink]
    _name: str = ""
    _sink: Sink | None = field(default=None, init=False)
    _best: float | None = field(default=None, init=False)

    def begin(self, name: str) -> None:
        """Takes the name of the run."""
        self._name = name

    def report(self, text: str, level: Level = "info") -> None:
        """Passes over the line."""

    def started(self, search: SearchInfo) -> None:
        """Opens the sink, and writes what it does not have of earlier sessions."""
        config = {"algorithm": search.algorithm, "candidates": search.budget, "genes": search.genes}
        self._carefully(lambda: self._open(search, config))
        last = -1 if self._sink is None else self._sink.last
        for candidate in search.recorded:
            self._write(candidate, written=candidate.number <= last)

    def candidate(self, candidate: Candidate) -> None:
        """Writes one more candidate."""
        self._write(candidate)

    def close(self) -> None:
        """Ends the session."""
        if self._sink is not None:
            self._carefully(self._sink.close)
        self._sink = None

    def _open(self, search: SearchInfo, config: Mapping[str, Any]) -> None:
        self._sink = self.open_sink(self._name, search.folder, config)

    def _write(self, candidate: Candidate, *, written: bool = False) -> None:
        if candidate.state == "done" and candidate.fitness is not None:
            self._best = candidate.fitness if self._best is None else max(self._best, candidate.fitness)
        sink = self._sink
        if sink is not None and not written:
            values = candidate_values(candidate, self._best)
            self._carefully(lambda: sink.write(candidate.number, values))

    def _carefully(self, work: Callable[[], None]) -> None:
        """Does what another program's client may fail at."""
        try:
            work()
        except Exception as error:
            log.warning("an experiment tracker failed and gets no more of this session: %s", error)
            self._sink = None


def candidate_values(candidate: Candidate, best: float | None) -> dict[str, float]:
    """Returns the numbers of a candidate by name: fitness, the best so far, cost, and scores as TASK/METRIC."""
    values: dict[str, float] = {"generation": candidate.generation, "items": candidate.items}
    values |= {"failed": float(candidate.state == "failed"), "pruned": float(candidate.state == "pruned")}
    values |= {"seconds": float(candidate.seconds["total"])} if "total" in candidate.seconds else {}
    values |= {} if candidate.fitness is None else {"fitness": candidate.fitness}
    values |= {} if best is None else {"best_fitness": best}
    return values | {f"{task}/{m}": float(value) for _, task, m, value in score_values(candidate.scores)}


@dataclass(frozen=True)
class Several:
    """Tells several trackers the same."""

    trackers: Sequence[Tracker]

    def begin(self, name: str) -> None:
        """Hands on the name."""
        for tracker in self.trackers:
            tracker.begin(name)

    def report(self, text: str, level: Level = "info") -> None:
        """Hands on the line."""
        for tracker in self.trackers:
            tracker.report(text, level)

    def started(self, search: SearchInfo) -> None:
        """Hands on what the search is."""
        for tracker in self.trackers:
            tracker.started(search)

    def candidate(self, candidate: Candidate) -> None:
        """Hands on the candidate."""
        for tracker in self.trackers:
            tracker.candidate(candidate)

    def close(self) -> None:
        """Closes them all."""
        for tracker in self.trackers:
            tracker.close()
