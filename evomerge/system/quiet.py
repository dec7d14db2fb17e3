"""Where logs and warnings go, and other packages' code run without chatter and without chance in what it draws."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

from evomerge.system.text import printable

_CHATTY = ("lm_eval", "datasets", "transformers", "huggingface_hub", "fsspec")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and the informational logs of lm-eval, datasets and transformers within."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        # tqdm bars that nobody can switch off go to whatever standard error is at the moment.
        with _errors_only(*_CHATTY), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silences what `quiet` does, and warnings and what is printed as well."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silences Optuna's log lines and its notes on experimental functions within."""
    import optuna

    optuna.logging.get_verbosity()  # which sets its logger up, where that has not been done yet
    with _errors_only("optuna"), warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Loggers of these names pass on nothing below ERROR within."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Gives the global generators the seeds of `lm_eval` within; afterwards they are as they were.

    Some tasks shuffle choices with Python's or numpy's global generator, and would ask something else every time.
    """
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  (what tasks draw from)
    with torch.random.fork_rng():
        random.setstate(random.Random(DEFAULT_RANDOM_SEED).getstate())
        np.random.set_state(np.random.RandomState(DEFAULT_OTHER_SEED).get_state())  # noqa: NPY002
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generator within; afterwards it is as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _PrintableFormatter(logging.Formatter):
    """Leaves out of the log what it leaves out of a terminal: a log is read on one."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def log_to_file(path: Path, name: str) -> Iterator[None]:
    """Sends the log of a name, from INFO on, and Python's warnings to a file within."""
    handler = logging.FileHandler(path)
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger(name)
    loggers = [log, logging.getLogger("py.warnings")]
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        log.setLevel(logging.INFO)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            log.setLevel(level)
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()
