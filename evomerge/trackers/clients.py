"""The experiment trackers, each over its own client: a run of theirs for each of ours, gone on with when ours is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from evomerge.system.hashing import digest

_PROJECT = "evomerge"


def _identity(name: str, folder: str) -> str:
    """The same for every session of a run in its folder."""
    return f"{name}-{digest(str(Path(folder).resolve()))[:8]}"


class TensorboardSink:
    """Event files under tensorboard/ of the run's folder: a session writes all anew, and voids what others wrote."""

    last = -1

    def __init__(self, name: str, folder: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=0)
        self._writer.add_text("search", "\n".join(f"- {key}: {value}" for key, value in config.items()))

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Writes a scalar for each number."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, number)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()


class MlflowSink:
    """A run of MLflow where MLFLOW_TRACKING_URI says; found again by a tag."""

    def __init__(self, name: str, folder: str, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(_PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(_PROJECT)
        tag = _identity(name, folder)
        runs = self._client.search_runs([number], f"tags.`evomerge.run` = '{tag}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(number, tags={"evomerge.run": tag}, run_name=name).info.run_id
            for key, value in config.items():
                self._client.log_param(self._run, key, value)
        steps = [metric.step for metric in self._client.get_metric_history(self._run, "generation")]
        self.last = max(steps, default=-1)

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Logs the numbers in one batch, with the candidate's as their step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(_safe(key), value, now, number) for key, value in values.items()])

    def close(self) -> None:
        """Ends the run, which another session may go on with."""
        self._client.set_terminated(self._run)


class WandbSink:
    """A run of Weights & Biases, of the same id in every session; WANDB_MODE=offline keeps it on the disk."""

    def __init__(self, name: str, folder: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=_PROJECT, name=name, id=_identity(name, folder), resume="allow", dir=folder, config=dict(config)
        )
        self._run.define_metric("*", step_metric="candidate")
        self.last = int(self._run.summary.get("candidate", -1))

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Logs the numbers over the candidate's."""
        self._run.log({"candidate": number, **values})

    def close(self) -> None:
        """Ends the session."""
        self._run.finish()


class TrackioSink:
    """A run of trackio on this machine, of the same name in every session."""

    def __init__(self, name: str, folder: str, config: Mapping[str, Any]) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        run = _identity(name, folder)
        with redirect_stdout(sys.stderr):  # where results go, it prints how to see its own
            self._run = trackio.init(project=_PROJECT, name=run, resume="allow", config=dict(config), embed=False)
        self.last = max((int(row.get("step", -1)) for row in SQLiteStorage.get_logs(_PROJECT, run)), default=-1)

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Logs the numbers with the candidate's as their step."""
        self._run.log({"candidate": number, **values}, step=number)

    def close(self) -> None:
        """Ends the session."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


def _safe(key: str) -> str:
    """A metric's name in the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)
