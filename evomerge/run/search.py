"""One search from start to end: the only module that knows everything."""

from __future__ import annotations

import logging
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from evomerge.algorithms.registry import get_algorithm
from evomerge.errors import EvoMergeError, RunError, SpecError
from evomerge.executors.in_process import InProcess
from evomerge.executors.local import LocalWorkers, Opened
from evomerge.problem.candidate_evaluator import Scorer
from evomerge.problem.problem import Workbench
from evomerge.report.result import Ending, RunResult
from evomerge.run.export import keep_best
from evomerge.run.finalists import choose_winner
from evomerge.run.folder import STARTS, RunFolder
from evomerge.run.preflight import algorithm_problems, look_before
from evomerge.run.warm_start import read_seeds, warm_starts
from evomerge.spec.schema import Search, SearchSpec
from evomerge.study.budget import StopConditions, spent_items
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings, Executor, NullTracker, SearchInfo, Tracker
from evomerge.study.loop import Finished, search
from evomerge.study.record import Record
from evomerge.system.yaml import write_yaml
from evomerge.trackers.console import ConsoleTracker

log = logging.getLogger("evomerge")

_MOST_DEATHS = 4  # of processes, over one candidate: fewer may be kills that are none of its doing
_MOST_RANDOM = 10  # times the search's candidates, for a random search whose candidates see few items each


def start(
    spec: SearchSpec,
    *,
    source: Path | None = None,
    candidates: int | None = None,
    folder: Path | None = None,
    workers: int | None = None,
) -> RunResult:
    """Runs a search, or goes on with it when its folder exists.

    Args:
        spec: The specification.
        source: The search.yaml it was read from, kept as given.
        candidates: Budget instead of the specification's. That of a run that exists can only grow.
        folder: Run folder instead of the specification's.
        workers: Processes that score candidates, instead of the specification's number.

    Raises:
        BadInput: When anything named in the specification cannot be used; found before the search begins.
        KeyboardInterrupt: When the user stopped it; the run can be resumed.
    """
    if problems := algorithm_problems(spec):
        raise SpecError(problems)
    if candidates is not None:
        spec = _with_budget(spec, candidates)
    given = source.read_text(encoding="utf-8") if source else write_yaml(spec.model_dump(mode="json"))
    root = folder or spec.folder
    if not (root / STARTS).is_file():
        read_seeds(spec)  # so that a wrong one leaves no folder behind
    opened = RunFolder.create(root, spec, given)
    if candidates is None:  # the run may have been extended beyond the file's budget
        spec = _with_budget(spec, max(spec.search.candidates, opened.spec.search.candidates))
    return _go(opened, _with_workers(spec, workers))


def resume(root: Path, *, candidates: int | None = None, workers: int | None = None) -> RunResult:
    """Goes on with a run from where it stopped.

    Args:
        root: The run folder.
        candidates: Extend the budget to this many candidates.
        workers: Processes that score candidates from now on.

    Raises:
        RunError: When there is no run, another process holds it, or its models or data have changed.
    """
    folder = RunFolder.existing(root)
    spec = folder.spec if candidates is None else _with_budget(folder.spec, candidates)
    return _go(folder, _with_workers(spec, workers))


def _with_budget(spec: SearchSpec, candidates: int) -> SearchSpec:
    return spec.model_copy(update={"search": spec.search.model_copy(update={"candidates": candidates})})


def _with_workers(spec: SearchSpec, workers: int | None) -> SearchSpec:
    if workers is None:
        return spec
    if workers < 1:
        raise SpecError(f"run.workers: at least 1 process scores candidates; got {workers}")
    return spec.model_copy(update={"run": spec.run.model_copy(update={"workers": workers})})


def _go(folder: RunFolder, spec: SearchSpec) -> RunResult:
    """Searches under `spec`, which is the folder's own but for what may change under a run."""
    budget = folder.spec.search.candidates
    if spec.search.candidates < budget:
        raise RunError(f"{folder.root}: the budget is {budget}; --candidates can only extend it")
    with folder.hold(), _logging_to(folder.root / "log.txt"), closing(ConsoleTracker()) as tracker:
        tracker.begin(folder.spec.name)
        folder.sweep()
        if spec != folder.spec:
            folder.write_spec(spec)
        tracker.report("opening models and tasks")
        bench = Workbench(folder.spec)
        for text in folder.settle_environment(bench.environment()):
            tracker.report(text)
        _settle_starts(folder, bench)
        scorer = Scorer(bench, folder)
        record = folder.record(bench.space, report=tracker.report)
        if not len(record):  # a run that goes on has passed them
            for text in [*bench.look_at_items(), *look_before(bench)]:
                tracker.report(text, "warning")
        wanted = folder.spec.search
        tracker.started(
            SearchInfo(
                folder=str(folder.root),
                algorithm=wanted.algorithm,
                budget=wanted.candidates,
                genes=bench.space.size,
                objectives=tuple(folder.spec.objectives),
                recorded=record.candidates(),
            )
        )
        scorer.settle(tracker)
        stop = StopConditions(
            wanted.candidates,
            **wanted.stop.model_dump(),
            gradient_items=scorer.gradient_items,
            since=folder.extended_from(),
        )
        with _executor(folder, bench, scorer, tracker) as executor:
            ended = _search(folder, bench, scorer, executor, record, wanted.algorithm, stop, tracker.candidate)
            tracker.report(ended.message)
            if ended.reason == "interrupted":
                raise KeyboardInterrupt
            if ended.reason == "failures":
                raise EvoMergeError(f"{folder.root}: {ended.message}{_what_to_do(ended.candidates)}")
            if ended.reason in ("stale", "target"):
                tracker.report(
                    f"`evomerge resume {folder.root} --candidates N` goes on, with N above {wanted.candidates}"
                )
            baseline = _baseline(folder, bench, scorer, executor, ended.candidates, tracker)
        ending = Ending(ended.reason, ended.message, extended_from=stop.since)
        result = choose_winner(bench, scorer, ended.candidates, tracker, ending, baseline, where=str(folder.root))
        folder.write_result(result)
        if scorer.reused:
            tracker.report(f"{scorer.reused} item evaluations of this session came from the cache of earlier runs")
        if result.within_noise_of:
            tracker.report(result.verdict, "warning")
        keep_best(bench, folder, result, tracker)
        tracker.report(f"peak memory {_peak(folder.spec.run.workers)}, the models' memory-mapped files included")
    return result


def _settle_starts(folder: RunFolder, bench: Workbench) -> None:
    """Keeps what a warm start begins with, so that going on needs nothing but the run's own folder."""
    if folder.spec.search.warm_starts and folder.starts() is None:
        folder.write_starts(warm_starts(bench))


def _what_to_do(found: tuple[Candidate, ...]) -> str:
    """The way on from failures that have one cause."""
    kinds = {c.failure_kind for c in found[-1:]} & {"out of memory", "MemoryError", "OutOfMemoryError"}
    memory = "; a lower evaluation.batch_tokens takes less memory" if kinds else ""
    return f". One cause is likely, and no recipe's; log.txt has the details{memory}; then the same command goes on"


def _peak(workers: int) -> str:
    """The most memory that this process has had, and the largest of its workers."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, worker = (resource.getrusage(who).ru_maxrss * 1024 / 1e9 for who in whose)
    return f"{own:.2f} GB" + (f", and {worker:.2f} GB of the largest of {workers} workers" if workers > 1 else "")


@contextmanager
def _executor(folder: RunFolder, bench: Workbench, scorer: Scorer, tracker: Tracker) -> Iterator[Executor]:
    """What scores candidates, for the length of a block: this process, or as many workers as are wanted."""
    count = folder.spec.run.workers
    if count == 1:
        yield InProcess(partial(_survived, folder, scorer), scorer.before_generation)
        return
    share = max(1, bench.threads // count)
    tracker.report(f"{count} workers, of {share} of the {bench.threads} threads each; what they say is in log.txt")
    if folder.spec.evaluation.backend != "native":
        tracker.report(
            "with this backend, numbers are the same for any number of workers up to rounding only", "warning"
        )
    bench.release()
    workers = LocalWorkers(
        count,
        "evomerge.run.search:open_worker",
        (folder.root, bench.threads, share),
        scorer.rivals,
        folder.root / "log.txt",
        partial(_worker_environment, folder.spec.evaluation.device, share),
    )
    try:
        yield workers
    finally:
        workers.close()
        folder.sweep()


def open_worker(root: Path, threads: int, share: int) -> Opened:
    """Opens a run's models and tasks in a worker process, and fixes what its driver has fixed.

    Args:
        root: The run folder.
        threads: Of the run.
        share: Of these, how many are this process's.
    """
    import torch

    torch.set_num_threads(share)
    folder = RunFolder.existing(root)
    scorer = Scorer(Workbench(folder.spec, threads), folder)
    scorer.settle(NullTracker())
    return scorer.race_against, scorer


def _survived(folder: RunFolder, evaluate: Callable[[Proposal], Outcome], proposal: Proposal) -> Outcome:
    """Scores a proposal here, unless it has killed one process after the other: then it has failed."""
    with folder.attempting(proposal.recipe_hash) as deaths:
        if deaths < _MOST_DEATHS:
            return evaluate(proposal)
    failure = f"killed: {deaths} processes in a row died while they scored it; the system may have run out of memory"
    return Outcome(None, state="failed", failure=failure)


def _worker_environment(device: str, share: int, slot: int) -> dict[str, str]:
    """The environment that gives a worker its share of the cores, and the devices in turn."""
    environment = {"OMP_NUM_THREADS": str(share)}
    if device == "cuda":
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)] if devices else ""
    return environment


def _search(
    folder: RunFolder,
    bench: Workbench,
    scorer: Scorer,
    executor: Executor,
    record: Record,
    algorithm: str,
    stop: StopConditions,
    progress: Callable[[Candidate], None],
) -> Finished:
    """One search of the run's space, on its items and by its seed."""
    # Where items end a search in the middle of a generation, the order decides which candidates there are.
    arrange = scorer.arrange if folder.spec.evaluation.reuse_prefixes and stop.items is None else None
    return search(
        bench.space,
        get_algorithm(algorithm),
        executor,
        record,
        stop,
        seed=folder.spec.search.seed,
        settings=settings_of(folder.spec.search, scorer, algorithm),
        starts=folder.starts(),
        progress=progress,
        arrange=arrange,
        asynchronous=folder.spec.search.mode == "asynchronous",
    )


def settings_of(wanted: Search, scorer: Scorer, algorithm: str | None = None) -> AlgorithmSettings:
    """What an algorithm is told: its options, where it is the specification's own, and whom to ask."""
    own = algorithm in (None, wanted.algorithm)
    population = wanted.population or get_algorithm(wanted.algorithm).population
    return AlgorithmSettings(
        population, wanted.options if own else {}, item_scores=scorer.items, gradients=scorer.slopes
    )


def _baseline(
    folder: RunFolder,
    bench: Workbench,
    scorer: Scorer,
    executor: Executor,
    found: tuple[Candidate, ...],
    tracker: Tracker,
) -> tuple[Candidate, ...]:
    """The candidates of a random search that spends as many item evaluations as the search did, if one is asked for.

    It begins with the same generation 0, races by the same rule, and may try several times as many candidates where
    racing stops most of them early.
    """
    if folder.spec.search.baseline is None:
        return ()
    items = max(spent_items(found, scorer.gradient_items))
    tracker.report(f"random search as a baseline: {items} item evaluations, as the search had")

    def progress(candidate: Candidate) -> None:
        value = candidate.failure if candidate.fitness is None else f"{candidate.fitness:.4f} ({candidate.state})"
        tracker.report(f"random search, candidate {candidate.number}: {value}")

    record = folder.record(bench.space, baseline=True, report=tracker.report)
    stop = StopConditions(_MOST_RANDOM * len(found), items=items)
    ended = _search(folder, bench, scorer, executor, record, "random", stop, progress)
    if ended.reason == "interrupted":
        raise KeyboardInterrupt
    tracker.report(f"random search: {ended.message}")
    return ended.candidates


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Sends our log and Python's warnings to the run's log file for the length of a block."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
