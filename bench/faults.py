"""Tries commands on damaged files for as long as it is given, and reports what came of it.

    python bench/faults.py                                   # an hour
    python bench/faults.py --minutes 5 --report faults.md    # and a table of attempts by kind

Each attempt damages one file that a command reads (tests/faults.py has the commands, the damages, and what is right).
An attempt that is broken is printed with its seed, which makes it again: --only COMMAND FILE DAMAGE SEED.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from tests.faults import COMMANDS, DAMAGES, Attempt, World
from tests.models import write_tiny_llama


def make_world(folder: Path) -> World:
    """Writes the models, and what is made of them."""
    base = write_tiny_llama(folder / "base", 0)
    family = {"base": base} | {
        name: write_tiny_llama(folder / name, seed, base=base) for seed, name in enumerate("ab", 1)
    }
    return World(folder, family)


def table(attempts: list[Attempt]) -> str:
    """Counts attempts by command, then by damage."""
    lines = []
    for what in ("command", "damage"):
        counts = Counter((getattr(a, what), "broken" if a.broken else a.outcome) for a in attempts)
        lines += [f"| {what} | attempts | survived | refused | broken |", "|---|---|---|---|---|"]
        for name in dict.fromkeys(sorted(getattr(a, what) for a in attempts)):
            row = [counts[name, outcome] for outcome in ("survived", "refused", "broken")]
            lines.append(f"| {name} | {sum(row)} | {' | '.join(map(str, row))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Tries, prints and reports; exit status 1 where anything is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", nargs=4, metavar=("COMMAND", "FILE", "DAMAGE", "SEED"))
    options = parser.parse_args()
    attempts: list[Attempt] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EVOMERGE_CACHE"] = str(Path(folder) / "cache")
        world = make_world(Path(folder))
        if options.only:
            command, file, damage, seed = options.only
            print(world.attempt(command, file, damage, int(seed)))
            return
        chance, end = random.Random(options.seed), time.monotonic() + 60 * options.minutes
        while time.monotonic() < end:
            command = chance.choice(options.commands)
            seed = chance.randrange(2**32)
            attempts.append(
                world.attempt(command, chance.choice(world.files(command)), chance.choice(sorted(DAMAGES)), seed)
            )
            if attempts[-1].broken:
                print(attempts[-1], flush=True)
    broken = sum(attempt.broken for attempt in attempts)
    text = f"# Commands over damaged files\n\n{len(attempts)} attempts, {broken} broken.\n\n{table(attempts)}"
    print(text)
    if options.report:
        options.report.write_text(text)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
