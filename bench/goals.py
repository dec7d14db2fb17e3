"""What goals of one's own cost: a Python scorer beside the lm-eval task that it copies, and calls under way of a judge.

    python bench/goals.py                      # the zoo's base, on its four tasks of choices
    python bench/goals.py --model models/base  # a larger one
    python bench/goals.py --generation models/base models/math

Prints for each task the seconds of lm-eval's task and of a scorer that asks the same of the same items, whether their
numbers are equal, and how many calls to a judge that takes 200 ms were under way at once.

With --generation instead: 64 answers of up to 256 tokens to problems with five examples before them, in float32, by the
native backend and by lm-eval's HFLM in turn, at the batch size of which HFLM needs the least time by what a few tokens
of one batch take. Once with no stop string but the end token, once with that of lm-eval's own gsm8k.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.eval_speed import ask, flat, hflm, native_backend
from bench.timing import Cost, best_in_turn, timed
from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.engine.resident import Resident
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.scorers.chat_client import ChatClient, ChatOptions
from evomerge.evaluation.scorers.python_scorer import python_task
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.planning.plan import make_plan
from evomerge.recipe import parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.report.tables import table
from tests.judge_server import judge_server

EVAL = Path(__file__).parent.parent / "eval"
TASKS = ("zoo_arithmetic", "zoo_agreement", "zoo_facts", "zoo_reverse")
ROUNDS = 7


def score(model: Any, items: Any) -> list[bool]:
    """Whether the right choice is the likeliest: what the zoo's tasks call `acc`."""
    pairs = [(item["prompt"], " " + choice) for item in items for choice in item["choices"]]
    values = iter(model.loglikelihood(pairs))
    right = []
    for item in items:
        own = [next(values) for _ in item["choices"]]
        right.append(own.index(max(own)) == item["label"])
    return right


def overhead(reference: str) -> str:
    """Compares the scorer with the tasks, and renders the table."""
    checkpoint = open_checkpoint(reference)
    plan = make_plan(parse_recipe(single_model(reference)), {reference: checkpoint})
    model, _ = Resident({reference: checkpoint}, torch.float32, "cpu").write(plan)
    tokenizer = checkpoint.load_tokenizer().loaded
    rows = []
    for name, task in load_tasks(TASKS, include_path=EVAL).items():
        own = python_task("own", f"{__file__}:score", str(EVAL / "data" / f"{name}.jsonl"), {})
        evaluators = {part.name: Evaluator([part], tokenizer, model.config) for part in (task, own)}
        values = [
            evaluator.score(model)[part].values("acc" if part == name else "score")
            for part, evaluator in evaluators.items()
        ]
        runs = {part: partial(evaluator.score, model) for part, evaluator in evaluators.items()}
        cost = best_in_turn(runs, ROUNDS)
        more = cost["own"].cpu / cost[name].cpu - 1
        same = "equal" if np.array_equal(*values) else "DIFFERENT"
        rows.append([name, str(len(own.rows)), f"{cost[name].cpu:.3f}", f"{cost['own'].cpu:.3f}", f"{more:+.1%}", same])
    return table(["task", "items", "lm-eval's task (s)", "Python scorer (s)", "more", "numbers"], rows)


def calls_under_way(concurrency: int, delay: float, questions: int) -> str:
    """Asks a judge that takes its time, and says how many calls were under way."""
    with judge_server(delay=delay) as server, tempfile.TemporaryDirectory() as name:
        options = ChatOptions(server.url, "judge", concurrency=concurrency)
        client = ChatClient(options, Path(name), Path(name) / "spent", "judge")
        client.ask([("hello", 0)], bool)
        ask = partial(client.ask, [(f"question {k}", 0) for k in range(questions)], bool)
        cost = best_in_turn({"ask": ask}, 1)["ask"]
    mean = questions * delay / cost.wall
    return (
        f"{questions} calls of {delay * 1000:.0f} ms, {concurrency} allowed at once: {cost.wall:.2f} s, "
        f"{mean:.1f} under way on average, {server.most} at most"
    )


PROBLEMS = Path(__file__).parent.parent / "examples" / "real" / "data" / "gsm8k_nll.jsonl"
STOPS = {"none": [], "Question:": ["Question:"]}
SHOTS = 5


def write_problems(folder: Path, stops: Sequence[str], items: int, new_tokens: int) -> None:
    """Writes a task of problems behind the first five, with their solutions."""
    lines = PROBLEMS.read_text().splitlines(keepends=True)
    (folder / "shots.jsonl").write_text("".join(lines[:SHOTS]))
    (folder / "items.jsonl").write_text("".join(lines[SHOTS : SHOTS + items]))
    files = {"train": str(folder / "shots.jsonl"), "test": str(folder / "items.jsonl")}
    config = {
        "task": "problems",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": SHOTS,
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": " {{answer}}",
        "generation_kwargs": {"until": list(stops), "max_gen_toks": new_tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "problems.yaml").write_text(yaml.safe_dump(config))


def shortened(instances: Sequence[Any], new_tokens: int) -> list[Any]:
    """The same questions, with fewer tokens to answer."""
    copies = [copy.deepcopy(instance) for instance in instances]
    for instance in copies:
        instance.args[1]["max_gen_toks"] = new_tokens
    return copies


def projected(lm: Any, instances: Sequence[Any], size: int, new_tokens: int) -> float:
    """Seconds of HFLM for all, by the first tokens of one batch: reading, then a steady number of seconds a token."""
    few, more = 2, 10
    first, last = (timed(partial(ask, lm, shortened(instances[:size], tokens))).wall for tokens in (few, more))
    batches = -(-len(instances) // size)
    return batches * (first + (last - first) / (more - few) * (new_tokens - few))


def differences(model: Any, tokenizer: Any, prompts: Sequence[str], own: Sequence[str], other: Sequence[str]) -> str:
    """How many texts differ, and by how much the two tokens where they part differ in logit, in float64."""
    gaps = []
    exact = copy.deepcopy(model).double()
    for prompt, *texts in zip(prompts, own, other, strict=True):
        if texts[0] == texts[1]:
            continue
        one, two = (tokenizer.encode(text) for text in texts)
        same = next((k for k, pair in enumerate(zip(one, two, strict=False)) if len(set(pair)) > 1), None)
        if same is None:
            gaps.append(float("inf"))
            continue
        ids = torch.tensor([tokenizer.encode(prompt) + one[:same]])
        with torch.inference_mode():
            logits = exact(ids, logits_to_keep=1).logits[0, -1]
        gaps.append(float((logits[one[same]] - logits[two[same]]).abs()))
    return f"{len(gaps)} of {len(own)} differ" + (f", where logits part by {max(gaps):.1e}" if gaps else "")


def _keep(texts: dict[str, list[str]], name: str, write: Callable[[], list[str]]) -> None:
    texts[name] = write()


def generation(path: Path, items: int, new_tokens: int, sizes: Sequence[int], rounds: int) -> list[list[str]]:
    """Compares the native backend with HFLM on one model: the rows of the table."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows, best = [], 0
    for name, stops in STOPS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_problems(Path(folder), stops, items, new_tokens)
            evaluator = Evaluator(load_tasks(["problems"], include_path=folder), tokenizer, model.config)
            requests = evaluator.requests("problems")
        evaluator.prepare(model)
        instances = [instance for group in requests.by_item for instance in group]
        if not best:
            lms = {size: hflm(model, tokenizer, size, evaluator.max_length) for size in sizes}
            guesses = {size: projected(lm, instances, size, new_tokens) for size, lm in lms.items()}
            best = min(sizes, key=guesses.__getitem__) if len(sizes) > 1 else sizes[0]
            print(
                f"{path}, HFLM by batch size: " + ", ".join(f"{k}: {v:.0f} s" for k, v in guesses.items()), flush=True
            )
        texts: dict[str, list[str]] = {}
        own = partial(native_backend(evaluator).respond, model, requests, range(items))
        runs = {
            "native": partial(_keep, texts, "native", lambda own=own: flat(own())),
            "hflm": partial(_keep, texts, "hflm", partial(ask, lms[best], instances)),
        }
        cost: dict[str, Cost] = best_in_turn(runs, rounds)
        native, other = cost["native"], cost["hflm"]
        written = sum(len(tokenizer.encode(text)) for text in texts["native"])
        prompts = [instance.args[0] for instance in instances]
        rows.append(
            [
                path.name,
                name,
                f"{written:,}",
                f"{native.wall:.1f} ({native.cpu:.1f})",
                f"{other.wall:.1f} ({other.cpu:.1f})",
                str(best),
                f"{other.wall / native.wall:.2f}x ({other.cpu / native.cpu:.2f}x)",
                differences(model, tokenizer, prompts, texts["native"], texts["hflm"]),
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    return rows


GENERATION = ["model", "stop", "tokens", "native s (processor)", "HFLM s (processor)", "batch", "faster", "texts"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:base")
    parser.add_argument("--generation", type=Path, nargs="+", metavar="FOLDER", help="compares generated text alone")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="to try with HFLM")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="for generated text")
    arguments = parser.parse_args()
    if arguments.generation:
        torch.set_num_threads(arguments.threads)
        lines = [
            line
            for path in arguments.generation
            for line in generation(path, arguments.items, arguments.new_tokens, arguments.batch_sizes, arguments.rounds)
        ]
        print(table(GENERATION, lines))
    else:
        torch.set_num_threads(1)
        print(overhead(arguments.model))
        print()
        print(calls_under_way(16, 0.2, 160))
