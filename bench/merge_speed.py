"""One merge on disk: this engine, mergekit, and `cp` of the same bytes, in turn.

    python bench/merge_speed.py --mergekit /path/to/bin/mergekit-yaml

Makes a 1.1B Llama-shaped base and three fine-tunes of it (bf16, two shards each) under runs/merge_speed, and merges
them with every method, each in a process of its own, the page cache warm. mergekit lives in an environment of its own
(`python -m venv mk && mk/bin/pip install torch mergekit`); without `--mergekit` only this engine is measured.

The floor of a method is the time to read the models it reads (`cat`) and to copy one of them (`cp`) and flush it,
measured again before each method. Memory is that of the process: `peak` as the system counts it, mapped files
included, and `anonymous` without them. `--depths 6 11 22` shows that memory does not grow with the number of layers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results" / "merge.md"
SOURCES = ("one", "two", "three")
HIDDEN, WIDE, HEADS, GROUPS, VOCABULARY = 2048, 5632, 32, 4, 32000
DEPTH = 22
SETTLE = 5.0  # seconds

WEIGHTS = {"weight": [0.5, 0.3, 0.4]}
DENSE = WEIGHTS | {"density": [0.5, 0.4, 0.6]}


@dataclass(frozen=True)
class Case:
    """A method with its settings.

    Attributes:
        method: Its name.
        own: Per-source parameters, one value for each source.
        shared: Parameters that are one for all.
        base: The base is read.
        sources: How many sources it takes.
        target: Most that it may take, as a multiple of the floor; None where there is no target.
        faster: Least that it should be faster than mergekit.
        only_here: mergekit has no such method.
    """

    method: str
    own: Mapping[str, Sequence[float]]
    shared: Mapping[str, Any]
    base: bool = True
    sources: int = 3
    target: float | None = None
    faster: float | None = None
    only_here: bool = False


CASES = (
    Case("linear", WEIGHTS, {}, base=False, target=2, faster=3),
    Case("slerp", {}, {"t": 0.4}, sources=1, target=2, faster=3),
    Case("task_arithmetic", WEIGHTS, {"lambda": 0.8}, target=2, faster=3),
    Case("passthrough", {}, {}, base=False, sources=1, target=2),
    Case("dare_linear", DENSE, {}, target=4, faster=5),
    Case("dfs", WEIGHTS, {}, target=4, only_here=True),
    Case("ties", DENSE, {}, target=6, faster=10),
    Case("dare_ties", DENSE, {}, target=6, faster=5),
    Case("della", DENSE, {}),
    Case("breadcrumbs", DENSE, {"gamma": 0.01}),
    Case("model_stock", {}, {}),
    Case("sce", {}, {"select_topk": 0.5}),
    Case("nuslerp", {"weight": [0.5, 0.3]}, {}, base=False, sources=2),
    Case("karcher", {}, {}, base=False),
)


@dataclass(frozen=True)
class Cost:
    """What a process took.

    Attributes:
        wall: Seconds.
        cpu: Seconds of the processor, all threads.
        peak: Peak resident memory in GB, mapped files included.
        anonymous: Peak of it without mapped files, in GB.
    """

    wall: float
    cpu: float
    peak: float
    anonymous: float


def run(command: Sequence[str], log: Path) -> Cost:
    """Runs a command to its end and watches it.

    A virtual machine gives freed memory back to its host after a while, and is slow to get it again: a command that
    comes right behind a deletion would write several times as fast as one that starts up first. So all of them wait.
    """
    time.sleep(SETTLE)
    with log.open("ab") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        most = [0.0, 0.0]

        def watch() -> None:
            while True:
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                except (FileNotFoundError, ProcessLookupError):
                    return
                fields = dict(line.split(":", 1) for line in lines if ":" in line)
                for k, name in enumerate(("VmHWM", "RssAnon")):
                    if name not in fields:  # it has ended
                        return
                    most[k] = max(most[k], int(fields[name].split()[0]) / 2**20)
                time.sleep(0.01)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; see {log}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, max(most[0], usage.ru_maxrss / 2**20), most[1])


def make_models(root: Path, depth: int) -> None:
    """Writes the base and its fine-tunes, each in two shards."""
    import torch
    from safetensors.torch import save_file

    folder = root / "base"
    if (root / SOURCES[-1] / "model.safetensors.index.json").is_file():
        return
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes = tensor_shapes(depth)
    for number, name in enumerate(("base", *SOURCES)):
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        halves = [list(shapes)[: len(shapes) // 2], list(shapes)[len(shapes) // 2 :]]
        where = {}
        for k, names in enumerate(halves, start=1):
            file = f"model-0000{k}-of-00002.safetensors"
            tensors = {}
            for tensor in names:
                generator = torch.Generator().manual_seed(hash_of(tensor))
                value = torch.randn(shapes[tensor], generator=generator) * 0.02
                if number:
                    generator.manual_seed(hash_of(f"{name}.{tensor}"))
                    value += torch.randn(shapes[tensor], generator=generator) * 0.002
                tensors[tensor] = value.to(torch.bfloat16)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def tensor_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of this depth."""
    keys = HIDDEN // HEADS * GROUPS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(depth):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def recipe(case: Case, root: Path, path: Path) -> list[str]:
    """Writes a case as a mergekit configuration; returns the models that it reads."""
    used = list(SOURCES[: case.sources])
    models = [
        {"model": str(root / name), "parameters": {key: values[k] for key, values in case.own.items()}}
        for k, name in enumerate(used)
    ]
    config: dict[str, Any] = {"merge_method": case.method, "dtype": "bfloat16", "parameters": dict(case.shared)}
    if case.base:
        config["base_model"] = str(root / "base")
        if case.method == "slerp":
            models.insert(0, {"model": str(root / "base")})
    if case.method == "passthrough":
        config = {"merge_method": "passthrough", "dtype": "bfloat16"}
        config["slices"] = [{"sources": [{"model": str(root / "one"), "layer_range": [0, depth_of(root)]}]}]
    else:
        config["models"] = models
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return used + ["base"] * case.base


def depth_of(root: Path) -> int:
    return int(json.loads((root / "base" / "config.json").read_text())["num_hidden_layers"])


def floor(root: Path, models: Sequence[str], log: Path) -> float:
    """Seconds to read all these models and to write one."""
    out = root / "copy"
    shutil.rmtree(out, ignore_errors=True)
    others = " ".join(str(root / name / "*.safetensors") for name in models[1:]) or "/dev/null"
    script = f"cp -r {root / models[0]} {out} && sync -d {out}/*.safetensors && cat {others} > /dev/null"
    cost = run(["sh", "-c", script], log)
    shutil.rmtree(out)
    return cost.wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/merge_speed"))
    parser.add_argument("--mergekit", help="mergekit-yaml of another environment")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--depths", nargs="*", type=int, default=[DEPTH])
    parser.add_argument("--rounds", type=int, default=1, help="of this engine and of the floor; the median is shown")
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS}")
    args = parser.parse_args()
    rows = [
        "| layers | method | floor, s | seconds | of floor | target | cpu s | peak GB | anonymous GB | mergekit, s | "
        "peak GB | faster | target | of its peak |",
        "| --- " * 14 + "|",
    ]
    print("\n".join(rows), flush=True)
    for depth in args.depths:
        root = args.root / str(depth)
        make_models(root, depth)
        log = root / "log.txt"
        for case in CASES:
            if args.methods and case.method not in args.methods:
                continue
            rows.append(row(case, root, depth, args.mergekit, args.rounds, log))
            print(rows[-1], flush=True)
    if args.write:
        RESULTS.write_text(f"# One merge on disk\n\n    {' '.join(['python', *sys.argv])}\n\n" + "\n".join(rows) + "\n")


def row(case: Case, root: Path, depth: int, mergekit: str | None, rounds: int, log: Path) -> str:
    """One line of the table."""
    config, out = root / "recipe.yaml", root / "out"
    models = recipe(case, root, config)
    floors, costs = [], []
    command = [sys.executable, "-m", "evomerge", "merge", str(config), str(out), "--overwrite"]
    run(["sh", "-c", f"cat {' '.join(str(root / m / '*.safetensors') for m in models)} > /dev/null"], log)
    for _ in range(rounds):
        floors.append(floor(root, models, log))
        shutil.rmtree(out, ignore_errors=True)
        costs.append(run(command, log))
    bound, cost = statistics.median(floors), sorted(costs, key=lambda c: c.wall)[len(costs) // 2]
    shutil.rmtree(out, ignore_errors=True)
    cells = [str(depth), case.method, f"{bound:.1f}", f"{cost.wall:.1f}", f"{cost.wall / bound:.1f}x"]
    cells += [f"{case.target:g}x" if case.target else "", f"{cost.cpu:.1f}", f"{cost.peak:.2f}"]
    cells += [f"{cost.anonymous:.2f}"]
    if mergekit and not case.only_here:
        other = run([mergekit, str(config), str(out), "--lazy-unpickle"], log)
        shutil.rmtree(out, ignore_errors=True)
        cells += [f"{other.wall:.1f}", f"{other.peak:.2f}", f"{other.wall / cost.wall:.1f}x"]
        cells += [f"{case.faster:g}x" if case.faster else "", f"{cost.peak / other.peak:.2f}"]
    return "| " + " | ".join(cells + [""] * (14 - len(cells))) + " |"


if __name__ == "__main__":
    main()
