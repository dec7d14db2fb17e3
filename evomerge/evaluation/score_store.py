"""Per-item scores on the disk: those of one run, and those that any run on this machine has measured.

The cache has one small file for each plan and set of items, written whole and never changed, so that several processes
can share the folder without locks. A file that cannot be read, or that is not what it should be, counts as missing.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from evomerge.errors import OutputError
from evomerge.evaluation.scores import ItemScores, ResponseJacobian, dump_scores, load_scores
from evomerge.system.files import write_atomic
from evomerge.system.hashing import digest
from evomerge.system.sealed import read_sealed_json, seal_json

LIMIT = 512 * 2**20
"""Bytes that the cache may grow to."""
_WRITES = 500
"""Files written between two checks of the cache's size."""
_ABANDONED = 3600.0
"""Seconds after which a half-written file is a dead process's."""

T = TypeVar("T")

_JACOBIAN = ("loglikelihoods", "derivatives", "lengths", "items")

log = logging.getLogger(__name__)


def key_of(content: Mapping[str, Any]) -> str:
    """Returns the key of scores, given everything that decides them, as JSON."""
    return digest(json.dumps(content, sort_keys=True))


class ScoreCache:
    """Scores by key; the least recently used go first when there are too many.

    Args:
        folder: Where they are; made when something is written.
        limit: Bytes. Checked now and then, so the folder may be larger for a while.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self._folder = folder
        self._limit = limit
        self._written: list[Path] = []

    def get(self, key: str, items: Mapping[str, tuple[str, ...]]) -> dict[str, ItemScores] | None:
        """Returns the scores under a key, or None.

        Args:
            key: From `key_of`.
            items: Task to the ids of its items; scores of anything else count as missing.
        """
        path = self._path(key)
        scores = _read(path)
        if scores is None:
            return None
        if {task: part.items for task, part in scores.items()} != dict(items):
            log.warning("%s: holds other items than it should and is ignored", path)
            return None
        with suppress(OSError):
            os.utime(path)
        return scores

    def put(self, key: str, scores: Mapping[str, ItemScores]) -> None:
        """Keeps scores; a disk that takes none costs time later, nothing else."""
        buffer = io.BytesIO()
        dump_scores(buffer, scores)
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, buffer.getvalue())
        except (OSError, OutputError) as error:
            log.warning("the score cache cannot be written: %s", error)
            return
        if len(self._written) % _WRITES == 0:
            self.shrink()
        self._written.append(path)

    def withdraw(self) -> None:
        """Removes what was written through this object: it has turned out to be in doubt."""
        for path in self._written:
            path.unlink(missing_ok=True)

    def shrink(self) -> None:
        """Removes the least recently used files until the folder is within its limit, and what a kill left behind."""
        files = []
        for path in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):  # another process may be shrinking it too
                status = path.stat()
                if path.suffix == ".partial":
                    if time.time() - status.st_mtime > _ABANDONED:
                        path.unlink()
                else:
                    files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.npz"


class RunScores:
    """What one run has measured of its candidates, by the digest of their plans.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, plan: str, split: str) -> dict[str, ItemScores] | None:
        """Reads the scores of a plan on a split, or on the blocks of it that were measured; None where none were."""
        return self._read(f"{plan}-{split}.npz", load_scores)

    def save(self, plan: str, split: str, scores: Mapping[str, ItemScores]) -> None:
        """Keeps the scores of a plan on a split."""
        buffer = io.BytesIO()
        dump_scores(buffer, scores)
        self._write(f"{plan}-{split}.npz", buffer.getvalue())

    def files(self, plan: str, splits: Iterable[str]) -> dict[str, bytes]:
        """Returns what is kept of a plan's scores on some splits, for `add` elsewhere."""
        paths = (self._path(f"{plan}-{split}.npz") for split in splits)
        return {path.name: path.read_bytes() for path in paths if path.is_file()}

    def add(self, files: Mapping[str, bytes]) -> None:
        """Keeps files that were written elsewhere."""
        for name, content in files.items():
            self._write(Path(name).name, content)

    def take_written(self) -> dict[str, bytes]:
        """Returns what has to be brought to the run's folder: nothing, it is there."""
        return {}

    def load_jacobian(self, plan: str) -> dict[str, ResponseJacobian] | None:
        """Reads how a plan's log-likelihoods move, by task; None where that was not asked for."""
        return self._read(f"{plan}-jacobian.npz", _load_jacobian)

    def save_jacobian(self, plan: str, jacobian: Mapping[str, ResponseJacobian]) -> None:
        """Keeps how a plan's log-likelihoods move; of no task where they have no derivatives."""
        arrays = {f"{name}{k}": getattr(part, name) for k, part in enumerate(jacobian.values()) for name in _JACOBIAN}
        tasks = np.frombuffer(json.dumps(list(jacobian)).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, tasks=tasks, **arrays)
        self._write(f"{plan}-jacobian.npz", buffer.getvalue())

    def load_samples(self) -> dict[str, Any] | None:
        """Reads the items that were drawn of each task, as JSON; None where none were."""
        path = self._samples_path
        advice = "without the file, the same command draws the items again, the same"
        return read_sealed_json(path, _samples, advice) if path.exists() else None

    def save_samples(self, samples: Mapping[str, Any]) -> None:
        """Keeps the items that were drawn of each task."""
        write_atomic(self._samples_path, seal_json({"tasks": samples}))

    def _path(self, name: str) -> Path:
        return self._folder / "scores" / name

    def _read(self, name: str, read: Callable[[IO[bytes]], T]) -> T | None:
        return _read_archive(self._path(name), read)

    def _write(self, name: str, content: bytes) -> None:
        write_atomic(self._path(name), content)

    @property
    def _samples_path(self) -> Path:
        return self._folder / "informative.json"


class CarriedScores(RunScores):
    """The same far from the run's folder, for one candidate: what was brought here, and what is to be taken there."""

    def __init__(self) -> None:
        super().__init__(Path())
        self._contents: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}

    def add(self, files: Mapping[str, bytes]) -> None:
        """Keeps files that were written elsewhere."""
        self._contents |= files

    def take_written(self) -> dict[str, bytes]:
        """Returns what was written here since this was last asked, and forgets everything."""
        written, self._written, self._contents = self._written, {}, {}
        return written

    def _read(self, name: str, read: Callable[[IO[bytes]], T]) -> T | None:
        content = self._contents.get(name)
        return None if content is None else read(io.BytesIO(content))

    def _write(self, name: str, content: bytes) -> None:
        self._contents[name] = self._written[name] = content


def _read(path: Path) -> dict[str, ItemScores] | None:
    """Reads a file of scores; None where there is none, or it is damaged."""
    return _read_archive(path, load_scores)


def _read_archive(path: Path, read: Callable[[IO[bytes]], T]) -> T | None:
    """Reads an archive; None where there is none, or it is damaged: what is in it can be computed again."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no ordinary file")
        return read(io.BytesIO(path.read_bytes()))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise nearly anything
        log.warning("%s: is damaged and ignored: its items are scored again (%s)", path, error or type(error).__name__)
        return None


def _load_jacobian(file: IO[bytes]) -> dict[str, ResponseJacobian]:
    with np.load(file) as archive:
        tasks = json.loads(archive["tasks"].tobytes())
        return {task: ResponseJacobian(*(archive[f"{name}{k}"] for name in _JACOBIAN)) for k, task in enumerate(tasks)}


def _samples(content: dict[str, Any]) -> dict[str, Any]:
    return {str(task): dict(sample) for task, sample in content["tasks"].items()}
