"""One search from start to end: opens its parts, joins them, and lets the loop run."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evomerge.algorithms.registry import get_algorithm
from evomerge.errors import EvoMergeError, RunError, SpecError
from evomerge.evaluation.score_store import CarriedScores, RunScores
from evomerge.evaluation.splits import SEARCH
from evomerge.executors.in_process import InProcess
from evomerge.executors.local import LocalWorkers
from evomerge.executors.pool import Opened, Pool
from evomerge.executors.ray import RayWorkers
from evomerge.problem.candidate_evaluator import CandidateEvaluator, Objective, RaceMessage
from evomerge.problem.lora_control import train_lora
from evomerge.problem.model_runner import ModelRunner, Runner
from evomerge.problem.prepare_objective import prepare_objective
from evomerge.problem.problem import Problem, environment, open_problem
from evomerge.recipe.parse import single_model
from evomerge.report.result import Ending, RunResult
from evomerge.run.export import keep_best
from evomerge.run.finalists import ScoredModel, best_of, choose_winner, winner_of
from evomerge.run.folder import ROUNDS, STARTS, RunFolder, require_same_content
from evomerge.run.preflight import algorithm_problems, check_models
from evomerge.run.rounds.sources import choose_winners, first_candidates, write_winners
from evomerge.run.warm_start import keep_known_scores, read_seeds, warm_starts
from evomerge.space.baselines import PARENT
from evomerge.spec.schema import Run, Search, SearchSpec
from evomerge.study.budget import StopConditions, spent_items
from evomerge.study.candidate import Candidate, Outcome, Proposal, find
from evomerge.study.interfaces import AlgorithmSettings, Executor, Level, LogTracker, NullTracker, SearchInfo, Tracker
from evomerge.study.loop import SearchResult, search
from evomerge.study.record import Record
from evomerge.study.rounds import RoundStart, winner_name, winner_number
from evomerge.system.files import read_text
from evomerge.system.quiet import log_to_file
from evomerge.system.yaml import write_yaml

log = logging.getLogger("evomerge")

_MAX_CRASHES = 4  # of processes, over one candidate: fewer may be kills that are none of its doing
_OTHER_LINES = 25  # candidates of a search beside the run's own between two lines about it
_MAX_BASELINE_RATIO = 10  # times the search's candidates, for a random search whose candidates see few items each


@dataclass(frozen=True)
class SearchParts:
    """What of a search touches models. Tests put a formula in its place (`evomerge.problem.fake_evaluator`).

    Attributes:
        open_problem: Opens what a specification names; with the threads of the run.
        make_runner: Makes what turns recipes into per-item scores.
        check: Looks at models before anything is spent; returns what is worth a warning.
        open_worker: What a worker process calls first, as ``module:function``; see `open_worker`.
    """

    open_problem: Callable[[SearchSpec, int | None], Problem] = open_problem
    make_runner: Callable[[Problem], Runner] = ModelRunner
    check: Callable[[Problem, Any], list[str]] = check_models
    open_worker: str = "evomerge.run.search:open_worker"


MODEL_PARTS = SearchParts()


def start(
    spec: SearchSpec,
    *,
    source: Path | None = None,
    candidates: int | None = None,
    folder: Path | None = None,
    workers: int | None = None,
    executor: str | None = None,
    ray_address: str | None = None,
    accept_edited: bool = False,
    tracker: Tracker | None = None,
    parts: SearchParts | None = None,
) -> RunResult:
    """Runs a search, or goes on with it when its folder exists.

    Args:
        spec: The specification.
        source: The search.yaml it was read from, kept as given.
        candidates: Budget instead of the specification's. That of a run that exists can only grow.
        folder: Run folder instead of the specification's.
        workers: Processes that score candidates, instead of the specification's number.
        executor: Who they are, instead of the specification's: local or ray.
        ray_address: The cluster of Ray, instead of the specification's.
        accept_edited: Take the run's files as they are, whatever has changed in them since they were written.
        tracker: Is told of the progress, and closed; None for the log alone.
        parts: What of the search touches models; None for models.

    Raises:
        BadInput: When anything named in the specification cannot be used; found before the search begins.
        KeyboardInterrupt: When the user stopped it; the run can be resumed.
    """
    if problems := algorithm_problems(spec):
        raise SpecError(problems)
    if candidates is not None:
        spec = _with_budget(spec, candidates)
    given = read_text(source, SpecError) if source else write_yaml(spec.model_dump(mode="json"))
    root = folder or spec.folder
    if not (root / STARTS).exists():
        read_seeds(spec)  # so that a wrong one leaves no folder behind
    new = not (root / "resolved.yaml").exists()
    opened = RunFolder.create(root, spec, given, accept_edited=accept_edited)
    if candidates is None:  # the run may have been extended beyond the file's budget
        spec = _with_budget(spec, max(spec.search.candidates, opened.spec.search.candidates))
    spec = _with_run(opened.with_chosen(spec), workers=workers, executor=executor, ray_address=ray_address)
    return _run(opened, spec, tracker, parts, new=new)


def resume(
    root: Path,
    *,
    candidates: int | None = None,
    workers: int | None = None,
    executor: str | None = None,
    ray_address: str | None = None,
    accept_edited: bool = False,
    tracker: Tracker | None = None,
    parts: SearchParts | None = None,
) -> RunResult:
    """Goes on with a run from where it stopped.

    Args:
        root: The run folder.
        candidates: Extend the budget to this many candidates.
        workers: Processes that score candidates from now on.
        executor: As for `start`.
        ray_address: As for `start`.
        accept_edited: As for `start`.
        tracker: As for `start`.
        parts: As for `start`.

    Raises:
        RunError: When there is no run, another process holds it, or its models or data have changed.
    """
    folder = RunFolder.existing(root, accept_edited=accept_edited)
    spec = folder.spec if candidates is None else _with_budget(folder.spec, candidates)
    spec = _with_run(spec, workers=workers, executor=executor, ray_address=ray_address)
    return _run(folder, spec, tracker, parts)


def _with_budget(spec: SearchSpec, candidates: int) -> SearchSpec:
    return spec.model_copy(update={"search": spec.search.model_copy(update={"candidates": candidates})})


def _with_run(spec: SearchSpec, **changes: Any) -> SearchSpec:
    """The specification with other entries of its `run:` section, where they are given."""
    given = {key: value for key, value in changes.items() if value is not None}
    try:
        return spec.model_copy(update={"run": Run.model_validate({**spec.run.model_dump(), **given})})
    except ValidationError as error:
        raise SpecError([f"run.{e['loc'][0]}: {e['msg']}; got {e['input']}" for e in error.errors()]) from None


def open_worker(
    spec: SearchSpec,
    content: Mapping[str, Any],
    objective: Objective,
    scores: RunScores,
    threads: int,
    share: int,
    parts: SearchParts | None = None,
) -> Opened:
    """Opens a run's problem where its candidates are scored, perhaps on another machine than its driver.

    Args:
        spec: The resolved specification.
        content: What the driver has seen of models and tasks; anything else is refused.
        objective: What candidates are compared by.
        scores: Where the run's scores are.
        threads: Of the run.
        share: Of these, how many are this process's.
        parts: As for `start`.
    """
    import torch

    torch.set_num_threads(share)
    parts = parts or MODEL_PARTS
    problem = parts.open_problem(spec, threads)
    opened = environment(problem)
    require_same_content(content, opened["content"])  # opened later than the driver's, perhaps other files by now
    runner = parts.make_runner(problem)
    evaluator = CandidateEvaluator(problem, runner, scores, objective)

    processor = torch.backends.cpu.get_cpu_capability()
    return Opened(
        evaluator.take_message,
        evaluator,
        scores.add,
        scores.take_written,
        {**opened["versions"], "processor": processor},
    )


def _run(
    folder: RunFolder, spec: SearchSpec, tracker: Tracker | None, parts: SearchParts | None, *, new: bool = False
) -> RunResult:
    """Searches under `spec`, which is the folder's own but for what may change under a run.

    A new run that is refused before its first candidate leaves no folder behind.
    """
    budget = folder.spec.search.candidates
    if spec.search.candidates < budget:
        raise RunError(f"{folder.root}: the budget is {budget}; --candidates can only extend it")
    with folder.hold(), log_to_file(folder.root / "log.txt", "evomerge"), closing(tracker or LogTracker()) as shown:
        shown.begin(folder.spec.name)
        folder.remove_partial_files()
        if spec != folder.spec:
            folder.write_spec(spec)
        try:
            session = _Session.open(folder, shown, parts or MODEL_PARTS)
        except EvoMergeError:
            if new:
                folder.remove()
            raise
        return session.run()


@dataclass(frozen=True)
class _Session:
    """A run that is open and held, and what it works with."""

    folder: RunFolder
    tracker: Tracker
    parts: SearchParts
    problem: Problem
    runner: Runner
    evaluator: CandidateEvaluator
    record: Record
    scores: RunScores

    @classmethod
    def open(cls, folder: RunFolder, tracker: Tracker, parts: SearchParts) -> _Session:
        """Opens models and tasks, and fixes what candidates are compared by."""
        spec = folder.spec
        tracker.report("opening models and tasks")
        problem = parts.open_problem(spec, None)
        if problem.spec != spec:
            spec = problem.spec
            folder.write_spec(spec)
            chosen = spec.evaluation.dtype
            tracker.report(f"evaluation.dtype: {chosen}, of float32 and bfloat16 the faster here; the run keeps it")
        for text in folder.check_environment(environment(problem)):
            tracker.report(text)
        runner = parts.make_runner(problem)
        begins = spec.search.warm_starts and folder.starts() is None  # going on needs nothing but the run's own folder
        if begins:
            warm_starts(spec, problem.space, problem.reference_model, runner.plan)  # what is wrong shows at once
            keep_known_scores(problem, runner, folder.scores)
        recorded = folder.candidates(torn=True)
        if recorded:  # another run's, too: then it is refused before anything is spent
            folder.record(problem.space, report=tracker.report)
        else:  # a run that goes on has passed them
            for text in parts.check(problem, runner):
                tracker.report(text, "warning")
        tracker.started(
            SearchInfo(
                folder=str(folder.root),
                algorithm=spec.search.algorithm,
                budget=spec.search.candidates,
                genes=problem.space.size,
                objectives=tuple(spec.objectives),
                recorded=recorded,
            )
        )
        objective = prepare_objective(problem, runner, folder.scores, tracker)
        record = folder.record(problem.space, report=tracker.report)
        evaluator = CandidateEvaluator(problem, runner, folder.scores, objective)
        if begins:
            starts = warm_starts(spec, problem.space, problem.reference_model, runner.plan, evaluator.known_outcome)
            folder.write_starts(starts)
        return cls(folder, tracker, parts, problem, runner, evaluator, record, folder.scores)

    def run(self) -> RunResult:
        """Searches, measures the winner, and keeps the best."""
        folder, tracker, spec = self.folder, self.tracker, self.folder.spec
        since = folder.extended_from()
        ended = self._search_rounds(since)
        if ended.reason in ("stale", "target"):
            budget = spec.search.candidates
            tracker.report(f"`evomerge resume {folder.root} --candidates N` goes on, with N above {budget}")
        others = self._baseline(ended.candidates)
        others += [model for name in spec.search.controls for model in self._control(name, ended.candidates)]
        ending = Ending(ended.reason, ended.message, extended_from=since)
        whole = self._with_all_sources()
        problem, runner = whole.problem, whole.runner
        result = choose_winner(
            problem, whole.evaluator, ended.candidates, tracker, ending, others, where=str(folder.root)
        )
        runner.check_inputs(whole=True)
        folder.write_result(result)
        if runner.reused:
            tracker.report(f"{runner.reused} item evaluations of this session came from the cache of earlier runs")
        if result.within_noise_of:
            tracker.report(result.verdict, "warning")
        if isinstance(runner, ModelRunner):  # a formula has no weights
            keep_best(problem, runner, folder, result, tracker)
        tracker.report(f"peak memory {_peak_memory(spec.run)}, the models' memory-mapped files included")
        return result

    def _search_rounds(self, since: int) -> SearchResult:
        """Searches round after round, each over the sources and the winners so far; gives the candidates of all.

        A round that another has followed has ended; what its record should have lost since then is scored again.
        """
        folder, section = self.folder, self.folder.spec.search
        items = self.evaluator.jacobian_items
        stop = StopConditions(section.candidates, **section.stop.model_dump(), jacobian_items=items, since=since)
        session, first = self, 0
        for left in range(section.rounds, 0, -1):
            history = tuple(c for c in folder.candidates(torn=True) if c.number < first)
            following = next((number for number in folder.rounds() if number > first), None)
            with session._executor() as executor:
                own = StopConditions(following - first) if following else stop.share(history, left, executor.slots)
                ended = session._search(executor, session.record, section.algorithm, own, session.tracker)
            if following is None:
                round_ = "" if section.rounds == 1 else f"round {section.rounds - left + 1} of {section.rounds}: "
                ended = replace(ended, message=f"{round_}{ended.message}")
                self.tracker.report(ended.message)
            if ended.reason == "interrupted":
                raise KeyboardInterrupt
            if ended.reason == "failures":
                raise EvoMergeError(f"{folder.root}: {ended.message}{_failure_hint(ended.candidates)}")
            if left == 1 or ended.reason == "target":
                break
            history = tuple(c for c in folder.candidates(torn=True) if following is None or c.number < following)
            start = RoundStart.after(history, following)
            session.runner.release()
            session, first = self._next_round(start, history), start.candidate
        return replace(ended, candidates=folder.candidates(torn=True))

    def _next_round(self, start: RoundStart, history: tuple[Candidate, ...]) -> _Session:
        """Opens the round that starts here, its sources the winners so far beside the first round's own."""
        root = self.folder.root / ROUNDS / str(start.candidate)
        whole = self if (root / STARTS).exists() else self._with_all_sources()  # what has begun needs no more of it
        if start.candidate in self.folder.rounds():
            names = list(RunFolder.existing(root).spec.models.winners)
        else:
            winners = choose_winners(whole.problem, whole.runner, whole.evaluator, history)
            names = [winner_name(winner.number) for winner in winners]
            self.tracker.report(f"the sources of the next round: those of the first, and {', '.join(names)}")
            write_winners(whole.problem, whole.runner, self.folder.root, history, winners)
        spec = self.folder.with_winners(names)
        spec = spec.model_copy(update={"run": spec.run.model_copy(update={"storage": None, "dir": None})})
        folder = RunFolder.create(root, spec, write_yaml(spec.model_dump(mode="json")))
        folder.remove_partial_files()
        if folder.spec != spec:
            folder.write_spec(spec)
        tracker = _LaterRound(self.tracker, start)
        session = self._over(self.parts.open_problem(spec, None), folder=folder, tracker=tracker)
        for text in folder.check_environment(environment(session.problem)):
            tracker.report(text)
        if folder.starts() is None:
            starts = first_candidates(session.problem.space, history)
            for one in starts:
                number = winner_number(one.name.removeprefix(PARENT))
                winner = None if number is None else find(history, number)
                if winner is not None:
                    plan = whole.runner.plan(winner.recipe)
                    session.evaluator.keep_known(
                        one.recipe, whole.evaluator.stored_scores(plan, self.evaluator.objective.split)
                    )
            folder.write_starts(starts)
        return session

    def _with_all_sources(self) -> _Session:
        """The session with the winners of all rounds open, so that every candidate can be made; itself without any."""
        if not self.folder.rounds():
            return self
        problem = self.parts.open_problem(self.folder.with_winners(), None)
        return self._over(replace(problem, spec=self.folder.spec))

    def _over(self, problem: Problem, *, folder: RunFolder | None = None, tracker: Tracker | None = None) -> _Session:
        """A session over other models, by the same objective and with the same scores."""
        folder, tracker = folder or self.folder, tracker or self.tracker
        runner = self.parts.make_runner(problem)
        evaluator = CandidateEvaluator(problem, runner, self.scores, self.evaluator.objective)
        record = self.record if folder is self.folder else folder.record(problem.space, report=tracker.report)
        return _Session(folder, tracker, self.parts, problem, runner, evaluator, record, self.scores)

    def _search(
        self,
        executor: Executor,
        record: Record,
        algorithm: str,
        stop: StopConditions,
        tracker: Tracker,
    ) -> SearchResult:
        """One search of the run's space, on its items and by its seed."""
        spec = self.folder.spec
        return search(
            self.problem.space,
            get_algorithm(algorithm),
            executor,
            record,
            stop,
            seed=spec.search.seed,
            settings=settings_of(spec.search, self.evaluator, algorithm),
            starts=self.folder.starts(),
            tracker=tracker,
            asynchronous=spec.search.mode == "asynchronous",
        )

    def _baseline(self, candidates: tuple[Candidate, ...]) -> list[ScoredModel]:
        """The winner of a random search with as many item evaluations as the search had, if one is asked for.

        It begins with the same generation 0, races by the same rule, and may try several times as many candidates where
        racing stops most of them early.
        """
        if self.folder.spec.search.baseline is None:
            return []
        record = self.folder.record(self.problem.space, baseline=True, report=self.tracker.report)
        ended = self._compared("random search", record, "random", candidates)
        return winner_of("random search", self.problem, self.evaluator, ended.candidates, self.tracker)

    def _compared(self, name: str, record: Record, algorithm: str, candidates: tuple[Candidate, ...]) -> SearchResult:
        """A search to compare one with that had these candidates: it has as many item evaluations."""
        items = max(spent_items(candidates, self.evaluator.jacobian_items))
        self.tracker.report(f"{name}: {items} item evaluations, as the search had")
        stop = StopConditions(
            _MAX_BASELINE_RATIO * len(candidates), items=items, jacobian_items=self.evaluator.jacobian_items
        )
        with self._executor() as executor:
            ended = self._search(executor, record, algorithm, stop, _OtherSearch(name, self.tracker))
        if ended.reason == "interrupted":
            raise KeyboardInterrupt
        self.tracker.report(f"{name}: {ended.message}")
        return ended

    def _control(self, name: str, candidates: tuple[Candidate, ...]) -> list[ScoredModel]:
        """The winner of a control: the same search over shuffled sources, or an adapter trained on the search items."""
        spec, root = self.folder.spec, self.folder.root / "controls" / name
        adapters = self._train(root, candidates) if name == "lora" else {}
        if name == "lora" and not adapters:
            return []
        changed = {"sources": adapters} if adapters else {"shuffled": True}
        other = spec.model_copy(
            update={
                "models": spec.models.model_copy(update=changed),
                "search": spec.search.model_copy(
                    update={"controls": [], "baseline": None, "warm_start": None, "rounds": 1}
                ),
                "run": spec.run.model_copy(update={"storage": None, "dir": None}),
            }
        )
        self.runner.release()
        folder = RunFolder.create(root / "run", other, write_yaml(other.model_dump(mode="json")))
        with folder.hold():
            session = _Session.open(folder, _OtherSearch(name, self.tracker), self.parts)
            if adapters:
                models = [ScoredModel(key, None, single_model(text), {}) for key, text in adapters.items()]
                return best_of("LoRA", session.problem, session.evaluator, models, self.tracker)
            ended = session._compared("shuffled sources", session.record, spec.search.algorithm, candidates)
            return winner_of("shuffled sources", session.problem, session.evaluator, ended.candidates, self.tracker)

    def _train(self, root: Path, candidates: tuple[Candidate, ...]) -> dict[str, str]:
        """Trains an adapter for as many item evaluations as the search had; by name, none of a formula."""
        if not isinstance(self.runner, ModelRunner):
            return {}
        items, reference = max(spent_items(candidates, self.evaluator.jacobian_items)), self.problem.reference
        self.tracker.report(f"LoRA: training on the search items for {items} item evaluations, as the search had")
        fitness, selection = self.evaluator.objective.fitness, self.problem.splits[SEARCH]
        seed = self.folder.spec.search.seed
        trained = train_lora(self.runner, reference, fitness, selection, root, items=items, seed=seed)
        return {path.name: f"{reference}+{path}" for path in trained}

    @contextmanager
    def _executor(self) -> Iterator[Executor]:
        """What scores candidates, for the length of a block: this process, or as many workers as the spec says."""
        folder, run = self.folder, self.folder.spec.run
        if run.workers == 1 and run.executor == "local":
            yield InProcess(partial(score_unless_crashing, folder, self.evaluator), self.evaluator.begin_generation)
            return
        if folder.spec.evaluation.backend != "native":
            text = "with this backend, numbers are the same for any number of workers up to rounding only"
            self.tracker.report(text, "warning")
        self.runner.release()
        pool = self._local_pool(run) if run.executor == "local" else self._ray_pool(run)
        try:
            yield pool
        finally:
            pool.close()
            folder.remove_partial_files()

    def _opener_arguments(self, scores: RunScores, share: int) -> tuple[Any, ...]:
        content, threads = environment(self.problem)["content"], self.problem.threads
        spec = self.folder.spec.model_copy(update={"run": Run()})  # a password stays here
        return spec, content, self.evaluator.objective, scores, threads, share

    def _local_pool(self, run: Run) -> Pool:
        """Processes of this machine, which keep scores in the run's folder themselves."""
        threads, log_file = self.problem.threads, self.folder.root / "log.txt"
        share = max(1, threads // run.workers)
        text = f"{run.workers} workers, of {share} of the {threads} threads each; their output is in log.txt"
        self.tracker.report(text)
        arguments = self._opener_arguments(self.scores, share)
        environ = partial(_worker_environment, self.folder.spec.evaluation.device, share)
        workers = LocalWorkers(self.parts.open_worker, arguments, log_file, environ)
        return Pool(workers, run.workers, self._incumbents, attach=lambda proposal: {})

    def _incumbents(self, history: tuple[Candidate, ...]) -> RaceMessage | None:
        incumbents = self.evaluator.incumbents(history)
        return None if incumbents is None else (incumbents, {})

    def _ray_pool(self, run: Run) -> Pool:
        """Actors of Ray, whose nodes need not see the run's folder: scores come and go with the messages."""
        resources = run.ray_resources or {"CPU": 1.0}
        if run.ray_resources is None and self.folder.spec.evaluation.device.startswith("cuda"):
            resources = {"CPU": 1.0, "GPU": 1.0}
        share = max(1, int(resources.get("CPU", 1)))
        where = run.ray_address or "this machine"
        self.tracker.report(f"Ray on {where}: up to {run.workers} actors with {share} of the run's threads each")
        arguments = self._opener_arguments(CarriedScores(), share)
        threads = {"OMP_NUM_THREADS": str(share)}
        workers = RayWorkers(self.parts.open_worker, arguments, run.workers, resources, run.ray_address, threads)
        report = partial(self.tracker.report, level="warning")
        evaluator, store = self.evaluator, self.scores
        return Pool(workers, run.workers, evaluator.race_message, evaluator.kept_files, store.add, report)


def settings_of(section: Search, evaluator: CandidateEvaluator, algorithm: str | None = None) -> AlgorithmSettings:
    """Returns what an algorithm gets: its options, where it is the specification's own, and whom to ask."""
    own = algorithm in (None, section.algorithm)
    population = section.population or get_algorithm(section.algorithm).population
    options = section.options if own else {}
    return AlgorithmSettings(population, options, local_model=evaluator.likelihood_model)


def score_unless_crashing(folder: RunFolder, evaluate: Callable[[Proposal], Outcome], proposal: Proposal) -> Outcome:
    """Scores a proposal in this process; fails it where it has killed one process after the other."""
    with folder.attempting(proposal.recipe_hash) as deaths:
        if deaths < _MAX_CRASHES:
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


class _LaterRound(NullTracker):
    """Shows the run's tracker the candidates of a later round among those of all rounds."""

    def __init__(self, tracker: Tracker, start: RoundStart) -> None:
        self._tracker, self._start = tracker, start

    def report(self, text: str, level: Level = "info") -> None:
        """Passes the line on."""
        self._tracker.report(text, level)

    def candidate(self, candidate: Candidate) -> None:
        """Passes the candidate on, as it is counted in the run."""
        self._tracker.candidate(self._start.in_all(candidate))


class _OtherSearch(NullTracker):
    """Logs the candidates of a search beside the run's own, and shows the run's tracker now and then how far it is."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker

    def candidate(self, candidate: Candidate) -> None:
        """Logs its fitness or its failure."""
        value = candidate.failure if candidate.fitness is None else f"{candidate.fitness:.4f} ({candidate.state})"
        log.info("%s, candidate %d: %s", self._name, candidate.number, value)
        if candidate.number % _OTHER_LINES == _OTHER_LINES - 1:
            self._tracker.report(f"{self._name}: {candidate.number + 1} candidates so far")


def _failure_hint(candidates: tuple[Candidate, ...]) -> str:
    """What to try where many candidates failed in one way."""
    kinds = {c.failure_kind for c in candidates[-1:]} & {"out of memory", "MemoryError", "OutOfMemoryError"}
    memory = "; a lower evaluation.batch_tokens takes less memory" if kinds else ""
    return f". One cause is likely, and no recipe's; log.txt has the details{memory}; then the same command goes on"


def _peak_memory(run: Run) -> str:
    """The most memory that this process has had, and the largest of its workers."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, worker = (resource.getrusage(who).ru_maxrss * 1024 / 1e9 for who in whose)
    more = f", and {worker:.2f} GB of the largest of {run.workers} workers"
    return f"{own:.2f} GB" + (more if run.workers > 1 and run.executor == "local" else "")
