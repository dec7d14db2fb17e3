"""A process that scores candidates for another (`evomerge.executors.local`), which starts it and tells it what to do.

It ends by itself when the other end of its connection closes, whatever it is doing: with the process that started it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from evomerge.errors import EvoMergeError
from evomerge.executors.in_process import attempt
from evomerge.study.candidate import Outcome, Proposal
from evomerge.system.memory import collect_rarely

Opened = tuple[Callable[[Any], None], Callable[[Proposal], Outcome]]
"""What takes whom to compare candidates with, and what scores one."""


def open_scorer(root: Path, threads: int, share: int) -> Opened:
    """Opens a run's models and tasks, and settles what its driver has settled.

    Args:
        root: The run folder.
        threads: Of the run.
        share: Of these, how many are this process's.
    """
    import torch

    from evomerge.problem.candidate_evaluator import Scorer
    from evomerge.problem.problem import Workbench
    from evomerge.run.folder import RunFolder
    from evomerge.study.interfaces import NullTracker

    torch.set_num_threads(share)
    folder = RunFolder.existing(root)
    scorer = Scorer(Workbench(folder.spec, threads), folder)
    scorer.settle(NullTracker())
    return scorer.race_against, scorer


def main() -> NoReturn:
    """Serves the connection with the file descriptor ``argv[1]``, by what ``argv[2]`` (`module:function`) opens."""
    collect_rarely()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("evomerge").setLevel(logging.INFO)
    logging.captureWarnings(True)
    connection = Connection(int(sys.argv[1]))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        _serve(connection, inbox, sys.argv[2])
    except EvoMergeError as error:
        connection.send(("error", error))
    except Exception:
        connection.send(("bug", traceback.format_exc()))
    sys.exit(1)


def _receive(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        pass  # nobody is left to score for
    except Exception:
        traceback.print_exc()
    os._exit(1)


def _serve(connection: Connection, inbox: SimpleQueue[Any], opener: str) -> NoReturn:
    module, _, name = opener.partition(":")
    begin, evaluate = getattr(importlib.import_module(module), name)(*inbox.get())
    connection.send(("ready", None))
    while True:
        kind, content = inbox.get()
        if kind == "begin":
            begin(content)
        else:
            connection.send(("outcome", attempt(evaluate, content)))
