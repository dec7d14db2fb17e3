"""What it costs to turn a resident model into one candidate after another.

    python bench/materialise.py [MODELS]

MODELS holds a folder `base` and its fine-tunes (default: models/). For every method: seconds for the first candidate,
which computes the statistics of the run, and for later ones, each with parameters of its own, so that nothing is
remembered; the cost of one that differs in one of six groups of layers, and the operations it skips; memory.
Beside wall seconds stand processor seconds, which say more where other work shares the cores, and the later candidate's
processor seconds as a multiple of `torch.clone` of the same bytes (base and sources). Compiled
kernels come from the cache on disk (run it twice); what compiling costs, once per machine, stands below the table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.timing import Cost, timed
from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.engine.resident import Resident
from evomerge.methods.registry import get_method
from evomerge.planning.plan import Plan, make_plan
from evomerge.recipe import parse_recipe
from evomerge.system.memory import collect_rarely

GROUPS = 6
LATER = 3
RESULTS = Path(__file__).parent / "results" / "materialise.md"

Own = Callable[[float], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A method with some settings.

    Attributes:
        label: For the table.
        method: Its name.
        own: Per-source parameters of a candidate, from a number in 0..1 that is another for each candidate.
        shared: Parameters that are one for all.
        per_slice: Parameters of a slice, from the same number.
    """

    label: str
    method: str
    own: Own
    shared: Mapping[str, Any]
    per_slice: Own = lambda u: {}


def weight(u: float) -> dict[str, Any]:
    return {"weight": 0.2 + 0.5 * u}


def dense(u: float) -> dict[str, Any]:
    return {"weight": 0.2 + 0.5 * u, "density": 0.15 + 0.6 * u}


def nothing(u: float) -> dict[str, Any]:
    return {}


CASES = (
    Case("linear", "linear", weight, {}),
    Case("slerp", "slerp", weight, {}),
    Case("slerp, on deltas", "slerp", weight, {"on": "deltas"}),
    Case("task_arithmetic", "task_arithmetic", weight, {}),
    Case("ties", "ties", dense, {}),
    Case("ties, lambda 0.8", "ties", dense, {"lambda": 0.8}),
    Case("ties, scope model", "ties", dense, {"scope": "model"}),
    Case("dare", "dare", dense, {}),
    Case("dare_linear", "dare_linear", dense, {}),
    Case("dare_ties", "dare_ties", dense, {}),
    Case("dare_ties, drop and trim", "dare_ties", lambda u: dense(u) | {"drop_rate": 0.3 + 0.2 * u}, {}),
    Case("frankenmerge", "passthrough", lambda u: {"scale": 0.9 + 0.2 * u}, {}),
    Case("dfs", "dfs", weight, {}),
    Case("dfs, scope row", "dfs", weight, {"scope": "row"}),
    Case("dfs, mode position", "dfs", weight, {"mode": "position"}),
    Case("della", "della", lambda u: dense(u) | {"epsilon": 0.05 + 0.1 * u}, {}),
    Case("della_linear", "della_linear", lambda u: dense(u) | {"epsilon": 0.05 + 0.1 * u}, {}),
    Case("breadcrumbs", "breadcrumbs", dense, {}),
    Case("breadcrumbs_ties", "breadcrumbs_ties", dense, {}),
    Case("model_stock", "model_stock", nothing, {}),
    Case("model_stock, filter_wise", "model_stock", nothing, {"filter_wise": True}),
    Case("sce", "sce", nothing, {}),
    Case("sce, select_topk", "sce", nothing, {}, lambda u: {"select_topk": 0.1 + 0.5 * u}),
    Case("arcee_fusion", "arcee_fusion", nothing, {}),
    Case("dfs, mode position, density 0.5", "dfs", weight, {"mode": "position", "density": 0.5}),
    Case("nuslerp", "nuslerp", weight, {}),
    Case("nuslerp, by row", "nuslerp", weight, {"nuslerp_flatten": False}),
    Case("nuslerp, by column", "nuslerp", weight, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Case("multislerp", "multislerp", weight, {}),
    Case("karcher", "karcher", weight, {}),
    Case("nearswap", "nearswap", weight, {"t": 0.001}),
    Case("tsv_merge", "tsv_merge", weight, {}),
    Case("iso_c", "iso_c", weight, {}),
)


def memory() -> dict[str, float]:
    """Gigabytes of this process: peak resident, anonymous now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon")}


class Watch:
    """The most anonymous memory that was seen while it watched, in gigabytes."""

    def __init__(self) -> None:
        self.most = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, memory()["RssAnon"])

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def recipe(case: Case, folder: Path, names: list[str], layers: int, draws: list[float]) -> dict[str, Any]:
    """A candidate: one slice per group of layers, each with a draw of its own."""
    edges = [layers * k // GROUPS for k in range(GROUPS + 1)]
    base, sources = str(folder / "base"), [str(folder / name) for name in names]
    copies = get_method(case.method).copies_layers
    slices = []
    for number, u in enumerate(draws):
        span = [edges[number], edges[number + 1]]
        listed = [sources[number % len(sources)]] if copies else sources[: get_method(case.method).max_sources]
        each = [
            {"model": model, "layer_range": span, "parameters": case.own((u + 0.1 * k) % 1.0)}
            for k, model in enumerate(listed)
        ]
        listed_all = each if copies else [{"model": base, "layer_range": span}, *each]
        slices.append({"sources": listed_all, "parameters": case.per_slice(u)})
    made: dict[str, Any] = {"merge_method": case.method, "slices": slices, "parameters": dict(case.shared)}
    method = get_method(case.method)
    if method.takes_base or method.base_needed(case.shared):
        made["base_model"] = base
    else:
        for part in slices:
            part["sources"] = [source for source in part["sources"] if source["model"] != base]
    return made


def open_models(folder: Path, most: int | None = None) -> tuple[list[str], dict[str, Checkpoint]]:
    """Opens `base` and its fine-tunes, the first of them by name; returns the fine-tunes' names and all checkpoints."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "base" and path.is_dir())[:most]
    return names, {str(folder / name): open_checkpoint(str(folder / name)) for name in ["base", *names]}


def draws_of(number: int) -> list[float]:
    """A candidate's draws, one for each group of layers: no two candidates share any."""
    return [((7 * number + 3 * n + 1) % 19) / 19 for n in range(GROUPS)]


def plan_of(
    case: Case, draws: Sequence[float], checkpoints: Mapping[str, Checkpoint], folder: Path, names: list[str]
) -> Plan:
    """Plans the candidate of some draws."""
    layers = next(iter(checkpoints.values())).layout.layer_count
    return make_plan(parse_recipe(recipe(case, folder, names, layers, list(draws))), checkpoints)


def measure(
    case: Case, checkpoints: Mapping[str, Checkpoint], folder: Path, names: list[str], clone: float
) -> list[str]:
    """One row of the table; `clone` is what copying everything costs, in processor seconds."""
    resident = Resident(checkpoints)
    plan = partial(plan_of, case, checkpoints=checkpoints, folder=folder, names=names)
    first, *later = (timed(partial(resident.write, plan(draws_of(number)))) for number in range(LATER + 1))
    draws = draws_of(LATER)
    changed = plan([*draws[:2], 0.999, *draws[3:]])
    skipped = 0

    def one_group() -> None:
        nonlocal skipped
        skipped = resident.write(changed)[1].skipped

    group = timed(one_group)
    cpu = statistics.median(c.cpu for c in later)
    numbers = [first.wall, first.cpu, statistics.median(c.wall for c in later), min(c.wall for c in later), cpu]
    rest = [f"{cpu / clone:.1f}", f"{group.wall:.2f}", f"{group.cpu:.2f}", f"{skipped} of {len(changed.operations)}"]
    return [case.label, *(f"{number:.2f}" for number in numbers), *rest]


def copy_once(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Copies every tensor of every model, one at a time."""
    for checkpoint in checkpoints.values():
        for name in checkpoint.tensors:
            checkpoint.tensor(name).clone()


HEAD = [
    "method",
    "first, wall s",
    "first, cpu s",
    "later, wall s",
    "best, wall s",
    "later, cpu s",
    "cpu / clone",
    "one group, wall s",
    "one group, cpu s",
    "skipped",
    "anonymous peak, GB",
]

FIRST_USE = """
import numpy as np, time
from evomerge.engine.kernels import merge, reductions
wall, cpu = time.perf_counter(), time.process_time()
f, i, out = np.ones(2, np.float32), np.zeros(2, np.int64), np.zeros(100, np.float32)
x, bits, keys = np.zeros((2, 100), np.float32), np.zeros(100, np.uint16), np.zeros((2, 2), np.uint64)
none = np.zeros((0, 0), np.uint8)
edits = merge.Edits(i, keys, np.zeros((0, 4), np.float32), f, f, i, f, i, i > 0, bits.reshape(1, -1))
merge.ties(x[0], x, 0, edits, none, f, f, np.float32(1), True, 1, out)
reductions.count_magnitudes(bits, bits, 13, np.zeros(1 << 18, np.int64), np.zeros(1 << 18, np.uint16))
reductions.count_low_bits(bits, bits, 13, 0, np.zeros(1 << 13, np.int64))
reductions.find_equal(bits, bits, 1, 1)
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def first_use() -> Cost:
    """What a first ties merge on a machine spends on compiling."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", FIRST_USE]
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, cpu = map(float, done.stdout.split())
    return Cost(wall, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of in-memory materialisation, per method.")
    parser.add_argument("models", nargs="?", type=Path, default=Path("models"), help="a folder with base and others")
    parser.add_argument("--only", nargs="*", help="labels that contain one of these words")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    collect_rarely()  # as the command line does: a full collection takes 0.2 s of one candidate
    names, checkpoints = open_models(arguments.models)
    head = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    print(*head, sep="\n")
    rows = []
    clone = min(timed(partial(copy_once, checkpoints)).cpu for _ in range(5))
    for case in CASES:
        if not arguments.only or any(word in case.label for word in arguments.only):
            with Watch() as watch:
                row = measure(case, checkpoints, arguments.models, names, clone)
            rows.append(f"| {' | '.join([*row, f'{watch.most:.2f}'])} |")
            print(rows[-1], flush=True)
    compiling = first_use()
    load = os.getloadavg()
    notes = [
        f"`torch.clone` of base and sources, best of five: processor {clone:.2f} s.",
        f"Base and {len(names)} sources, two threads; load of the machine (1, 5, 15 minutes): {load}.",
        f"Compiling the kernels of ties, once per machine: {compiling.wall:.1f} s, processor {compiling.cpu:.1f} s.",
        f"Peak resident memory of the whole process, mapped files included: {memory()['VmHWM']:.2f} GB.",
    ]
    print(*notes, sep="\n")
    if not arguments.only:
        text = ["# In-memory materialisation", "", "    python bench/materialise.py", "", *head, *rows, "", *notes]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
