"""Which fitness picks candidates that do better on items that did not pick them.

    python bench/pool.py runs/pool            # once; hours of two cores at most, resumable
    python bench/fitness.py runs/pool

Many times over: some items of each task are the search items, the others are unseen; each fitness chooses the best
candidate of the pool on the search items; the chosen one is judged by the fitness that is reported (accuracy, relative
to the best source) on the unseen ones. Writes bench/results/fitness.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pool import Scores, load_pool

from evomerge.report.tables import table

Array = npt.NDArray[np.float64]
HERE = Path(__file__).parent
SIZES = (25, 50, 100)
SPLITS = 2000
HEAD = f"""# Which fitness picks better candidates

    python bench/pool.py runs/pool
    python bench/pool.py runs/zoo-pool --search search_spaces/quickstart.yaml --candidates 100
    python bench/fitness.py runs/zoo-pool runs/pool

Of each task's items some are search items, drawn {SPLITS:,} times; the others are unseen. Each fitness chooses the
best candidate of the pool on the search items. `unseen fitness` is what is reported: accuracy (bits per byte where that
is the metric), relative to the best source, on the unseen items. `regret`: how far the best candidate on the unseen
items is above the chosen one. `less accuracy's`: paired over the draws; its ± is the Monte Carlo error of the draws
alone, the last table of each pool resamples the candidates too. `rank corr.`: Spearman's, search against unseen.

The probability of the right choice (`evaluation.fitness: smooth`) is the default. On the zoo it chooses better than
accuracy at every size, by more than the candidates' own sampling error, and ranks the whole pool better. On the real
models it is better with few items and no different with 100; that pool is small, and most of it is generation 0 and
random genomes. The loss over the choices fails on the real models: a source that has learnt its task by heart has a
loss near zero, and everything else a ratio near zero to it. Nats per byte of the right choice do best on the real pool
and worst on the zoo, so they are no default; any metric can steer by its name.
"""
LOWER = {"loss", "nll_byte", "bits_per_byte"}


@dataclass(frozen=True)
class Pool:
    """Per-item values of every candidate.

    Attributes:
        sums: Task -> metric -> (numerators, denominators), each [candidates, items].
        sources: Positions of the source models.
    """

    sums: Mapping[str, Mapping[str, tuple[Array, Array]]]
    sources: Sequence[int]

    @classmethod
    def of(cls, pool: Sequence[Scores], sources: Sequence[int]) -> Pool:
        """From the candidates' scores."""
        return cls(
            {
                task: {
                    m: (
                        np.array([scores[task].metrics[m][0] for scores in pool]),
                        np.array([scores[task].metrics[m][1] for scores in pool]),
                    )
                    for m in part.metrics
                }
                for task, part in pool[0].items()
            },
            sources,
        )

    @property
    def steered(self) -> list[str]:
        """The tasks of right and wrong, for which there is a choice of fitness."""
        return [task for task, metrics in self.sums.items() if "acc" in metrics]

    def value(self, task: str, metric: str, weights: Array) -> Array:
        """Every candidate's metric, the items counted by `weights`: [candidates, splits]."""
        numerators, denominators = self.sums[task][metric]
        ratio = numerators @ weights / (denominators @ weights)
        return -ratio / np.log(2) if metric == "bits_per_byte" else ratio

    def part(self, task: str, metric: str, weights: Array) -> Array:
        """The same over the best source's, higher is better."""
        value = self.value(task, metric, weights)
        if metric in LOWER:
            return value[self.sources].min(axis=0) / value
        return value / value[self.sources].max(axis=0)


Steering = Mapping[str, Sequence[str]]
"""Name of a fitness -> the metrics whose parts are averaged in place of accuracy."""

FITNESSES: Steering = {
    "accuracy": ["acc"],
    "probability of the right choice": ["prob"],
    "both, half each": ["acc", "prob"],
    "loss over the choices": ["loss"],
    "nats per byte of the right choice": ["nll_byte"],
}


def fitness(pool: Pool, metrics: Sequence[str], weights: Mapping[str, Array]) -> Array:
    """The relative fitness of every candidate, [candidates, splits]."""
    parts = []
    for task in weights:
        own = metrics if task in pool.steered else ["bits_per_byte"]
        parts.append(np.mean([pool.part(task, metric, weights[task]) for metric in own], axis=0))
    return np.mean(parts, axis=0)


def masks(pool: Pool, tasks: Sequence[str], size: int, generator: np.random.Generator) -> dict[str, Array]:
    """Which items are search items, for each task: [items, splits]. Tasks with fewer items give as large a share."""
    largest = max(next(iter(pool.sums[task].values()))[0].shape[1] for task in tasks)
    found = {}
    for task in tasks:
        n = next(iter(pool.sums[task].values()))[0].shape[1]
        order = np.argsort(generator.random((n, SPLITS)), axis=0)
        found[task] = (np.argsort(order, axis=0) < max(2, round(size * n / largest))).astype(np.float64)
    return found


def compare(pool: Pool, tasks: Sequence[str], fitnesses: Steering, judge: Sequence[str]) -> str:
    """The table of one set of tasks."""
    rows = []
    for size in SIZES:
        searched = masks(pool, tasks, size, np.random.default_rng(size))
        unseen = {task: 1 - mask for task, mask in searched.items()}
        truth = fitness(pool, judge, unseen)
        first = None
        for name, metrics in fitnesses.items():
            steering = fitness(pool, metrics, searched)
            chosen = np.take_along_axis(truth, steering.argmax(axis=0)[None], axis=0)[0]
            regret = truth.max(axis=0) - chosen
            first = chosen if first is None else first
            gain = chosen - first
            share = float(np.mean(chosen >= np.sort(truth, axis=0)[-5]))
            rows.append(
                [
                    str(size),
                    name,
                    f"{chosen.mean():.4f}",
                    f"{regret.mean():.4f}",
                    "" if gain is first or not gain.any() else f"{gain.mean():+.4f} ± {_split_error(gain):.4f}",
                    f"{share:.0%}",
                    f"{np.mean([_rank_correlation(a, b) for a, b in zip(steering.T, truth.T, strict=True)]):.3f}",
                ]
            )
    header = ["items a task", "chosen by", "unseen fitness", "regret", "less accuracy's", "in the best 5", "rank corr."]
    return table(header, rows)


def _split_error(gain: Array) -> float:
    """Monte Carlo error of a mean over splits; the pool and its items stay the same."""
    return float(gain.std(ddof=1) / np.sqrt(len(gain)))


def _rank_correlation(a: Array, b: Array) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def over_pools(
    pool: Pool, tasks: Sequence[str], size: int, one: Sequence[str], other: Sequence[str]
) -> tuple[float, float]:
    """Mean gain of one fitness over the other, and its standard error over bootstrap samples of the candidates."""
    generator = np.random.default_rng(7)
    searched = masks(pool, tasks, size, generator)
    unseen = {task: 1 - mask for task, mask in searched.items()}
    truth, left, right = (
        fitness(pool, metrics, weights) for metrics, weights in ((["acc"], unseen), (one, searched), (other, searched))
    )
    candidates = len(truth)
    gains = []
    for _ in range(200):
        among = np.unique(generator.integers(0, candidates, candidates))
        chosen = [
            np.take_along_axis(truth[among], steering[among].argmax(axis=0)[None], axis=0)[0]
            for steering in (left, right)
        ]
        gains.append(float((chosen[0] - chosen[1]).mean()))
    return float(np.mean(gains)), float(np.std(gains))


def report(pool: Pool) -> list[str]:
    """The tables of one pool."""
    parts = ["All tasks, relative to the best source:\n", compare(pool, list(pool.sums), FITNESSES, ["acc"]) + "\n"]
    if set(pool.sums) != set(pool.steered):
        parts += ["The tasks of right and wrong alone:\n", compare(pool, pool.steered, FITNESSES, ["acc"]) + "\n"]
    normed = [task for task in pool.steered if "acc_norm" in pool.sums[task]]
    if normed:
        names: Steering = {
            "acc_norm": ["acc_norm"],
            "prob": ["prob"],
            "prob_norm": ["prob_norm"],
            "both": ["acc_norm", "prob_norm"],
        }
        parts += [
            f"{', '.join(normed)} alone, judged by `acc_norm`:\n",
            compare(pool, normed, names, ["acc_norm"]) + "\n",
        ]
    rows = []
    for size in SIZES:
        gain, error = over_pools(pool, list(pool.sums), size, ["prob"], ["acc"])
        rows.append([str(size), f"{gain:+.4f} ± {error:.4f}"])
    parts += [
        "Choosing by probability less choosing by accuracy, over bootstrap samples of the candidates:\n",
        table(["items a task", "unseen fitness"], rows) + "\n",
    ]
    return parts


def main() -> None:
    """Writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pools", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fitness.md")
    args = parser.parse_args()
    text = [HEAD]
    for folder in args.pools:
        scores = load_pool(folder)
        items = ", ".join(f"{task} {len(part.items)}" for task, part in scores[0].items())
        text += [f"## {folder.name}: {len(scores)} candidates ({items} items)\n", *report(Pool.of(scores, range(1, 5)))]
    args.out.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
