"""What goals of one's own cost: a Python scorer beside the lm-eval task that it copies, and calls under way of a judge.

    python bench/goals.py                      # the zoo's base, on its four tasks of choices
    python bench/goals.py --model models/base  # a larger one

Prints for each task the seconds of lm-eval's task and of a scorer that asks the same of the same items, whether their
numbers are equal, and how many calls to a judge that takes 200 ms were under way at once.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.timing import best_in_turn
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:base")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(overhead(arguments.model))
    print()
    print(calls_under_way(16, 0.2, 160))
