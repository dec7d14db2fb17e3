"""Experiment trackers by the names of `run.track`: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from evomerge.errors import SpecError
from evomerge.study.interfaces import Tracker
from evomerge.trackers.clients import MlflowSink, TensorboardSink, TrackioSink, WandbSink
from evomerge.trackers.metrics import MetricsTracker, Several, Sink

SINKS: dict[str, type[Sink]] = {
    "tensorboard": TensorboardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "trackio": TrackioSink,
}
"""Each name is that of the package, and of the extra that installs it."""


def with_trackers(shown: Tracker, names: Sequence[str]) -> Tracker:
    """Joins what is shown with the experiment trackers that a search names.

    Raises:
        SpecError: With every one that is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SpecError([f'run.track: {n} is not installed; `pip install "evomerge[{n}]"` has it' for n in missing])
    return Several([shown, *(MetricsTracker(SINKS[name]) for name in dict.fromkeys(names))]) if names else shown
