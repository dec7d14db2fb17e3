"""A run's folder: what lies where, who holds it, and what may not change under it."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from evomerge.errors import RunError
from evomerge.evaluation.score_store import RunScores
from evomerge.report.result import RunResult
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate
from evomerge.study.ranking import best
from evomerge.study.rounds import joined
from evomerge.system.files import read_text, write_atomic
from evomerge.system.locks import exclusive
from evomerge.system.sealed import (
    Damaged,
    accept_json,
    accept_lines,
    read_sealed_json,
    read_sealed_lines,
    seal_json,
    seal_lines,
)
from evomerge.system.secrets import has_secret, masked
from evomerge.system.yaml import read_yaml

if TYPE_CHECKING:
    from evomerge.space.baselines import Start
    from evomerge.space.space import SearchSpace
    from evomerge.study.record import Record

STARTS = "starts.json"
ROUNDS = "rounds"
"""The folder of the later rounds, each under the number of its first candidate, and of the winners they start from."""


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
    def existing(cls, root: Path, *, accept_edited: bool = False) -> RunFolder:
        """Opens the folder of a run.

        Args:
            root: The folder.
            accept_edited: Take its files as they are, whatever has changed in them since they were written.

        Raises:
            RunError: When it holds no run, or a file that is damaged or was edited.
        """
        resolved = root / "resolved.yaml"
        if not resolved.exists():
            near = sorted(p.parent.name for p in root.parent.glob("*/resolved.yaml")) if root.parent.is_dir() else []
            others = f"; runs beside it: {', '.join(near)}" if near else ""
            raise RunError(f"{root}: no run here (no resolved.yaml){others}")
        if accept_edited:
            _accept_edited(root)
        return cls(root, _read_spec(resolved))

    @classmethod
    def create(cls, root: Path, spec: SearchSpec, given: str, *, accept_edited: bool = False) -> RunFolder:
        """Opens the folder of this search, with the specification that it holds, or makes it.

        Args:
            root: The folder.
            spec: The resolved specification.
            given: The search.yaml as the user wrote it.
            accept_edited: As for `existing`.

        Raises:
            RunError: When the folder holds another search's run, with a diff, or anything else.
        """
        resolved = root / "resolved.yaml"
        if resolved.exists():
            try:
                folder = cls.existing(root, accept_edited=accept_edited)
            except Damaged as error:
                if error.edited or not _same_text(root / "search.yaml", given):
                    raise
                log.warning("%s; it is written again from the search.yaml, which is the run's own", error)
                folder = cls(root, spec)
                folder.write_spec(spec)
            folder._refuse_other(spec)
            return folder
        if root.exists() and not _only_begun(root):
            raise RunError(f"{root}: not empty, and no run; choose another folder with run.dir or --dir")
        (root / "scores").mkdir(parents=True, exist_ok=True)
        write_atomic(root / "search.yaml", given, private=has_secret(spec.run.storage or ""))
        folder = cls(root, spec)
        folder.write_spec(spec)
        return folder

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.root)

    def write_spec(self, spec: SearchSpec) -> None:
        """Stores the resolved specification (again, when its budget or its password has changed)."""
        text = yaml.safe_dump(spec.model_dump(), sort_keys=False)
        write_atomic(self.root / "resolved.yaml", seal_lines(text), private=has_secret(spec.run.storage or ""))
        self.spec = spec

    def with_chosen(self, spec: SearchSpec) -> SearchSpec:
        """Returns a specification with what the run has chosen where the specification leaves it open."""
        if spec.evaluation.dtype != "auto":
            return spec
        evaluation = spec.evaluation.model_copy(update={"dtype": self.spec.evaluation.dtype})
        return spec.model_copy(update={"evaluation": evaluation})

    def _refuse_other(self, spec: SearchSpec) -> None:
        diff = _diff(_identity(self.spec), _identity(self.with_chosen(spec)))
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
        deaths = 0
        with suppress(Damaged):  # it counts as missing
            before, count = read_sealed_json(path, _attempt, "") if path.exists() else ("", 0)
            deaths = count if before == recipe_hash else 0
        write_atomic(path, seal_json({"recipe_hash": recipe_hash, "deaths": deaths + 1}))
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
        before = self._environment(path)
        if before is None:
            write_atomic(path, seal_json(dict(sorted(environment.items()))))
            return []
        require_same_content(before["content"], environment["content"], str(self.root))
        changed = _diff(before["versions"], json.loads(json.dumps(environment["versions"])))
        return [f"versions differ from the run's first ones; equal up to rounding:\n{changed}"] if changed else []

    def environment(self) -> dict[str, dict[str, Any]]:
        """Reads what the run began in: contents of models and tasks, versions; empty before that is written."""
        return self._environment(self.root / "environment.json") or {}

    def _environment(self, path: Path) -> dict[str, dict[str, Any]] | None:
        if not path.exists():
            return None
        try:
            return read_sealed_json(path, _environment, "without the file, it is written again")
        except Damaged as error:
            if error.edited:
                raise
            log.warning("%s; it is written again, from the models and tasks as they are now", error)
            return None

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

        name = self._study(baseline)
        where = self.spec.run.storage or self.root / "study.log"
        owner = self._owner() if self.spec.run.storage and space is not None else None
        names = self.spec.objectives
        objectives = max(1, len(names))
        return Record.open(where, name, space=space, objectives=objectives, names=names, owner=owner, report=report)

    def _study(self, baseline: bool) -> str:
        return f"{self.spec.name}-random" if baseline else self.spec.name

    def _owner(self) -> dict[str, str]:
        """Who this folder is to a storage that other runs use as well; the same after the folder was moved."""
        path = self.root / "id"
        if not path.exists():
            write_atomic(path, seal_lines(uuid.uuid4().hex))
        number = read_sealed_lines(path, "the storage has it, as the run's id").strip()
        return {"id": number, "folder": str(self.root.resolve()), "host": socket.gethostname()}

    def rounds(self) -> dict[int, Path]:
        """Lists the folders of the later rounds by the number of their first candidate."""
        folders = (path for path in (self.root / ROUNDS).glob("*") if (path / "resolved.yaml").exists())
        return {int(path.name): path for path in sorted(folders, key=lambda path: int(path.name))}

    def with_winners(self, names: Iterable[str] | None = None) -> SearchSpec:
        """Returns the specification with winners of rounds among the sources.

        Args:
            names: Which; None for those of all rounds, so that every candidate can be made.
        """
        if names is None:
            specs = [RunFolder.existing(root).spec for root in self.rounds().values()]
            names = dict.fromkeys(name for spec in specs for name in spec.models.winners)
        winners = {name: str(self.root.resolve() / ROUNDS / name) for name in names}
        sources = self.spec.models.sources | {name: name for name in winners}
        models = self.spec.models.model_copy(update={"sources": sources, "winners": winners})
        return self.spec.model_copy(update={"models": models})

    def candidates(self, *, baseline: bool = False, torn: bool = False) -> tuple[Candidate, ...]:
        """Reads all recorded candidates, by number; those of later rounds go on from the numbers of earlier ones.

        Args:
            baseline: Those of the baseline's random search.
            torn: Also of a record whose end is missing, as a run takes it that goes on.

        Raises:
            RunError: The record lacks candidates that result.json counts.
        """
        recorded = {0: self._recorded(baseline)}
        if baseline:
            return recorded[0]
        where = {0: self.spec.run.storage or self.root / "study.log"}
        for first, root in self.rounds().items():
            recorded[first], where[first] = RunFolder.existing(root)._recorded(), root / "study.log"
        for first, following in itertools.pairwise(() if torn else recorded):
            if len(recorded[first]) < following - first:
                counted = f"the {following - first} candidates of its round"
                raise _end_is_missing(where[first], len(recorded[first]), counted)
        history = joined(recorded)
        result = None if torn else self.result()
        if result is not None and len(history) < result.candidates.recorded:
            counted = f"the {result.candidates.recorded} candidates that result.json counts"
            raise _end_is_missing(where[max(where)], len(history), counted)
        return history

    def _recorded(self, baseline: bool = False) -> tuple[Candidate, ...]:
        from evomerge.study.record import Record

        where = self.spec.run.storage or self.root / "study.log"
        record = Record.find(where, self._study(baseline))  # reading must not make what the run is about to make
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
        advice = f"without the file, `evomerge resume {self.root}` writes it again"
        if not path.exists():
            return None
        return read_sealed_json(path, lambda content: RunResult.from_json(content, str(path)), advice)

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
        write_atomic(self.root / "result.json", seal_json(result.to_json()))

    def starts(self) -> tuple[Start, ...] | None:
        """Reads generation 0 of a warm start, as it was when the run began; None where it is not kept."""
        path = self.root / STARTS
        advice = "without it, and with what search.warm_start names, a new run draws the same"
        return read_sealed_json(path, _starts, advice) if path.exists() else None

    def write_starts(self, starts: Sequence[Start]) -> None:
        """Keeps generation 0 of a warm start."""
        content = [
            {"name": s.name, "recipe": dict(s.recipe), "genome": s.genome.to_json(), "raced": s.raced} for s in starts
        ]
        write_atomic(self.root / STARTS, seal_json({"starts": content}))


def _end_is_missing(where: str | Path, count: int, counted: str) -> RunError:
    text = f"{masked(str(where))}: has {count} of {counted}"
    return RunError(f"{text}: its end is missing; `evomerge resume` scores them again")


def require_same_content(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "this run") -> None:
    """Compares the content of models and tasks with what it was when the run began.

    Raises:
        RunError: It is another one, with a diff.
    """
    diff = _diff(*(json.loads(json.dumps(content)) for content in (before, now)))
    if diff:
        raise RunError(f"{where}: the models or the data have changed since this run began:\n{diff}")


def _read_spec(path: Path) -> SearchSpec:
    """Reads the resolved specification of a run."""
    advice = "`evomerge run` with the search.yaml that it was made from writes it again"
    text = read_sealed_lines(path, advice)
    try:
        return SearchSpec.model_validate(read_yaml(text, str(path), RunError))
    except ValidationError as error:
        raise Damaged(f"{path}: no specification of this version ({error.error_count()} problems): {advice}") from None


def _accept_edited(root: Path) -> None:
    """Takes the small files of a run as they are from now on."""
    from evomerge.study.journal import accept_edited

    for name in ("resolved.yaml", "id"):
        if (root / name).is_file():
            accept_lines(root / name)
    for path in sorted(root.glob("*.json")):
        accept_json(path)
    accept_edited(root / "study.log")
    for round_ in sorted((root / ROUNDS).glob("*/resolved.yaml")):
        _accept_edited(round_.parent)


def _same_text(path: Path, text: str) -> bool:
    """Whether a file has this text."""
    try:
        return read_text(path, RunError) == text
    except RunError:
        return False


def _attempt(content: dict[str, Any]) -> tuple[str, int]:
    return str(content["recipe_hash"]), int(content["deaths"])


def _environment(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {key: dict(content[key]) for key in ("content", "versions")}


def _starts(content: dict[str, Any]) -> tuple[Start, ...]:
    from evomerge.space.baselines import Start
    from evomerge.space.genome import Genome

    return tuple(
        Start(s["name"], dict(s["recipe"]), Genome.from_json(s["genome"]), s["raced"]) for s in content["starts"]
    )


def _only_begun(root: Path) -> bool:
    """Whether a folder holds nothing but what `create` writes before `resolved.yaml`, as after a kill in between."""
    written_first = {".lock", "search.yaml", "scores"}
    if not root.is_dir() or any((root / "scores").glob("*")):
        return False
    return all(path.name in written_first or path.name.endswith(".partial") for path in root.iterdir())


def _identity(spec: SearchSpec) -> dict[str, Any]:
    """What may not change under a run.

    All but its budget, stopping rules, baseline, controls, cache, standard errors, place, passwords, what it keeps and
    what may be spent on a judge.
    """
    content = spec.model_dump(mode="json")
    content["run"] = {"storage": masked(content["run"]["storage"] or "")}
    for key in ("cache", "bootstrap_iters"):
        del content["evaluation"][key]
    for part in (*content["evaluation"]["tasks"], *content["evaluation"]["guard"]):
        for key in _SPENDING if isinstance(part, dict) and part["judge"] else ():
            del part["judge"][key]
    for key in ("candidates", "stop", "baseline", "controls"):
        del content["search"][key]
    content["models"]["winners"] = list(spec.models.winners)  # a run's folder may move
    # What a run starts from is kept in its folder: where that came from may move, or be gone.
    content["search"]["warm_start"] = [Path(text).name for text in spec.search.warm_starts]
    return content


_SPENDING = ("key", "concurrency", "retries", "timeout", "max_calls", "max_cost", "price")
"""What may be spent on a judge, and how it is called, which changes no reply."""


def _diff(before: Any, after: Any) -> str:
    left, right = (yaml.safe_dump(content, sort_keys=True).splitlines() for content in (before, after))
    return "\n".join(difflib.unified_diff(left, right, "the run", "now", lineterm="", n=1))
