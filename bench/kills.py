"""Kills a search at random moments, resumes it, and compares it with the search that nobody stopped.

    python bench/kills.py                                      # 200 kills of a scripted search, over all algorithms
    python bench/kills.py --kills 40 --algorithms ga random
    python bench/kills.py --kills 0 --runs 4                   # `evomerge run` on tiny models, killed twice each

A scripted search has failed and pruned candidates in it, decided by their recipes, and takes a fraction of a second.
The moment of a SIGKILL is uniform over the life of an uninterrupted one, opening the record and writing to it included;
after one kill in four the last line of the journal is cut at a random byte as well, as by a power cut.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.run.folder import RunFolder
from tests.frame import environment, search_spec
from tests.study.kills import Killed, campaign, recorded, scripted_campaign


def row(name: str, done: list[Killed], different: list[Path], length: float, counts: Counter[str]) -> list[str]:
    kills = sum(len(k.moments) for k in done)
    early = sum(size == 0 for k in done for size in k.recorded)
    return [
        name,
        f"{counts['done']} / {counts['pruned']} / {counts['failed']}",
        f"{length:.2f}",
        str(len(done)),
        str(kills),
        str(early),
        str(sum(k.torn for k in done)),
        f"{len(done) - len(different)} of {len(done)}",
    ]


def scripted(algorithm: str, kills: int, budget: int, seed: int, root: Path) -> tuple[list[str], list[Path]]:
    """The row of one algorithm."""
    done, different, length = scripted_campaign(algorithm, kills, budget, seed, root)
    counts = Counter(candidate["state"] for candidate in recorded(root / "whole")[0])
    return row(algorithm, done, different, length, counts), different


def real(runs: int, seed: int, root: Path) -> tuple[list[str], list[Path]]:
    """The row of `evomerge run` on tiny models."""
    from tests.models import write_tiny_llama  # torch, and its threads, which a fork must not have

    family = {"base": write_tiny_llama(root / "base", 0)}
    for number, name in enumerate("abc", start=1):
        family[name] = write_tiny_llama(root / name, number, base=family["base"])
    spec = root / "tiny.yaml"
    spec.write_text(yaml.safe_dump(search_spec(family, evaluation__racing=True)))

    def launch(folder: Path) -> int:
        command = [sys.executable, "-m", "evomerge", "run", str(spec), "--dir", str(folder)]
        return subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root
        ).pid

    def same(one: Path, other: Path) -> bool:
        results = [RunFolder.existing(folder).result() for folder in (one, other)]
        records = [recorded(folder, "tiny") for folder in (one, other)]
        weights = [[p.read_bytes() for p in sorted((f / "best").rglob("*.safetensors"))] for f in (one, other)]
        return bool(records[0] == records[1] and results[0] == results[1] and weights[0] == weights[1] != [])

    done, different, length = campaign(launch, root, 10**9, runs, seed, same)
    counts = Counter(candidate["state"] for candidate in recorded(root / "whole", "tiny")[0])
    return row("`evomerge run`", done, different, length, counts), different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, over the algorithms")
    parser.add_argument("--algorithms", nargs="+", default=sorted(ALGORITHMS), choices=sorted(ALGORITHMS))
    parser.add_argument("--candidates", type=int, default=45)
    parser.add_argument("--runs", type=int, default=0, help="of `evomerge run`, to kill up to three times each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    header = ["search", "done / pruned / failed", "seconds", "runs", "kills", "before a record", "torn", "same"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    bad: list[Path] = []
    with tempfile.TemporaryDirectory() as folder:
        for position, name in enumerate(arguments.algorithms if arguments.kills else ()):
            share = arguments.kills * (position + 1) // len(arguments.algorithms)
            share -= arguments.kills * position // len(arguments.algorithms)
            root = Path(folder) / name
            cells, different = scripted(name, share, arguments.candidates, arguments.seed + position, root)
            print("| " + " | ".join(cells) + " |", flush=True)
            bad += different
        if arguments.runs:
            root = Path(folder) / "tiny"
            root.mkdir()
            cells, different = real(arguments.runs, arguments.seed, root)
            print("| " + " | ".join(cells) + " |", flush=True)
            bad += different
    if bad:
        print(f"{len(bad)} runs differ from the uninterrupted one", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
