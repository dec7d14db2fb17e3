"""How fast and how right the native scorer is, beside lm-eval's HFLM on the same items, weights and dtype.

    python bench/eval_speed.py

For every task: the tokens that one sequence per request takes, the tokens that must be read when shared prefixes are
read once, the floor (the FLOPs of the latter over the machine's matrix rate, measured in the same run), its time and
HFLM's at its best batch size. Both are run in turn and the best of several rounds counts, because other programs may
share the machine. Without the real models only the zoo is measured.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.timing import best_in_turn
from evomerge.evaluation.backends.native.backend import NativeBackend
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.report.tables import table
from evomerge.system.quiet import quiet
from evomerge.zoo.models import ensure

GENERATION = "short_generation"
EVAL = Path(__file__).parent.parent / "eval"
REAL = ("real_arc_easy", "real_blimp_islands", "real_gsm8k_bpb", GENERATION)
ZOO = ("zoo_facts", "zoo_agreement", "zoo_text_bpb", "zoo_arithmetic_generate")
NOTES = "## What did not help, and what is left"


@dataclass
class Line:
    """One task's row of the table."""

    task: str
    items: int
    unshared: int
    shared: int
    scored: int
    floor: float
    native: float
    hflm: float
    batch_size: int
    flips: int
    agreement: str

    def cells(self) -> list[str]:
        """The row as text."""
        return [
            self.task,
            str(self.items),
            f"{self.unshared:,}",
            f"{self.shared:,}",
            f"{self.scored:,}",
            f"{self.floor:.2f}" if self.floor else "",
            f"{self.native:.2f}",
            f"{self.native / self.floor:.2f}x" if self.floor else "",
            f"{self.hflm:.2f} ({self.batch_size})",
            f"{self.hflm / self.native:.2f}x",
            self.agreement,
            str(self.flips),
        ]


HEAD = [
    "task",
    "items",
    "tokens unshared",
    "tokens shared",
    "scored",
    "floor s",
    "native s",
    "native / floor",
    "HFLM s (batch)",
    "faster",
    "float32, largest difference",
    "bf16 items flipped",
]


def matrices(model: Any) -> tuple[list[torch.Tensor], int]:
    """The linear weights of one layer, and the parameters of all layers' linear weights."""
    layers = {name: p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name}
    first = [p.detach() for name, p in layers.items() if ".layers.0." in name]
    return first, sum(p.numel() for p in layers.values())


def matrix_rate(weights: Sequence[torch.Tensor], rows: int = 1024) -> float:
    """FLOPs a second of the model's own products at a good size, the best of many."""
    inputs = [torch.randn(rows, w.shape[1]).to(w.dtype) for w in weights]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(30):
            start = time.perf_counter()
            for w, x in zip(weights, inputs, strict=True):
                torch.nn.functional.linear(x, w)
            best = min(best, time.perf_counter() - start)
    return sum(2 * rows * w.numel() for w in weights) / best


def hflm(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> HFLM:
    """lm-eval's own model around the same weights."""
    with quiet():
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=max_length)


def ask(lm: HFLM, instances: Sequence[Any]) -> list[Any]:
    """HFLM's answers."""
    with quiet():
        copies = [copy.deepcopy(instance) for instance in instances]
        return list(getattr(lm, instances[0].request_type)(copies, disable_tqdm=True))


def numbers(answers: Sequence[Any]) -> np.ndarray:
    """Log-likelihoods of answers."""
    return np.array([answer[0] if isinstance(answer, tuple) else answer for answer in answers])


def flat(answers: Sequence[Sequence[Sequence[Any]]]) -> list[Any]:
    """One answer per request."""
    return [responses[0] for group in answers for responses in group]


def flips(
    evaluator: Evaluator, task: str, indices: Sequence[int], native: Sequence[Any], by_hflm: Sequence[Any]
) -> int:
    """Items whose most likely choice (or whose text) differs; 0 where there is no choice."""
    count, start = 0, 0
    for index in indices:
        size = len(evaluator.requests(task).by_item[index])
        a, b = native[start : start + size], by_hflm[start : start + size]
        start += size
        if isinstance(a[0], str):
            count += a != b
        elif size > 1:
            count += int(np.argmax(numbers(a)) != np.argmax(numbers(b)))
    return count


def agreement(model: Any, evaluator: Evaluator, tokenizer: Any, task: str, indices: Sequence[int]) -> str:
    """How far the answers are from HFLM's in float32, on some items."""
    backend: Any = evaluator.backend
    requests = evaluator.requests(task)
    instances = [instance for index in indices for instance in requests.by_item[index]]
    native = flat(backend.respond(model, requests, indices))
    by_hflm = ask(hflm(model, tokenizer, 8, evaluator.max_length), instances)
    if isinstance(native[0], str):
        return f"{sum(a != b for a, b in zip(native, by_hflm, strict=True))} of {len(native)} texts differ"
    return f"{np.abs(numbers(native) - numbers(by_hflm)).max():.1e}"


def write_generation(folder: Path, data: Path) -> None:
    """A task that generates a few words: answers to the questions of real_arc_easy."""
    config = {
        "task": GENERATION,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    (folder / f"{GENERATION}.yaml").write_text(yaml.safe_dump(config))


def native_backend(evaluator: Evaluator) -> NativeBackend:
    """The evaluator's backend, which this script calls past the tasks' metrics."""
    backend = evaluator.backend
    assert isinstance(backend, NativeBackend)
    return backend


def best_batch_size(model: Any, evaluator: Evaluator, instances: Sequence[Any], sizes: Sequence[int]) -> int:
    """HFLM's fastest batch size on a quarter of the requests, spread over all of them."""
    some = instances[::4]
    lms = {size: hflm(model, evaluator.encoder.tokenizer, size, evaluator.max_length) for size in sizes}
    costs = best_in_turn({size: partial(ask, lm, some) for size, lm in lms.items()}, 1)
    return min(sizes, key=lambda size: costs[size].wall)


def measure(args: argparse.Namespace, model: Any, wide: Any, evaluator: Evaluator, task: str, count: int) -> Line:
    """One task: HFLM's best batch size, both in turn in bf16, and parity in float32."""
    tokenizer, backend = evaluator.encoder.tokenizer, native_backend(evaluator)
    requests, indices = evaluator.requests(task), tuple(range(count))
    instances = [instance for index in indices for instance in requests.by_item[index]]
    size = best_batch_size(model, evaluator, instances, args.batch_sizes)
    lm = hflm(model, tokenizer, size, evaluator.max_length)
    answers: dict[str, Any] = {}
    runs: dict[str, Callable[[], object]] = {
        "native": lambda: answers.update(native=flat(backend.respond(model, requests, indices))),
        "hflm": lambda: answers.update(hflm=ask(lm, instances)),
    }
    weights, parameters = matrices(model)
    rate = matrix_rate(weights)
    seconds = {name: cost.wall for name, cost in best_in_turn(runs, args.rounds).items()}
    rate = max(rate, matrix_rate(weights))
    same = agreement(wide, evaluator, tokenizer, task, indices[: args.parity_items])
    changed = flips(evaluator, task, indices, answers["native"], answers["hflm"])
    if isinstance(answers["native"][0], str):
        tokens = sum(len(evaluator.encoder.tok_encode(instance.args[0])) for instance in instances)
        return Line(task, count, tokens, tokens, 0, 0.0, seconds["native"], seconds["hflm"], size, changed, same)
    packed = backend.packed(requests, indices)
    scored = sum(len(batch.scored) for batch in packed.batches)
    head = model.get_output_embeddings().weight.numel()
    floor = (2 * parameters * packed.tokens + 2 * head * scored) / rate
    line = (task, count, packed.unshared, packed.tokens, scored, floor, seconds["native"], seconds["hflm"], size)
    return Line(*line, changed, same)


def share_in_model(model: Any, evaluator: Evaluator, selection: dict[str, tuple[int, ...]]) -> tuple[float, float]:
    """Seconds of a second candidate, and the share of them inside the model and what is read off its logits."""
    scorer, inside = native_backend(evaluator).logprobs, 0.0
    original = scorer.compute

    def timed_compute(*given: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        scored = original(*given)
        inside += time.perf_counter() - start
        return scored

    scorer.compute = timed_compute  # type: ignore[method-assign]
    start = time.perf_counter()
    evaluator.score(model, selection)
    total = time.perf_counter() - start
    scorer.compute = original  # type: ignore[method-assign]
    return total, inside / total


def run(args: argparse.Namespace, title: str, path: Path, names: Sequence[str], counts: Sequence[int]) -> str:
    """One model on its tasks: a section of the page."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if GENERATION in names:
            write_generation(Path(folder), args.data.resolve())
        tasks = load_tasks(list(names), include_path=[args.tasks if names == REAL else EVAL, folder])
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        evaluator = Evaluator(tasks, tokenizer, model.config, batch_tokens=args.batch_tokens)
        selection = {name: tuple(range(count)) for name, count in zip(names, counts, strict=True)}
        evaluator.prepare(model)
        evaluator.batch_digest(selection)
    startup = time.perf_counter() - start
    wide = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    lines = []
    for name, count in zip(names, counts, strict=True):
        lines.append(measure(args, model, wide, evaluator, name, count))
        print(" | ".join(lines[-1].cells()), file=sys.stderr, flush=True)
    scored = {name: indices for name, indices in selection.items() if tasks[name].output_type != "generate_until"}
    seconds, share = share_in_model(model, evaluator, scored)
    rate = matrix_rate(matrices(model)[0])
    notes = [
        f"Matrix rate {rate / 1e9:.0f} GFLOP/s in bf16 on the model's own shapes.",
        f"Start-up (model, tasks, requests, layouts): {startup:.1f} s, once. A second candidate on the log-likelihood "
        f"tasks: {seconds:.1f} s, {share:.0%} of them inside the model.",
    ]
    rows = table(HEAD, [line.cells() for line in lines])
    return f"## {title}\n\n{rows}\n\n" + "\n".join(f"- {note}" for note in notes)


def main() -> None:
    """Measures and writes the page; what stands below the notes' heading in it stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/base"))
    parser.add_argument("--tasks", type=Path, default=Path("examples/real/tasks"))
    parser.add_argument("--data", type=Path, default=Path("examples/real/data/arc_easy.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/eval.md"))
    parser.add_argument("--counts", type=int, nargs=4, default=[200, 200, 60, 64], help="items: arc, pairs, texts, gen")
    parser.add_argument("--zoo", default="base", help="model of the zoo; '' for none")
    parser.add_argument("--zoo-items", type=int, default=100, help="items of each of the zoo's tasks")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 64], help="to try with HFLM")
    parser.add_argument(
        "--batch-tokens", type=int, help="tokens in a batch of the native scorer; what suits if not given"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parity-items", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = [
        "# The native scorer beside HFLM",
        f"{platform.machine()}, {args.threads} threads of {os.cpu_count()} cores, torch {torch.__version__}. Best of "
        f"{args.rounds} rounds in which both take turns; HFLM at the batch size that was fastest on a quarter of the "
        f"requests, of {', '.join(map(str, args.batch_sizes))}.",
    ]
    if args.model.is_dir():
        parts.append(run(args, str(args.model), args.model, REAL, args.counts))
    if args.zoo:
        parts.append(run(args, f"zoo:{args.zoo}", ensure(args.zoo), ZOO, [args.zoo_items] * len(ZOO)))
    text = "\n\n".join(parts) + "\n"
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before = args.out.read_text() if args.out.exists() else ""
    args.out.write_text(text + (f"\n{NOTES}{before.split(NOTES, 1)[1]}" if NOTES in before else ""))


if __name__ == "__main__":
    main()
