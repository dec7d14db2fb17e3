"""A run's folder: what lies where, who holds it, and what may not change under it."""

from __future__ import annotations

import difflib
import json
import logging
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evomerge.errors import RunError
from evomerge.evaluation.score_store import RunScores
from evomerge.report.result import RunResult
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate
from evomerge.study.ranking import best
from evomerge.system.files import write_atomic
from evomerge.system.locks import exclusive

if TYPE_CHECKING:
    from evomerge.space.baselines import Start
    from evomerge.space.space import SearchSpace
    from evomerge.study.record import Record

STARTS = "starts.json"


log = logging.getLogger("evomerge.run")


class RunFolder:
    """`runs/<name>/`: the search.yaml as given and as resolved, the environment, the study, scores, log, report, best.

    Attributes:
        root: The folder.
        spec: The resolved specification.
        scores: What was measured of the candidates, item by item.
    """

    def __init__(self, root: Path, spec: SearchSpec) -> None:
        self.root = root
        self.spec = spec
        self.scores = RunScores(root)

    @classmethod
    def existing(cls, root: Path) -> RunFolder:
        """Opens the folder of a run.

        Raises:
            RunError: When it holds no run.
        """
        resolved = root / "resolved.yaml"
        if not resolved.is_file():
            near = sorted(p.parent.name for p in root.parent.glob("*/resolved.yaml")) if root.parent.is_dir() else []
            others = f"; runs beside it: {', '.join(near)}" if near else ""
            raise RunError(f"{root}: no run here (no resolved.yaml){others}")
        return cls(root, SearchSpec.model_validate(yaml.safe_load(resolved.read_text())))

    @classmethod
    def create(cls, root: Path, spec: SearchSpec, given: str) -> RunFolder:
        """Opens the folder of this search, with the specification that it holds, or makes it.

        Args:
            root: The folder.
            spec: The resolved specification.
            given: The search.yaml as the user wrote it.

        Raises:
            RunError: When the folder holds another search's run, with a diff, or anything else.
        """
        if (root / "resolved.yaml").is_file():
            folder = cls.existing(root)
            folder._refuse_other(spec)
            return folder
        if root.exists() and not _only_begun(root):
            raise RunError(f"{root}: not empty, and no run; choose another folder with run.dir or --dir")
        (root / "scores").mkdir(parents=True, exist_ok=True)
        write_atomic(root / "search.yaml", given)
        folder = cls(root, spec)
        folder.write_spec(spec)
        return folder

    def write_spec(self, spec: SearchSpec) -> None:
        """Stores the resolved specification (again, when its budget has changed)."""
        write_atomic(self.root / "resolved.yaml", yaml.safe_dump(spec.model_dump(), sort_keys=False))
        self.spec = spec

    def _refuse_other(self, spec: SearchSpec) -> None:
        diff = _diff(_identity(self.spec), _identity(spec))
        if diff:
            raise RunError(
                f"{self.root}: holds a run of another search; give this one another name or --dir. "
                f"What differs:\n{diff}"
            )

    def hold(self) -> AbstractContextManager[None]:
        """Holds the run against other processes.

        Raises:
            RunError: When another process holds it.
        """
        continued = "the same command then goes on from where it was"
        return exclusive(self.root / ".lock", str(self.root), afterwards=continued)

    def remove_partial_files(self) -> None:
        """Removes what a killed process left half-written. Call it while holding the run."""
        for folder in (self.root, self.root / "scores"):
            for leftover in folder.glob(".*.partial"):
                leftover.unlink(missing_ok=True)

    @contextmanager
    def attempting(self, recipe_hash: str) -> Iterator[int]:
        """Notes that a candidate is being scored in this process, for the length of a block.

        Gives how many processes in a row have died in such a block of this candidate, and of no other since.
        """
        path = self.root / "attempt.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        deaths = before["deaths"] if before.get("recipe_hash") == recipe_hash else 0
        write_atomic(path, json.dumps({"recipe_hash": recipe_hash, "deaths": deaths + 1}))
        try:
            yield deaths
        finally:  # whatever else ends the block, the process lives
            path.unlink(missing_ok=True)

    def check_environment(self, environment: Mapping[str, Any]) -> list[str]:
        """Stores the environment, or compares it with the one the run began in.

        Returns:
            Warnings about what may differ harmlessly (versions, threads).

        Raises:
            RunError: When the models' or the tasks' content has changed, with a diff.
        """
        path = self.root / "environment.json"
        if not path.is_file():
            write_atomic(path, json.dumps(environment, indent=2, sort_keys=True))
            return []
        before = json.loads(path.read_text())
        diff = _diff(before["content"], json.loads(json.dumps(environment["content"])))
        if diff:
            raise RunError(f"{self.root}: the models or the data have changed since this run began:\n{diff}")
        changed = _diff(before["versions"], json.loads(json.dumps(environment["versions"])))
        return [f"versions differ from the run's first ones; equal up to rounding:\n{changed}"] if changed else []

    def record(
        self,
        space: SearchSpace | None = None,
        *,
        baseline: bool = False,
        report: Callable[[str], None] = log.warning,
    ) -> Record:
        """Opens the record, or that of the baseline's random search.

        Args:
            space: Needed to append to it.
            baseline: The random search's.
            report: Is told when the storage cannot be reached.

        Raises:
            RunError: The storage cannot be opened, or its study is that of another run folder.
        """
        from evomerge.study.record import Record

        name = f"{self.spec.name}-random" if baseline else self.spec.name
        where = self.spec.run.storage or self.root / "study.log"
        owner = self._owner() if self.spec.run.storage and space is not None else None
        names = self.spec.objectives
        objectives = max(1, len(names))
        return Record.open(where, name, space=space, objectives=objectives, names=names, owner=owner, report=report)

    def _owner(self) -> dict[str, str]:
        """Who this folder is to a storage that other runs use as well; the same after the folder was moved."""
        path = self.root / "id"
        if not path.is_file():
            write_atomic(path, uuid.uuid4().hex)
        return {"id": path.read_text(), "folder": str(self.root.resolve()), "host": socket.gethostname()}

    def candidates(self) -> tuple[Candidate, ...]:
        """Reads all recorded candidates, by number."""
        from evomerge.study.record import Record

        where = self.spec.run.storage or self.root / "study.log"
        record = Record.find(where, self.spec.name)  # reading must not make a study that the run is about to make
        return record.candidates() if record is not None else ()

    def winner(self, history: tuple[Candidate, ...]) -> int:
        """Returns the winner's number: the finished run's, or the best so far.

        Raises:
            RunError: When no candidate has a score.
        """
        result = self.result()
        if result is not None:
            return result.winner.candidate
        leader = best(history)
        if leader is None:
            raise RunError(f"{self.root}: no candidate has been scored yet")
        return leader.number

    def result(self) -> RunResult | None:
        """Reads what the finished run found; None before that.

        Raises:
            RunError: When another version wrote it.
        """
        path = self.root / "result.json"
        return RunResult.from_json(json.loads(path.read_text()), str(path)) if path.is_file() else None

    def extended_from(self) -> int:
        """Counts the candidates there were when the run was last extended after it had ended before its budget did.

        0 for a run that never was. One that had spent its budget or its hours goes on as if it had never ended.
        """
        result = self.result()
        if result is None:
            return 0
        counts = result.candidates
        if result.ended.reason in ("stale", "target") and counts.budget < self.spec.search.candidates:
            return counts.recorded
        return result.ended.extended_from

    def write_result(self, result: RunResult) -> None:
        """Stores what the finished run found."""
        write_atomic(self.root / "result.json", json.dumps(result.to_json(), indent=2))

    def starts(self) -> tuple[Start, ...] | None:
        """Reads generation 0 of a warm start, as it was when the run began; None where it is not kept."""
        from evomerge.space.baselines import Start
        from evomerge.space.genome import Genome

        path = self.root / STARTS
        if not path.is_file():
            return None
        kept = json.loads(path.read_text())
        return tuple(Start(entry["name"], entry["recipe"], Genome.from_json(entry["genome"])) for entry in kept)

    def write_starts(self, starts: Sequence[Start]) -> None:
        """Keeps generation 0 of a warm start."""
        content = [{"name": s.name, "recipe": dict(s.recipe), "genome": s.genome.to_json()} for s in starts]
        write_atomic(self.root / STARTS, json.dumps(content, indent=2))


def _only_begun(root: Path) -> bool:
    """Whether a folder holds nothing but what `create` writes before `resolved.yaml`, as after a kill in between."""
    written_first = {".lock", "search.yaml", "scores"}
    if not root.is_dir() or any((root / "scores").glob("*")):
        return False
    return all(path.name in written_first or path.name.endswith(".partial") for path in root.iterdir())


def _identity(spec: SearchSpec) -> dict[str, Any]:
    """What may not change under a run: all but its budget, stopping rules, baseline, cache, place and what it keeps."""
    content = spec.model_dump(mode="json")
    content["run"] = {"storage": content["run"]["storage"]}
    del content["evaluation"]["cache"]
    for key in ("candidates", "stop", "baseline"):
        del content["search"][key]
    # What a run starts from is kept in its folder: where that came from may move, or be gone.
    content["search"]["warm_start"] = [Path(text).name for text in spec.search.warm_starts]
    return content


def _diff(before: Any, after: Any) -> str:
    left, right = (yaml.safe_dump(content, sort_keys=True).splitlines() for content in (before, after))
    return "\n".join(difflib.unified_diff(left, right, "the run", "now", lineterm="", n=1))
