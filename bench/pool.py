"""A pool of candidates scored item by item once, for every question about how to choose among candidates.

    python bench/pool.py runs/pool                                                   # the real models
    python bench/pool.py runs/zoo-pool --search search_spaces/quickstart.yaml --candidates 60

Candidates of a search space: what generation 0 holds, random genomes, then children that the genetic algorithm
makes of the best so far, by accuracy and by the smooth fitness in turn. One archive a candidate; the same command goes
on from where it stopped. `bench/fitness.py` and `bench/items.py` read the pool.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evomerge.algorithms.registry import get_algorithm
from evomerge.evaluation.scores import ItemScores, dump_scores, load_scores
from evomerge.objective.fitness import Fitness
from evomerge.space.baselines import baselines
from evomerge.space.space import SearchSpace
from evomerge.spec.load import load_spec
from evomerge.spec.schema import SearchSpec, Splits
from evomerge.study.candidate import Candidate, Outcome, Proposal, first_generation
from evomerge.study.interfaces import AlgorithmSettings

Scores = dict[str, ItemScores]

ITEMS = {"real_blimp_islands": 160, "real_blimp_agreement": 160, "real_arc_easy": 160, "real_gsm8k_bpb": 12}
OTHERS = 340  # items of any other task
RANDOM, CHILDREN = 10, 10
POOL_SEED = 20
SMOOTH = {"acc": "prob"}


def pool_spec(path: Path) -> SearchSpec:
    """The search whose search items are all the pool's."""
    spec = load_spec(path)
    tasks = [
        t.model_copy(update={"splits": Splits(search=ITEMS.get(t.task, OTHERS), select=2, test=2)})
        for t in spec.evaluation.tasks
    ]
    return spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"tasks": tasks})})


def smooth(fitness: Fitness, metric: str = "prob") -> Fitness:
    """The same goals by the probability (or the loss) of the right choice instead of accuracy."""
    goals = [
        replace(g, metric=metric, higher_is_better=metric == "prob") if g.metric == "acc" else g for g in fitness.goals
    ]
    return Fitness(tuple(goals))


def proposals(
    space: SearchSpace, fitness: Fitness, generation: int, known: Sequence[tuple[Proposal, Scores]]
) -> list[Proposal]:
    """The pool's next candidates."""
    if generation == 0:
        return first_generation(baselines(space), 1000)
    judge = smooth(fitness) if generation % 2 else fitness
    judge = judge.relative_to(
        [scores for p, scores in known if p.operator.startswith("parent:") and p.operator != "parent:base"]
    )
    history = tuple(Candidate.of(p, Outcome(judge(scores))) for p, scores in known)
    numbers = range(len(known), len(known) + (RANDOM if generation == 1 else CHILDREN))
    algorithm = get_algorithm("random" if generation == 1 else "ga")
    return algorithm(space, history, numbers, generation, POOL_SEED, AlgorithmSettings(population=8))


def load_pool(folder: Path) -> list[Scores]:
    """The candidates' scores, in order."""
    return [load_scores(path) for path in sorted(folder.glob("*.npz"))]


def main() -> None:
    """Scores what is missing."""
    from evomerge.evaluation.splits import SEARCH
    from evomerge.problem.problem import Workbench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--search", type=Path, default=Path("search_spaces/real.yaml"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Workbench(pool_spec(args.search))
    known: list[tuple[Proposal, Scores]] = []
    generation = 0
    while len(known) < args.candidates:
        for proposal in proposals(bench.space, bench.goals, generation, known):
            path = args.folder / f"{proposal.number:03d}.npz"
            if not path.is_file():
                started = time.process_time()
                scores, _ = bench.measure(bench.plan(proposal.recipe), bench.selections[SEARCH])
                partial = path.with_suffix(".partial")
                with partial.open("wb") as file:
                    dump_scores(file, scores)
                partial.rename(path)
                shown = " ".join(f"{g.task}={scores[g.task].score(g.metric).value:.3f}" for g in bench.goals.goals)
                print(
                    f"{proposal.number} {proposal.operator}: {shown} {time.process_time() - started:.0f} s CPU",
                    flush=True,
                )
            known.append((proposal, load_scores(path)))
        generation += 1


if __name__ == "__main__":
    main()
