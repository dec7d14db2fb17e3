"""Around other packages' code while it builds tasks: no chatter on the screen, no chance in what it draws."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator

_CHATTY = ("lm_eval", "datasets", "transformers", "huggingface_hub", "fsspec")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and the informational logs of lm-eval, datasets and transformers within."""
    import datasets

    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # tqdm bars that nobody can switch off go to whatever standard error is at the moment.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The seeds of `lm_eval` in the global generators within; afterwards they are as they were.

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
