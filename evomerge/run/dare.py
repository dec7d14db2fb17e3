"""DARE over plain safetensors files, key by key: any tensors, whatever model they belong to, or none.

Each file's delta to the base is dropped and rescaled by a mask of its own (`methods/dare`), and the results are
averaged. What is merged into what is decided tensor by tensor: the output has the base's tensors; a file that lacks
one takes no part in it; a tensor that only a file has is left out. Both are reported. Other shapes are refused.
"""

from __future__ import annotations

import logging
import math
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import BadInput, OutputError, suggest

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from evomerge.checkpoints.checkpoint import Checkpoint
    from evomerge.planning.operation import Operation

Say = Callable[[str], None]
Progress = Callable[[int, int], None]

_KEYS: Mapping[str, tuple[str, ...]] = {
    "dare": ("drop_rate", "delta_threshold", "verbose", "seed"),
    "models": ("base_file", "merge_files", "output_file"),
}


@dataclass(frozen=True)
class DareConfig:
    """How to merge.

    Attributes:
        drop_rate: Probability to drop an element of a delta, 0 to 1; the paper's.
        delta_threshold: A tensor whose delta has an element of a larger magnitude than this is warned of: DARE is for
            fine-tunes that have not moved far.
        verbose: Say what is done.
        seed: Of the masks.

    Raises:
        BadInput: A value out of range.
    """

    drop_rate: float = 0.9
    delta_threshold: float = 0.002
    verbose: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        problems = config_problems(vars(self))
        if problems:
            raise BadInput(problems)


def config_problems(values: Mapping[str, Any], where: str = "DareConfig: ") -> list[str]:
    """Tells what is wrong with values of `DareConfig`'s fields; a field may be left out."""
    problems = []
    for key, low, high in (("drop_rate", 0.0, 1.0), ("delta_threshold", 0.0, math.inf)):
        value = values.get(key, 0.0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            upto = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            problems.append(f"{where}{key}: expected a number {upto}, got {value!r}")
    seed, verbose = values.get("seed", 0), values.get("verbose", True)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        problems.append(f"{where}seed: expected a whole number of at least 0, got {seed!r}")
    if not isinstance(verbose, bool):
        problems.append(f"{where}verbose: expected true or false, got {verbose!r}")
    return problems


@dataclass(frozen=True)
class DareFile:
    """What a TOML file says; None or () where it says nothing.

    Attributes:
        settings: Of `DareConfig`, those that are given.
        base_file: The common ancestor; absolute where it was found.
        merge_files: The fine-tunes; absolute where they were found.
        output_file: Where the result goes, from the working directory.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    base_file: str | None = None
    merge_files: tuple[str, ...] = ()
    output_file: str | None = None


def load_dare_file(path: Path) -> DareFile:
    """Reads a TOML file with `[dare]` and `[models]`; models are looked for beside it, above it, and from here.

    Raises:
        BadInput: The file cannot be read, or all that is wrong with it, each with its key.
    """
    from evomerge.system.files import resolve_path

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise BadInput(f"{path}: not valid TOML: {error}") from None
    problems = [f"{path}: {key}: unknown{suggest(key, _KEYS) or ': known are [dare] and [models]'}" for key in data]
    problems = [text for text, key in zip(problems, data, strict=True) if key not in _KEYS]
    sections = {name: _section(data, name, path, problems) for name in _KEYS}
    models = sections["models"]
    problems += config_problems(sections["dare"], f"{path}: dare.")
    for key in ("base_file", "output_file"):
        if not isinstance(models.get(key, ""), str):
            problems.append(f"{path}: models.{key}: expected a path as text, got {models[key]!r}")
    files = models.get("merge_files", [])
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        problems.append(f"{path}: models.merge_files: expected a list of paths, got {files!r}")
    if problems:
        raise BadInput(problems)

    def resolved(name: str) -> str:
        return str(resolve_path(name, path) or name)

    base = models.get("base_file")
    return DareFile(
        sections["dare"], resolved(base) if base else None, tuple(map(resolved, files)), models.get("output_file")
    )


def _section(data: Mapping[str, Any], name: str, path: Path, problems: list[str]) -> dict[str, Any]:
    section = data.get(name, {})
    if not isinstance(section, dict):
        problems.append(f"{path}: {name}: expected a table [{name}], got {section!r}")
        return {}
    for key in section:
        if key not in _KEYS[name]:
            hint = suggest(key, _KEYS[name]) or f": known are {', '.join(_KEYS[name])}"
            problems.append(f"{path}: {name}.{key}: unknown{hint}")
    return section


class DareMerger:
    """Merges safetensors files into a base.

    Args:
        base_file: The common ancestor.
        merge_files: Fine-tunes of it.
        config: How; the paper's drop rate by default.
        warn: Called with each warning; default: Python's warnings.
        tell: Called with what is done, if the config is verbose; default: the log.
        progress: Called with (tensors written, tensors in all).
    """

    def __init__(
        self,
        base_file: str | Path,
        merge_files: Sequence[str | Path],
        config: DareConfig | None = None,
        *,
        warn: Say | None = None,
        tell: Say | None = None,
        progress: Progress | None = None,
    ) -> None:
        if isinstance(merge_files, str | Path):
            merge_files = [merge_files]
        if not merge_files:
            raise BadInput("merge_files: give at least one file to merge into the base")
        self.base_file = str(base_file)
        self.merge_files = tuple(str(name) for name in merge_files)
        self.config = config or DareConfig()
        self._warn = warn or (lambda text: warnings.warn(text, stacklevel=4))
        self._tell = (tell or log.info) if self.config.verbose else (lambda text: None)
        self._progress = progress

    def merge(self, output_file: str | Path) -> Path:
        """Writes the merged file: under a temporary name first, so that a file of that name stays whole until then.

        Returns:
            The file's path.

        Raises:
            BadInput: A file cannot be read, or does not fit the base; with every problem, each with file and key.
            OutputError: Writing failed.
        """
        out = Path(output_file)
        from evomerge.run.plain_files import write_file

        _refuse_output(out, [self.base_file, *self.merge_files])
        checkpoints, operations = self._plan_files()
        for text in self._large_deltas(checkpoints, operations):
            self._warn(text)
        write_file(operations, checkpoints, out, progress=self._progress)
        self._tell(f"wrote {out}")
        return out

    def analyze(self) -> dict[str, dict[str, float]]:
        """Measures, writes nothing: the largest magnitude of each delta, by tensor and file. Warns as `merge` does."""
        checkpoints, operations = self._plan_files()
        for text in self._large_deltas(checkpoints, operations):
            self._warn(text)
        return self._largest(checkpoints, operations)

    def _plan_files(self) -> tuple[dict[str, Checkpoint], list[Operation]]:
        from evomerge.checkpoints.checkpoint import open_checkpoints
        from evomerge.run.plain_files import plan_files

        checkpoints = open_checkpoints([self.base_file, *self.merge_files])
        method, settings = "dare", {"weight": 1.0, "drop_rate": self.config.drop_rate}
        operations, notes = plan_files(
            checkpoints, self.base_file, self.merge_files, method, settings, seed=self.config.seed
        )
        for text in notes:
            self._warn(text)
        merged = sum(operation.base is not None for operation in operations)
        self._tell(
            f"{merged} of {len(operations)} tensors of {self.base_file} are merged with {len(self.merge_files)} files, "
            f"drop rate {self.config.drop_rate:g}"
        )
        return checkpoints, operations

    def _largest(
        self, checkpoints: Mapping[str, Checkpoint], operations: Sequence[Operation]
    ) -> dict[str, dict[str, float]]:
        from evomerge.engine.statistics.tensor_statistics import StatisticsStore
        from evomerge.run.plain_files import largest_deltas

        store = StatisticsStore(checkpoints)
        return {
            op.output: dict(zip((source.model for source in op.sources), largest_deltas(op, store), strict=True))
            for op in operations
            if op.base is not None
        }

    def _large_deltas(self, checkpoints: Mapping[str, Checkpoint], operations: Sequence[Operation]) -> list[str]:
        return [
            f"{tensor}: the delta of {model} reaches {size:.6g}, above delta_threshold {self.config.delta_threshold:g}"
            for tensor, sizes in self._largest(checkpoints, operations).items()
            for model, size in sizes.items()
            if size > self.config.delta_threshold
        ]


def _refuse_output(out: Path, inputs: Sequence[str]) -> None:
    if out.suffix != ".safetensors":
        raise BadInput(f"output_file: '{out}' has to be a .safetensors file")
    if out.is_dir():
        raise OutputError(f"{out} is a folder: give the name of a file")
    for name in inputs:
        if out.exists() and Path(name).exists() and out.samefile(name):
            raise BadInput(f"output_file: '{out}' is one of the files to merge: choose another name")
