"""What runs show on a terminal: the live table of a search, the bar of a merge. Always on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from evomerge.study.candidate import Candidate
from evomerge.study.interfaces import Level, SearchInfo
from evomerge.study.ranking import fitness_key
from evomerge.system.streams import PrintableStream
from evomerge.system.text import one_line, printable

log = logging.getLogger("evomerge.run")
_MOST_TASKS = 12  # rows of the live table


class ConsoleTracker:
    """A table on a terminal that is updated in place, short lines elsewhere; every line is in the run's log too.

    Args:
        verbose: A line for each candidate on a terminal, too.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self._name = ""
        self._console = _console()
        self._live: Live | None = None
        self._bar = _bar("", self._console)
        self._task: TaskID = self._bar.add_task("", total=None)
        self._best: Candidate | None = None
        self._first: Candidate | None = None
        self._budget = 0
        self._done = 0
        self._scored = 0
        self._pruned = 0
        self._failed = 0
        self._started = time.monotonic()

    def begin(self, name: str) -> None:
        """Takes the name that every line begins with."""
        self._name = name
        self._started = time.monotonic()

    def report(self, text: str, level: Level = "info") -> None:
        """Shows and logs one line of what is going on."""
        text = printable(text)
        log.log(logging.WARNING if level == "warning" else logging.INFO, text)
        self._print(f"{'warning: ' if level == 'warning' else ''}{text}")

    def started(self, search: SearchInfo) -> None:
        """Announces the search and what of it is done already."""
        self._budget = search.budget
        for candidate in search.recorded:
            self._count(candidate)
        front = f" for the front of {', '.join(search.objectives)}" if search.objectives else ""
        self.report(
            f"{self._done} of {self._budget} candidates are recorded; {search.genes} genes, "
            f"{search.algorithm}{front}; the run is in {search.folder}"
        )
        if sys.stderr.isatty():
            self._bar.update(self._task, total=self._budget, completed=self._done)
            self._live = Live(self._table(), console=self._console, refresh_per_second=2)
            self._live.start()

    def candidate(self, candidate: Candidate) -> None:
        """Shows one more recorded candidate."""
        self._count(candidate)
        self._scored += 1
        line = printable(self._line(candidate))
        log.info(line)
        if self._live is None or self._verbose:
            self._print(line)
        if self._live is not None:
            self._bar.update(self._task, completed=self._done)
            self._live.update(self._table())

    def close(self) -> None:
        """Ends the live table, which stays as it was last."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _count(self, candidate: Candidate) -> None:
        self._done += 1
        self._pruned += candidate.state == "pruned"
        self._failed += candidate.state == "failed"
        if candidate.fitness is None or candidate.state != "done":
            return
        if candidate.generation == 0 and (self._first is None or _better(candidate, self._first)):
            self._first = candidate
        if self._best is None or _better(candidate, self._best):
            self._best = candidate

    def _print(self, line: str) -> None:
        self._console.print(f"{self._name}: {line}", markup=False)

    def _line(self, candidate: Candidate) -> str:
        """A candidate in a line of a log: what came of it, and where the search stands."""
        value = "failed" if candidate.fitness is None else f"{candidate.fitness:.4f}"
        if candidate.state == "pruned":
            value = f"{value} (stopped early)"
        why = f" ({one_line(candidate.failure or '', 60)})" if candidate.state == "failed" else ""
        best = "" if self._best is None else f", best {self._best.fitness:.4f}"
        left = _duration(self._seconds_left)
        return f"candidate {candidate.number} of {self._budget}: {value}{_beyond(candidate)}{why}{best}, {left} left"

    @property
    def _seconds_left(self) -> float:
        each = (time.monotonic() - self._started) / max(1, self._scored)
        return each * (self._budget - self._done)

    def _table(self) -> Group:
        """What stands on the terminal: how far it is, and the best so far by task beside generation 0."""
        table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
        table.add_column("task and metric", overflow="ellipsis", no_wrap=True, max_width=48)
        table.add_column("best so far", justify="right")
        table.add_column("best of generation 0", justify="right")
        best, first = (_scores(c) for c in (self._best, self._first))
        for name in list(best)[:_MOST_TASKS]:
            table.add_row(Text(one_line(name, 48)), best[name], first.get(name, ""))
        if len(best) > _MOST_TASKS:
            table.add_row(Text(f"and {len(best) - _MOST_TASKS} more"), "", "")
        fitness = [f"{c.fitness:.4f}" if c is not None else "" for c in (self._best, self._first)]
        table.add_row("fitness (what the search compares)", *fitness, style="bold")
        rate = self._scored / max(1e-9, time.monotonic() - self._started) * 3600
        pace = f", {rate:.0f} an hour, about {_duration(self._seconds_left)} left" if self._scored else ""
        failed = f", {self._failed} failed" if self._failed else ""
        best_of = f"best: candidate {self._best.number}; " if self._best is not None else ""
        return Group(table, self._bar, Text(f"{best_of}{self._pruned} stopped early{failed}{pace}"))


def _better(candidate: Candidate, other: Candidate) -> bool:
    return fitness_key(candidate)[:2] < fitness_key(other)[:2]


def _scores(candidate: Candidate | None) -> dict[str, str]:
    """A candidate's scores by task and its first metric, which is the task's own, each with its error."""
    if candidate is None:
        return {}
    tables = [(task, metrics) for tasks in candidate.scores.values() for task, metrics in tasks.items()]
    shown = {}
    for task, metrics in tables:
        for metric, score in list(metrics.items())[:1]:
            error = "" if score.get("stderr") is None else f" ± {score['stderr']:.3f}"
            shown[f"{task} {metric}"] = f"{score['value']:.3f}{error}"
    return shown


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


def _beyond(candidate: Candidate) -> str:
    """Which limits a candidate is beyond, and how far."""
    beyond = {name: limited.violation for name, limited in candidate.constraints.items() if limited.violation > 0}
    return "".join(f", {name} {violation:.1%} beyond its limit" for name, violation in beyond.items())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
