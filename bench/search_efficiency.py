"""How many item evaluations a search needs: the default one beside random search, CMA-ES and every other algorithm.

    python bench/search_efficiency.py runs/efficiency                                  # the zoo, live
    python bench/search_efficiency.py runs/efficiency --contenders default random --seeds 5
    python bench/search_efficiency.py runs/efficiency-real --search search_spaces/real.yaml --seeds 1

Every contender searches the same models on the same items (drawn by the seed), and spends as many item evaluations as
random search without racing has for its candidates; what a Jacobian costs is counted in. A search's quality, after any
number of evaluations, is the fitness of its best candidate so far on the `test` items, which steer nothing. Finished
runs are kept in the folder, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from evomerge.report.tables import table
from evomerge.spec.load import load_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate
from evomerge.system.files import write_atomic

QUICKSTART = Path(__file__).parent.parent / "search_spaces" / "quickstart.yaml"


@dataclass(frozen=True)
class Contender:
    """A way to search.

    Attributes:
        search: What it changes of the `search` part of the specification.
        space: What it changes of the `space` part.
        models: What it changes of the `models` part.
        racing: Whether it races; None for what the specification says.
        outer: Whether embeddings, final norm and head have genes of their own.
        baselines: Whether generation 0 holds what a person would try first.
    """

    search: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Any] = field(default_factory=dict)
    racing: bool | None = None
    outer: bool = True
    baselines: bool = True


COARSE: Mapping[str, Any] = {"layer_groups": 3, "tensor_groups": None}
"""The genes that the others search: with fewer they are better than with the default's (a gene a layer)."""


def _mergekit(method: str, genes: int) -> Contender:
    """CMA-ES as mergekit-evolve runs it.

    One method, weights (and densities) of whole slices, pycma's population for so many genes, no baselines, no racing.
    """
    ranges = {"weight": {"low": 0.0, "high": 2.0}, "lambda": {"low": 1.0, "high": 1.0}}
    if method != "task_arithmetic":
        ranges["density"] = {"low": 0.0, "high": 1.0}
    return Contender(
        {"algorithm": "cmaes", "options": {"like_mergekit": True}, "population": 4 + int(3 * math.log(genes))},
        {**COARSE, "methods": [method], "genes": ranges},
        racing=False,
        outer=False,
        baselines=False,
    )


_BRED: dict[str, Any] = {
    "algorithm": "ga",
    "options": {"jacobian_steps": False, "trust_region": False},
    "population": 16,
}
OTHERS = ("tpe", "cmaes", "gp", "nsga2", "nsga3", "catcma", "map_elites")
CONTENDERS: dict[str, Contender] = {
    "default": Contender(),
    "shuffled": Contender(models={"shuffled": True}),
    "random": Contender({"algorithm": "random"}, COARSE, racing=False),
    "random, raced": Contender({"algorithm": "random"}, COARSE),
    **{  # four sources, three slices
        f"mergekit-evolve, {method}": _mergekit(method, genes)
        for method, genes in (("task_arithmetic", 12), ("ties", 24), ("dare_ties", 24))
    },
    **{name: Contender({"algorithm": name}, COARSE) for name in OTHERS},
    "three rounds": Contender({"rounds": 3}),
    "with stages": Contender(space={"after": ["svc"]}),
    "with newer methods": Contender(space={"methods": ["task_arithmetic", "ties", "dare_ties", "ram", "wudi"]}),
    **{  # real genes only
        name: Contender({"algorithm": name, "population": 4}, {**COARSE, "methods": ["task_arithmetic"]})
        for name in ("turbo", "qlognei")
    },
    "ga without steps": Contender({"algorithm": "ga", "options": {"jacobian_steps": False}}, COARSE),
    "ga, bred only": Contender(_BRED, COARSE),
}


def spec_of(path: Path, contender: Contender, seed: int, candidates: int, finalists: int | None) -> SearchSpec:
    """The specification that a contender runs."""
    spec = load_spec(path)
    racing = spec.evaluation.racing if contender.racing is None else contender.racing
    evaluation = spec.evaluation.model_copy(update={"racing": racing, "guard": []})
    search = spec.search.model_copy(
        update={"seed": seed, "candidates": candidates, "baseline": None, **contender.search}
        | ({} if finalists is None else {"finalists": finalists})
    )
    data = spec.model_dump() | {"evaluation": evaluation.model_dump(), "search": search.model_dump()}
    data["space"] |= dict(contender.space)
    data["models"] |= dict(contender.models)
    data["run"] |= {"keep": 0}
    return SearchSpec.model_validate(data)


def run(
    name: str, path: Path, seed: int, candidates: int, folder: Path, items: int | None, ends: bool
) -> dict[str, Any]:
    """One search from start to end; the summary of one that is finished is read back.

    Args:
        name: The contender.
        path: The search.yaml.
        seed: Seed of the search and of the splits.
        candidates: Candidates at most.
        folder: Where the run goes.
        items: Item evaluations at most; None for no limit.
        ends: Whether only the best of generation 0 and the best of all, the one finalist, are scored on unseen items.
    """
    summary = folder / "efficiency.json"
    if summary.is_file():
        return dict(json.loads(summary.read_text()))
    from evomerge.algorithms.registry import get_algorithm
    from evomerge.evaluation.splits import TEST
    from evomerge.executors.in_process import InProcess
    from evomerge.problem.candidate_evaluator import CandidateEvaluator
    from evomerge.problem.model_runner import ModelRunner
    from evomerge.problem.prepare_objective import prepare_objective
    from evomerge.problem.problem import make_space, open_problem
    from evomerge.report.result import Ending
    from evomerge.run.export import open_run
    from evomerge.run.finalists import choose_winner
    from evomerge.run.folder import RunFolder
    from evomerge.run.search import settings_of, start
    from evomerge.study.budget import StopConditions, spent_items
    from evomerge.study.interfaces import NullTracker
    from evomerge.study.loop import search

    contender = CONTENDERS[name]
    if contender.search.get("algorithm") in ("turbo", "qlognei"):
        import bench.opponents  # noqa: F401  (they register themselves)
    spec = spec_of(path, contender, seed, candidates, 1 if ends else None)
    rounds = spec.search.rounds > 1
    if rounds:
        stop = spec.search.stop.model_copy(update={"items": items})
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"stop": stop})})
        result = start(spec, folder=folder)
        opened = RunFolder.existing(folder)
    else:
        opened = RunFolder.create(folder, spec, "")
    problem = open_run(opened) if rounds else open_problem(spec)
    if not contender.outer:
        problem = replace(problem, space=make_space(spec, problem.checkpoints, outer=False))
    runner = ModelRunner(problem)
    objective = prepare_objective(problem, runner, opened.scores, NullTracker())
    evaluator = CandidateEvaluator(problem, runner, opened.scores, objective)
    if not rounds:
        ended = search(
            problem.space,
            get_algorithm(spec.search.algorithm),
            InProcess(evaluator, evaluator.begin_generation),
            opened.record(problem.space),
            StopConditions(candidates, items=items, jacobian_items=evaluator.jacobian_items),
            seed=seed,
            settings=settings_of(spec.search, evaluator),
            starts=None if contender.baselines else (),
        )
        ending = Ending(ended.reason, ended.message, extended_from=0)
        result = choose_winner(problem, evaluator, ended.candidates, NullTracker(), ending, where=str(folder))
        opened.write_result(result)
    order = sorted(opened.candidates(), key=lambda c: c.number)
    spent = list(spent_items(order, evaluator.jacobian_items))
    track = _track(order, spent, lambda c: objective.fitness.unweighted(evaluator.scores(c.recipe, TEST)[0]), ends)
    guess = max(
        (c for c in order if c.generation == 0 and c.fitness is not None and c.state == "done"),
        key=lambda c: c.fitness or 0.0,
    )

    def on_test(number: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
        scores, _ = evaluator.scores(recipe, TEST)
        fitness = {"fitness": objective.fitness.unweighted(scores), "reported": objective.reported(scores)}
        return {"candidate": number, "recipe": recipe, **fitness}

    summarised = {
        "name": name,
        "seed": seed,
        "items": spent[-1],
        "candidates": len(order),
        "pruned": sum(c.state == "pruned" for c in order),
        "reason": result.ended.reason,
        "track": track,
        "guess": on_test(guess.number, guess.recipe),
        "winner": on_test(result.winner.candidate, result.winner.recipe),
    }
    write_atomic(summary, json.dumps(summarised, indent=1))
    return summarised


def _track(
    candidates: Sequence[Candidate], spent: Sequence[int], unseen: Callable[[Candidate], float], ends: bool
) -> list[list[float]]:
    """(item evaluations, fitness, fitness on unseen items, number) of every candidate that was the best so far."""
    track: list[tuple[int, float, Candidate]] = []
    for candidate, after in zip(candidates, spent, strict=True):
        best = track[-1][1] if track else -math.inf
        if candidate.state == "done" and candidate.fitness is not None and candidate.fitness > best:
            track.append((after, candidate.fitness, candidate))
    if ends:
        first = [one for one in track if one[2].generation == 0][-1:]
        track = [*first, *(one for one in track[-1:] if one not in first)]
    return [[after, best, unseen(candidate), candidate.number] for after, best, candidate in track]


def reached(track: Sequence[Sequence[float]], quality: float) -> float:
    """The item evaluations after which a search's best candidate is this good on unseen items; infinite if never."""
    return next((row[0] for row in track if row[2] >= quality), math.inf)


def final(summarised: Mapping[str, Any]) -> float:
    """The quality that a search ends with: its best candidate's fitness on unseen items."""
    return float(summarised["track"][-1][2])


def against(name: str, default: Mapping[int, Any], other: Mapping[int, Any], default_name: str) -> list[str]:
    """A line of the table: the default search beside another, seed by seed."""
    seeds = sorted(default.keys() & other.keys())
    shares = [reached(default[s]["track"], final(other[s])) / other[s]["items"] for s in seeds]
    gains = [default[s]["winner"]["fitness"] - other[s]["winner"]["fitness"] for s in seeds]
    reported = [default[s]["winner"]["reported"] - other[s]["winner"]["reported"] for s in seeds]
    guesses = [[other[s]["winner"][key] - other[s]["guess"][key] for s in seeds] for key in ("fitness", "reported")]
    return [
        name,
        str(len(seeds)),
        f"{statistics.fmean(other[s]['candidates'] for s in seeds):.0f}",
        f"{statistics.fmean(other[s]['winner']['fitness'] for s in seeds):.4f}",
        f"{statistics.fmean(other[s]['winner']['reported'] for s in seeds):.4f}",
        "" if name == default_name else _spread(gains),
        "" if name == default_name else _spread(reported),
        "" if name == default_name else f"{sum(g > 0 for g in gains)}/{len(gains)}",
        "" if name == default_name else f"{statistics.median(shares):.2f}",
        *map(_spread, guesses),
    ]


def _spread(values: Sequence[float]) -> str:
    """Mean and its standard error over the seeds."""
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    return f"{statistics.fmean(values):+.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


HEADER = [
    *("contender", "seeds", "candidates", "winner, unseen items", "as reported"),
    *("default is better by", "as reported", "wins", "default gets there in"),
    *("better than the best of generation 0 by", "as reported"),
]


def summary(folder: Path, default: str) -> str:
    """The table of all finished runs in a folder."""
    runs: dict[str, dict[int, Any]] = {}
    for path in sorted(folder.glob("*/efficiency.json")):
        one = json.loads(path.read_text())
        runs.setdefault(one["name"], {})[one["seed"]] = one
    names = [name for name in CONTENDERS if name in runs]
    return table(HEADER, [against(name, runs[default], runs[name], default) for name in names])


def winners(folder: Path, default: str, seed: int) -> str:
    """The winners of one seed on its `test` items, paired: as reported, and by the fitness that steered."""
    from evomerge.evaluation.splits import TEST
    from evomerge.problem.candidate_evaluator import CandidateEvaluator
    from evomerge.problem.model_runner import ModelRunner
    from evomerge.problem.prepare_objective import prepare_objective
    from evomerge.run.export import open_run
    from evomerge.run.folder import RunFolder
    from evomerge.study.interfaces import NullTracker

    read: dict[str, tuple[Any, Any]] = {}
    for name in CONTENDERS:
        if (folder / f"{_slug(name)}-{seed}" / "result.json").is_file():
            opened = RunFolder.existing(folder / f"{_slug(name)}-{seed}")
            problem = open_run(opened)
            runner = ModelRunner(problem)
            objective = prepare_objective(problem, runner, opened.scores, NullTracker())
            evaluator = CandidateEvaluator(problem, runner, opened.scores, objective)
            result = opened.result()
            if result is not None:
                read[name] = objective, evaluator.scores(result.winner.recipe, TEST)[0]
    objective, best = read[default]
    rows = []
    for name, (_, scores) in read.items():
        row = [name]
        for fitness in (objective.reported, objective.fitness.unweighted):
            row.append(f"{fitness(scores):.3f} ± {fitness.stderr(scores):.3f}")
            row.append("" if name == default else "{:+.3f} ± {:.3f}".format(*fitness.difference(best, scores)))
        rows.append(row)
    header = ["winner of", "test fitness", f"{default} is better by", "as steered", f"{default} is better by"]
    return table(header, rows)


def _work(job: tuple[str, Path, int, int, Path, int | None, bool]) -> str:
    summarised = run(*job)
    name, _, seed, *_ = job
    winner = summarised["winner"]
    return (
        f"{name}, seed {seed}: {summarised['candidates']} candidates ({summarised['pruned']} pruned), "
        f"{summarised['items']} items, winner {winner['fitness']:.4f}, reported {winner['reported']:.4f} "
        f"({summarised['reason']})"
    )


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contenders", nargs="+", choices=sorted(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--default", default="default", help="the contender that the others are compared with")
    parser.add_argument("--search", type=Path, default=QUICKSTART)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20], help="how many; or from, to")
    parser.add_argument("--candidates", type=int, default=100, help="of random search without racing")
    parser.add_argument("--items", type=int, help="item evaluations of every search; default: those of random search")
    parser.add_argument(
        "--ends", action="store_true", help="only ends on unseen items, one finalist: a fifth of the time"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--winners", type=int, metavar="SEED", help="only print the winners of a seed, paired by item")
    options = parser.parse_args()
    if options.winners is not None:
        print(winners(options.folder, options.default, options.winners))
        return
    if not options.table:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        first, last = (0, options.seeds[0]) if len(options.seeds) == 1 else options.seeds
    if not options.table:
        items = options.items or search_items(options.search) * options.candidates
        jobs = [
            (
                name,
                options.search,
                seed,
                10 * options.candidates,
                options.folder / f"{_slug(name)}-{seed}",
                items,
                options.ends,
            )
            for seed in range(first, last)
            for name in options.contenders
        ]
        if options.workers > 1:  # each computes alone: two searches side by side are faster than one on two cores
            os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
            with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
                for line in pool.map(_work, jobs):
                    print(line, file=sys.stderr, flush=True)
        else:
            for job in jobs:
                print(_work(job), file=sys.stderr, flush=True)
    print(summary(options.folder, options.default))


def search_items(path: Path) -> int:
    """Items that steer the search of a specification."""
    from evomerge.evaluation.splits import SEARCH
    from evomerge.problem.problem import open_problem

    return sum(map(len, open_problem(load_spec(path)).splits[SEARCH].values()))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    main()
