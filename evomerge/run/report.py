"""The report of a run: what its folder says, read once and drawn; finished or not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from evomerge.errors import BadInput, EvoMergeError, RunError
from evomerge.report.figures import pictures
from evomerge.report.html import csv_text, report_page
from evomerge.report.run_data import SAMPLES, RunData, Sample
from evomerge.run.folder import RunFolder
from evomerge.run.status import status_of
from evomerge.system.files import expand_home, read_text, write_atomic
from evomerge.system.secrets import masked

_REFRESH = 10  # seconds


def read_run(root: Path) -> RunData:
    """Reads all that a run's folder says.

    Raises:
        RunError: When there is no run, or a file in it is damaged.
    """
    folder = RunFolder.existing(root)
    history = folder.candidates()
    status = status_of(folder, history)
    models = folder.spec.models
    names = {reference: name for name, reference in models.sources.items()}
    result = folder.result() if status.state == "finished" else None
    return RunData(
        folder=str(root),
        status=status,
        history=history,
        names=names | ({models.base: "base"} if models.base else {}),
        layers=_layers(folder),
        random_history=folder.candidates(baseline=True),
        result=result,
        objectives=tuple(folder.spec.objectives),
        environment=folder.environment(),
        search_yaml=masked(read_text(root / "search.yaml", RunError)),
        samples=_samples(folder, result.winner.candidate) if result else (),
    )


def write_report(root: Path, out: Path | None = None, *, csv: Path | None = None) -> Path:
    """Writes the report of a run.

    Args:
        root: The run's folder.
        out: The HTML file; None for report.html in the run's folder.
        csv: A folder for the numbers behind each picture; None for none.

    Returns:
        The HTML file.

    Raises:
        RunError: When there is no run.
        OutputError: When writing fails.
    """
    return _write(read_run(root), root, out, csv, refresh=None)


def _write(data: RunData, root: Path, out: Path | None, csv: Path | None, *, refresh: int | None) -> Path:
    out = root / "report.html" if out is None else expand_home(out)
    if out.is_dir():
        raise BadInput(f"{out}: is a folder; name the HTML file")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, report_page(data, refresh=refresh))
    if csv is not None:
        folder = expand_home(csv)
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures(data):
            write_atomic(folder / f"{picture.name}.csv", csv_text(picture))
    return out


def watch_report(
    root: Path, out: Path | None, csv: Path | None, seconds: float, written: Callable[[Path], None]
) -> None:
    """Writes the report again and again until the run has ended or is stopped.

    Args:
        root: The run's folder.
        out: As for `write_report`.
        csv: As for `write_report`.
        seconds: Between two writings.
        written: Is told of the file, once.
    """
    first = True
    while True:
        data = read_run(root)
        running = data.status.state == "running"
        path = _write(data, root, out, csv, refresh=_REFRESH if running else None)
        if first:
            written(path)
        if not running:
            return
        first = False
        time.sleep(seconds)


def _layers(folder: RunFolder) -> int | None:
    """How many layers the models have; None where none of them can be opened any more."""
    from evomerge.checkpoints.checkpoint import open_checkpoint

    models = folder.spec.models
    try:
        main = open_checkpoint(models.base or next(iter(models.sources.values()))).layout
    except (EvoMergeError, OSError):
        return None
    return main.layer_count if main.main is not None else None


def _samples(folder: RunFolder, winner: int) -> tuple[Sample, ...]:
    """What the winner's checkpoint was seen to write; () where none was kept."""
    path = folder.root / "best" / f"candidate-{winner}" / SAMPLES
    if not path.is_file():
        return ()
    try:
        content = json.loads(read_text(path, RunError))
        return tuple(Sample(**sample) for sample in content["samples"])
    except (RunError, ValueError, TypeError, KeyError, RecursionError):
        return ()
