"""Whether fewer but telling items rank candidates as well as more of them.

    python bench/pool.py runs/pool            # once
    python bench/items.py runs/pool

Many times over: a search split is drawn from the pool's items; the scouts (generation 0) are known on
all of it; the other candidates are scored on a part of it, drawn evenly or by `evaluation.informative`. How
far are differences between candidates from what the whole split says, and how good is the candidate that comes out
best on the items that nobody saw? Writes bench/results/items.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from fitness import Array, Pool
from pool import Scores, load_pool

from evomerge.objective.item_sampling import draw, item_spread
from evomerge.report.tables import table

HERE = Path(__file__).parent
SCOUTS = {"pool": 11, "zoo-pool": 12}
"""Candidates of generation 0, of each pool."""
DRAWS = 100
SHARE = 0.6  # of the pool's items are the search split
FRACTIONS = (0.25, 0.5, 0.75)
HEAD = """# Items that tell candidates apart

    python bench/items.py runs/zoo-pool runs/pool

The candidates that are no scouts are scored on a part of the search items: as many drawn evenly, or drawn by
`evaluation.informative` (more of those on which generation 0 wavers or disagrees) and weighted. `error of a
difference`: how far the difference of two candidates is from what all search items say (root mean square);
`variance saved`: of that error, at equal items. `best one's unseen fitness`: accuracy on the items that nobody saw of
the candidate that comes out best; `gain`: of the telling items over as many even ones, paired over the draws.

What it saves depends on the models. On the real ones, where most pairs of sentences are easy for every merge, it about
halves the squared error at equal items (few candidates so far, all of them random genomes); on the zoo a tenth of it,
and with the smooth fitness, which makes every item tell something, next to nothing. The winner is the same within noise
throughout, so it is off by default. Scouts that are the parents and the uniform average alone, and their disagreement
in accuracy as the measure, made the zoo's errors larger.
"""


def weights(
    scouts: Sequence[Scores],
    task: str,
    metric: str,
    search: Sequence[int],
    fraction: float,
    seed: int,
    *,
    telling: bool,
) -> Array:
    """How much each item of a task counts, [items]."""
    parts = [scores[task].take(search) for scores in scouts]
    spread = item_spread(parts, "prob" if metric == "acc" else metric) if telling else np.ones(len(search))
    sample = draw(parts[0].items, spread, fraction, np.random.default_rng([seed, 1]))
    place = {item: k for k, item in enumerate(scouts[0][task].items)}
    found = np.zeros(len(place))
    for item, weight in zip(sample.items, sample.weights, strict=True):
        found[place[item]] = weight
    return found


def relative(
    values: Pool, metrics: Mapping[str, str], counts: Mapping[str, Array], references: Mapping[str, float]
) -> Array:
    """The relative fitness of every candidate, [candidates]."""
    parts = []
    for task, metric in metrics.items():
        value = values.value(task, metric, counts[task][:, None])[:, 0]
        parts.append(references[task] / value if metric == "bits_per_byte" else value / references[task])
    return np.mean(parts, axis=0)


def references(values: Pool, metrics: Mapping[str, str], counts: Mapping[str, Array]) -> dict[str, float]:
    """The best source's value of each task."""
    found = {}
    for task, metric in metrics.items():
        sources = values.value(task, metric, counts[task][:, None])[values.sources, 0]
        found[task] = float(sources.min() if metric == "bits_per_byte" else sources.max())
    return found


def one_split(
    pool: Sequence[Scores], scouts: int, values: Pool, steering: str, seed: int
) -> dict[tuple[float, bool], tuple[float, float]]:
    """(fraction, telling) -> (root mean square error of differences, fitness of the best on unseen items)."""
    generator = np.random.default_rng(seed)
    sizes = {task: len(part.items) for task, part in pool[0].items()}
    search = {t: np.sort(generator.permutation(n)[: round(SHARE * n)]) for t, n in sizes.items()}
    steered = {t: steering if "acc" in part.metrics else "bits_per_byte" for t, part in pool[0].items()}
    judged = {t: "acc" if m == steering else m for t, m in steered.items()}
    every = {t: np.isin(np.arange(n), search[t]).astype(float) for t, n in sizes.items()}
    unseen = {t: 1 - mask for t, mask in every.items()}
    whole = {t: np.ones(n) for t, n in sizes.items()}
    truth = relative(values, judged, unseen, references(values, judged, whole))[scouts:]
    scale = references(values, steered, every)
    full = relative(values, steered, every, scale)[scouts:]
    found = {(1.0, False): (0.0, float(truth[full.argmax()]))}
    for fraction in FRACTIONS:
        for telling in (False, True):
            counts = {
                t: weights(pool[:scouts], t, steered[t], search[t].tolist(), fraction, seed, telling=telling)
                for t in sizes
            }
            part = relative(values, steered, counts, scale)[scouts:]
            error = part - full
            # The part of the error that all candidates share moves no comparison.
            found[fraction, telling] = (float((error - error.mean()).std()) * np.sqrt(2), float(truth[part.argmax()]))
    return found


def report(pool: Sequence[Scores], scouts: int, steering: str) -> str:
    """The table of one pool."""
    values = Pool.of(pool, range(1, 5))
    rows = [one_split(pool, scouts, values, steering, seed) for seed in range(DRAWS)]
    lines = []
    for key in rows[0]:
        errors, chosen = np.array([row[key] for row in rows]).T
        plain = np.array([row[key[0], False] for row in rows])
        gain = chosen - plain[:, 1]
        name = "telling items, weighted" if key[1] else ("all search items" if key[0] == 1 else "evenly drawn")
        lines.append(
            [
                f"{key[0]:.0%}",
                name,
                f"{np.sqrt(np.mean(errors**2)):.4f}",
                f"{1 - np.mean(errors**2) / np.mean(plain[:, 0] ** 2):+.0%}" if key[1] else "",
                f"{chosen.mean():.4f}",
                f"{gain.mean():+.4f} ± {gain.std(ddof=1) / np.sqrt(len(gain)):.4f}" if key[1] else "",
            ]
        )
    header = ["of the items", "which", "error of a difference", "variance saved", "best one's unseen fitness", "gain"]
    return table(header, lines)


def main() -> None:
    """Writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pools", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "items.md")
    args = parser.parse_args()
    text = [HEAD]
    for folder in args.pools:
        pool = load_pool(folder)
        for steering in ("acc", "prob"):
            scouts = SCOUTS[folder.name]
            title = f"## {folder.name}: {len(pool)} candidates, {scouts} of them scouts, steered by `{steering}`\n"
            text += [title, report(pool, scouts, steering) + "\n"]
    args.out.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
