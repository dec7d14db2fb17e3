"""What runs show on a terminal: the live line of a search, the bar of a merge. Always on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from evomerge.study.candidate import Candidate
from evomerge.study.interfaces import Level, SearchInfo
from evomerge.study.ranking import ranked
from evomerge.system.streams import PrintableStream
from evomerge.system.text import printable

log = logging.getLogger("evomerge.run")


class ConsoleTracker:
    """A live line on a terminal, plain lines elsewhere; every line is in the run's log too."""

    def __init__(self) -> None:
        self._name = ""
        self._console = _console()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._best: Candidate | None = None
        self._baseline: float | None = None
        self._budget = 0
        self._done = 0
        self._scored = 0
        self._started = time.monotonic()

    def begin(self, name: str) -> None:
        """Takes the name that every line begins with."""
        self._name = name
        self._started = time.monotonic()

    def report(self, text: str, level: Level = "info") -> None:
        """Shows and logs one line of what is going on."""
        text = printable(text)
        log.log(logging.WARNING if level == "warning" else logging.INFO, text)
        console = self._progress.console if self._progress else self._console
        console.print(f"{self._name}: {'warning: ' if level == 'warning' else ''}{text}", markup=False)

    def started(self, search: SearchInfo) -> None:
        """Announces the search and what of it is done already."""
        self._budget = search.budget
        self._done = len(search.recorded)
        self._best = next(iter(ranked(search.recorded)), None)
        first = (c.fitness for c in search.recorded if c.generation == 0 and c.fitness is not None)
        self._baseline = max(first, default=None)
        front = f" for the front of {', '.join(search.objectives)}" if search.objectives else ""
        self.report(
            f"{self._done} of {self._budget} candidates are recorded; {search.genes} genes, "
            f"{search.algorithm}{front}; the run is in {search.folder}"
        )
        if sys.stderr.isatty():
            self._progress = _bar("{task.description}", self._console)
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
        self.report(self._line(candidate))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, description=self._summary())

    def close(self) -> None:
        """Ends the live line."""
        if self._progress is not None:
            self._progress.stop()

    def _summary(self) -> str:
        if self._best is None or self._best.fitness is None:
            return self._name
        baseline = "" if self._baseline is None else f", generation 0 {self._baseline:.4f}"
        return f"best {self._best.fitness:.4f} (candidate {self._best.number}){baseline}"

    def _line(self, candidate: Candidate) -> str:
        fitness = "failed" if candidate.fitness is None else f"{candidate.fitness:.4f}"
        left = (time.monotonic() - self._started) / self._scored * (self._budget - self._done)
        why = f" [{candidate.failure}]" if candidate.failure else ""
        return (
            f"candidate {candidate.number} of {self._budget}, generation {candidate.generation}, {candidate.operator}: "
            f"{fitness}{why}; {self._summary()}; about {_duration(left)} left"
        )


@contextmanager
def tensor_progress(show: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Shows a bar of tensors written, for the length of a block.

    Args:
        show: Show it at all.

    Yields:
        A function to call with (tensors written, tensors in all); None where nobody would see the bar.
    """
    if not (show and sys.stderr.isatty()):
        yield None
        return
    with _bar("tensors", _console(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console() -> Console:
    """The standard error as it is: what is drawn there on purpose must not be filtered out."""
    raw = sys.stderr.unfiltered if isinstance(sys.stderr, PrintableStream) else None
    return Console(file=raw, stderr=True, highlight=False, soft_wrap=True, emoji=False)


def _bar(text: str, console: Console, transient: bool = False) -> Progress:
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=transient)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
