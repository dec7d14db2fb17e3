"""What a search shows while it runs: a live line on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from evomerge.study.candidate import Candidate, ranked

if TYPE_CHECKING:
    from evomerge.run.folder import RunFolder

log = logging.getLogger("evomerge.run")


class Display:
    """Progress of one run.

    Args:
        name: The run's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._live = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._best: Candidate | None = None
        self._baseline: float | None = None
        self._budget = 0
        self._done = 0
        self._started = time.monotonic()
        self._scored = 0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line of what is going on, here and in the run's log."""
        log.info(text)
        (self._progress.console if self._progress else self._console).print(f"{self._name}: {text}", markup=False)

    def begin(self, folder: RunFolder, known: Sequence[Candidate], gene_count: int) -> None:
        """Announces the search and what of it is done already."""
        self._budget = folder.spec.search.candidates
        self._done = len(known)
        self._best = next(iter(ranked(known)), None)
        self._baseline = max((c.fitness for c in known if c.generation == 0 and c.fitness is not None), default=None)
        objectives = folder.spec.objectives
        front = f" for the front of {', '.join(objectives)}" if objectives else ""
        self.say(
            f"{self._done} of {self._budget} candidates are recorded; {gene_count} genes, "
            f"{folder.spec.search.algorithm}{front}; the run is in {folder.root}"
        )
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(self._name, total=self._budget, completed=self._done)
            self._progress.start()

    def candidate(self, candidate: Candidate) -> None:
        """Shows one more recorded candidate."""
        self._done += 1
        self._scored += 1
        if candidate.fitness is not None and candidate.state == "done":
            if candidate.generation == 0:
                self._baseline = max(self._baseline or candidate.fitness, candidate.fitness)
            if self._best is None or candidate.fitness > (self._best.fitness or 0.0):
                self._best = candidate
        self._line(candidate)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, description=self._summary())

    def _summary(self) -> str:
        if self._best is None or self._best.fitness is None:
            return self._name
        baseline = "" if self._baseline is None else f", generation 0 {self._baseline:.4f}"
        return f"best {self._best.fitness:.4f} (candidate {self._best.number}){baseline}"

    def _line(self, candidate: Candidate) -> None:
        fitness = "failed" if candidate.fitness is None else f"{candidate.fitness:.4f}"
        left = (time.monotonic() - self._started) / self._scored * (self._budget - self._done)
        why = f" [{candidate.failure}]" if candidate.failure else ""
        self.say(
            f"candidate {candidate.number} of {self._budget}, generation {candidate.generation}, {candidate.operator}: "
            f"{fitness}{why}; {self._summary()}; about {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
