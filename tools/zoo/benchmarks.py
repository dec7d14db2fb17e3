"""Writes the zoo's benchmarks: `python -m tools.zoo.benchmarks eval/data`.

The shipped files under eval/data were made so; the same items come out every time.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.zoo.sizes import TEXT
from tools.zoo.skills import SKILLS, text_items

ITEMS = 360
"""Items of each skill: a half of them for search and select still leaves 180 to report on."""

TEXT_ITEMS = 200
"""Sentences of the guard."""

_SEED = "benchmark"


def benchmark_rows() -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of every benchmark, by the name of its file."""
    rows = {
        f"zoo_{name}.jsonl": [item.to_json() for item in skill.items(random.Random(f"{_SEED} {name}"), ITEMS)]
        for name, skill in SKILLS.items()
    }
    sentences = text_items(random.Random(f"{_SEED} {TEXT}"), TEXT_ITEMS)
    return rows | {f"zoo_{TEXT}.jsonl": [{"text": sentence} for sentence in sentences]}


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns one line of JSON for each row."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def main(arguments: list[str]) -> int:
    """Writes the files into the folder named by the only argument."""
    if len(arguments) != 1:
        print("usage: python -m tools.zoo.benchmarks OUT", file=sys.stderr)
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in benchmark_rows().items():
        (out / name).write_text(to_jsonl(rows), encoding="utf-8")
        print(out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
