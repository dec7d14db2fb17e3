"""A search of the zoo under a constraint that binds, beside one without, by seed.

    python bench/constrained.py FOLDER --seeds 20 --candidates 40

Every seed has its own splits. A winner counts as feasible by the search and select items together, which chose it; what
the test items say of the constraint stands beside it. The loss is in mean accuracy on the test items.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from evomerge.report.result import RunResult
from evomerge.run.folder import RunFolder
from evomerge.run.preflight import parse_search
from evomerge.run.search import start

ROOT = Path(__file__).resolve().parent.parent
LIMITED = {"task": "zoo_facts", "metric": "acc", "at_least": "facts - 0.05"}
"""The tasks that steer lead away from it: unconstrained winners forget facts."""


def search_of(seed: int, candidates: int, *, constrained: bool) -> dict[str, Any]:
    """The search, with the constraint or without; the limited task guards where it is not."""
    skills = ("arithmetic", "agreement", "facts", "reverse")
    return {
        "name": f"constrained-{seed}" if constrained else f"free-{seed}",
        "models": {"base": "zoo:base", "sources": {name: f"zoo:{name}" for name in skills}},
        "space": {"methods": ["task_arithmetic", "ties"], "layer_groups": "per_layer"},
        "evaluation": {
            "include_path": str(ROOT / "eval"),
            "tasks": ["zoo_arithmetic", "zoo_agreement", "zoo_reverse"],
            "guard": ["zoo_facts"],
            "constraints": [LIMITED] if constrained else [],
            "scale": "raw",
            "racing": True,
            "splits": {"search": 0.3, "select": 0.2, "test": 0.5},
            "dtype": "float32",
        },
        "search": {"candidates": candidates, "seed": seed},
        "run": {"keep": 0},
    }


def result_of(folder: Path, spec: dict[str, Any]) -> RunResult:
    """The result of a search, which is carried out where it has not been."""
    run = RunFolder.existing(folder) if (folder / "result.json").exists() else None
    return (run.result() if run else None) or start(parse_search(spec), folder=folder)


def constrained(folder: Path, seeds: int, candidates: int) -> None:
    """Prints a row a seed, and the sum of all."""
    feasible, losses = 0, []
    print("| seed | beyond the limit, when chosen | verdict on test items | facts, limit | facts, free | loss |")
    print("|---|---|---|---|---|---|")
    for seed in range(seeds):
        free, limited = (
            result_of(folder / f"{kind}-{seed}", search_of(seed, candidates, constrained=kind == "constrained"))
            for kind in ("free", "constrained")
        )
        (constraint,) = limited.constraints
        parts = [(constraint.values[split], 3 if split == "search" else 2) for split in ("search", "select")]
        beyond = sum(weight * (part.limit - part.value) for part, weight in parts) / 5
        feasible += beyond <= 1e-9
        test = constraint.values["test"]
        forgotten = free.winner.scores["guard"]["zoo_facts"]["acc"].value
        losses.append(free.winner.fitness["test"].value - limited.winner.fitness["test"].value)
        row = f"{test.value:.3f}, {test.limit:.3f} | {forgotten:.3f} | {losses[-1]:+.3f} |"
        print(f"| {seed} | {beyond:+.3f} | {constraint.verdict} | {row}", flush=True)
    spread = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    print(f"\nfeasible winner in {feasible} of {seeds} seeds; loss {statistics.mean(losses):+.3f} ± {spread:.3f}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go; those that are there are read")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=40)
    chosen = parser.parse_args()
    constrained(chosen.folder, chosen.seeds, chosen.candidates)


if __name__ == "__main__":
    main()
