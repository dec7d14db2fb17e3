"""Everything a task's YAML can ask for, beside `lm_eval.simple_evaluate`: prompts, filters, metrics, groups."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.scores import score_table
from evomerge.evaluation.tasks.lm_eval_tasks import find_tasks, group_scores, load_tasks
from evomerge.system.quiet import quiet
from tests.evaluation.conftest import Bench, documents, tasks_of, write_documents, write_task

ABSOLUTE = "tasks_of_lm_eval"
"""The folder of the same tasks with absolute paths of their data, which lm-eval can load by itself."""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or add_generation_prompt %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def metric(name: str, **more: Any) -> dict[str, Any]:
    up = name not in ("perplexity", "brier_score", "bits_per_byte", "byte_perplexity", "word_perplexity")
    return {"metric": name, "aggregation": more.pop("aggregation", "mean"), "higher_is_better": up, **more}


FUNCTIONS = '''
import random

def process_results(doc, results):
    """A task's own metrics: one for every item, one for some, one that is a ratio, one of the corpus."""
    (text,) = results
    found = {"length": float(len(text)), "same": float(text.strip() == doc["answer"]), "longest": len(text)}
    if doc["label"] == 0:
        found["of_some"] = float("e" in text)
    return found

def longest(items):
    return max(items)

def first_half(docs):
    return docs.select(range(len(docs) // 2))

def shuffled(docs):
    return docs.map(mix)

def mix(doc):
    order = list(range(len(doc["choices"])))
    random.shuffle(order)
    return {"choices": [doc["choices"][k] for k in order], "label": order.index(doc["label"])}

def choices(doc):
    return doc["choices"][:2]
'''

CLASS = '''
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask


class Mixed(ConfigurableTask):
    """Asks for a text and for a likelihood, as squadv2 does."""

    def __init__(self, config):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        wanted = {"until": ["e"], "max_gen_toks": 6}
        return [
            Instance("generate_until", doc, (ctx, wanted), 0, **kwargs),
            Instance("loglikelihood", doc, (ctx, " " + doc["answer"]), 1, **kwargs),
        ]

    def process_results(self, doc, results):
        text, (ll, greedy) = results
        return {"length": len(text), "ll": ll, "worst": (len(text), ll)}

    def aggregation(self):
        return {"length": mean, "ll": mean, "worst": lambda rows: min(ll for _, ll in rows)}

    def higher_is_better(self):
        return {"length": True, "ll": True, "worst": False}


class Choosing(Mixed):
    """Makes its choices itself: no smooth metric can be had."""

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        return [Instance("loglikelihood", doc, (ctx, " " + c), k, **kwargs) for k, c in enumerate(doc["choices"])]

    def process_results(self, doc, results):
        lls = [ll for ll, _ in results]
        return {"right": float(lls.index(max(lls)) == doc["label"])}

    def aggregation(self):
        return {"right": mean}

    def higher_is_better(self):
        return {"right": True}
'''

_FILTERS = [
    {
        "name": "strict",
        "filter": [{"function": "regex", "regex_pattern": "^ ([a-z]+)"}, {"function": "take_first"}],
    },
    {
        "name": "flexible",
        "filter": [
            {"function": "regex", "regex_pattern": "([a-z]+)", "group_select": -1},
            {"function": "take_first"},
        ],
    },
]

TASKS: dict[str, dict[str, Any]] = {
    # Question answering: more metrics, some of them of the corpus.
    "all_metrics": {
        "kind": "pairs",
        "metric_list": [
            metric("acc"),
            metric("acc_norm"),
            metric("acc_bytes"),
            metric("acc_mutual_info"),
            metric("brier_score", aggregation="brier_score"),
            metric("f1", aggregation="f1"),
            metric("mcc", aggregation="matthews_corrcoef"),
            metric("exact_match"),
        ],
    },
    "default_metrics": {"kind": "rolling", "metric_list": None},
    # The choices stand in the context, and what follows is the same for all: winogrande.
    "in_context": {
        "kind": "mc",
        "doc_to_text": "{{label % 2}}",
        "doc_to_target": "text",
        "doc_to_choice": "{{[question + ' ' + choices[0], question + ' ' + choices[1]]}}",
        "metric_list": [metric("acc")],
    },
    "several_right": {
        "kind": "mc",
        "doc_to_target": "{{[label, 0]}}",
        "metric_list": [metric("acc"), metric("acc_norm"), metric("exact_match")],
    },
    "label_as_text": {
        "kind": "mc",
        "tag": "tag_of_two",
        "doc_to_target": "{{choices[label]}}",
        "target_delimiter": "\n",
    },
    "choices_by_function": {
        "kind": "mc",
        "tag": "tag_of_two",
        "doc_to_choice": "!choices",
        "doc_to_target": "{{label % 2}}",
    },
    "several_answers": {
        "kind": "gen",
        "doc_to_target": "{{[answer, question[:1]]}}",
        "metric_list": [metric("exact_match", ignore_case=True, ignore_punctuation=True)],
    },
    "extracted": {"kind": "gen", "filter_list": _FILTERS},
    "voted": {
        "kind": "gen",
        "repeats": 3,
        "filter_list": [
            {"name": "maj", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]},
            {"name": "first", "filter": [{"function": "take_first_k", "k": 1}, {"function": "take_first"}]},
        ],
    },
    "of_the_corpus": {
        "kind": "gen",
        "metric_list": [
            metric("bleu", aggregation="bleu"),
            metric("chrf", aggregation="chrf"),
            metric("exact_match"),
        ],
    },
    "own_scoring": {
        "kind": "gen",
        "filter_list": None,
        "process_results": "!process_results",
        "metric_list": [
            metric("length"),
            metric("of_some"),
            metric("same"),
            metric("longest", aggregation="!longest"),
        ],
    },
    "own_class": {"kind": "gen", "class": "!mixed.Mixed", "filter_list": None},
    "own_choices": {"kind": "mc", "class": "!mixed.Choosing", "doc_to_choice": None, "doc_to_target": "answer"},
    "own_documents": {"kind": "ll", "process_docs": "!first_half"},
    "shuffled_choices": {"kind": "mc", "process_docs": "!shuffled"},
    "with_examples": {
        "kind": "mc",
        "num_fewshot": 2,
        "fewshot_split": "test",
        "description": "Colours and stones.\n\n",
    },
    "with_a_beginning": {"kind": "gen", "num_fewshot": 1, "fewshot_split": "test", "gen_prefix": "It is"},
    "given_examples": {
        "kind": "gen",
        "num_fewshot": 2,
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [{"question": "red?", "answer": "blue"}, {"question": "a?", "answer": "b"}],
        },
    },
    "in_context_with_examples": {
        "kind": "mc",
        "doc_to_text": "{{label % 2}}",
        "doc_to_target": "text",
        "doc_to_choice": "{{[choices[0], choices[1]]}}",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": [metric("acc")],
    },
}
GROUPS: dict[str, dict[str, Any]] = {
    "flat": {
        "task": ["several_right", "label_as_text"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}, {"metric": "acc_norm"}],
    },
    "nested": {
        "task": ["flat", "own_documents"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    },
    "filtered": {
        "task": ["extracted"],
        "aggregate_metric_list": [{"metric": "exact_match", "filter_list": ["strict"]}],
    },
    "tagged": {"task": ["tag_of_two"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]},
    "without": {"task": ["extracted", "voted"]},
}


class _Function(str):
    """`!function utils.name`, or `!function module.name`, in a YAML file."""


yaml.SafeDumper.add_representer(
    _Function, lambda dumper, name: dumper.represent_scalar("!function", name if "." in name else f"utils.{name}")
)


def functions(value: Any) -> Any:
    """`!name` to a function of `utils`, however deep."""
    if isinstance(value, str) and value.startswith("!"):
        return _Function(value[1:])
    if isinstance(value, list):
        return [functions(part) for part in value]
    return {k: functions(part) for k, part in value.items()} if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def kinds(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The tiny model, with a tokenizer that has a chat template, and all the tasks above."""
    root = tmp_path_factory.mktemp("kinds")
    write_documents(root / "data" / "docs.jsonl", documents(10))
    for folder, data in (("tasks", "data/docs.jsonl"), (ABSOLUTE, str(root / "data" / "docs.jsonl"))):
        for name, changes in TASKS.items():
            write_task(root / folder, name, data, **functions(changes))
        for name, config in GROUPS.items():
            (root / folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, **config}))
        (root / folder / "utils.py").write_text(FUNCTIONS)
        (root / folder / "mixed.py").write_text(CLASS)
    tokenizer = copy.deepcopy(bench.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return Bench(bench.model, tokenizer, root / "tasks", bench.checkpoint)


def by_lm_eval(kinds: Bench, *names: str, **options: Any) -> dict[str, Any]:
    """What `lm_eval` reports."""
    with quiet():
        lm = HFLM(pretrained=kinds.model, tokenizer=kinds.tokenizer, batch_size=8)
        manager = TaskManager(include_path=str(kinds.folder.parent / ABSOLUTE), include_defaults=False)
        options.setdefault("bootstrap_iters", 0)
        return simple_evaluate(lm, tasks=list(names), task_manager=manager, **options)  # type: ignore[no-any-return]


def ours(kinds: Bench, *names: str, **options: Any) -> Evaluator:
    return Evaluator(
        tasks_of(kinds.folder, names, options.pop("num_fewshot", None)), kinds.tokenizer, kinds.model.config, **options
    )


def compare(evaluator: Evaluator, kinds: Bench, results: Mapping[str, Any], task: str) -> None:
    """Every metric, every item's, and every prompt."""
    scores = evaluator.score(kinds.model, {task: range(len(evaluator.items(task)))})[task]
    compared = 0
    for key, value in results["results"][task].items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr"):
            continue
        full = key if key in scores.names else name
        assert scores.score(full).value == pytest.approx(value, rel=1e-5, abs=1e-9), key
        compared += 1
    assert compared >= 1
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    asked = {sample["doc_id"]: [tuple(arguments) for arguments in sample["arguments"]] for sample in samples}
    prompts = [[tuple(instance.args) for instance in group] for group in evaluator.requests(task).by_item]
    assert prompts == [asked[k] for k in sorted(asked)]


@pytest.fixture(scope="module")
def plain(kinds: Bench) -> dict[str, Any]:
    return by_lm_eval(kinds, *TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_equals_lm_eval(kinds: Bench, plain: dict[str, Any], task: str) -> None:
    compare(ours(kinds, task), kinds, plain, task)


@pytest.mark.parametrize("task", ["all_metrics", "voted", "own_class", "in_context"])
def test_the_other_backend_equals_lm_eval(kinds: Bench, plain: dict[str, Any], task: str) -> None:
    compare(ours(kinds, task, backend="hf"), kinds, plain, task)


CHATS: list[dict[str, Any]] = [
    {},
    {"fewshot_as_multiturn": False},
    {"system_instruction": "Answer in one word."},
]


@pytest.mark.parametrize("options", CHATS, ids=lambda options: "-".join(options) or "default")
def test_chats_equal_lm_eval(kinds: Bench, options: dict[str, Any]) -> None:
    names = ["with_examples", "with_a_beginning", "given_examples", "in_context_with_examples"]
    results = by_lm_eval(kinds, *names, apply_chat_template=True, **options)
    evaluator = ours(kinds, *names, apply_chat_template=True, **options)
    for task in names:
        compare(evaluator, kinds, results, task)
    turns = evaluator.requests("with_examples").by_item[0][0].args[0].count("<user>")
    assert turns == (1 if options.get("fewshot_as_multiturn") is False else 3)


def test_a_system_instruction_without_a_chat_equals_lm_eval(kinds: Bench) -> None:
    results = by_lm_eval(kinds, "with_examples", system_instruction="One word.")
    evaluator = ours(kinds, "with_examples", system_instruction="One word.")
    compare(evaluator, kinds, results, "with_examples")
    assert evaluator.requests("with_examples").by_item[0][0].args[0].startswith("One word.")


def test_more_examples_equal_lm_eval_and_a_task_that_says_none_keeps_none(kinds: Bench) -> None:
    results = by_lm_eval(kinds, "with_examples", "own_scoring", num_fewshot=3)
    evaluator = ours(kinds, "with_examples", "own_scoring", num_fewshot=3)
    for task in ("with_examples", "own_scoring"):
        compare(evaluator, kinds, results, task)
    assert evaluator.tasks["own_scoring"].lm_eval_task.get_config("num_fewshot") == 0


def test_requests_are_the_same_however_often_they_are_built(kinds: Bench) -> None:
    """Examples and shuffled choices are drawn anew from the same seed, not from where the last draw ended."""
    tasks = load_tasks(["with_examples", "shuffled_choices"], include_path=kinds.folder)
    built = [Evaluator(tasks, kinds.tokenizer, kinds.model.config) for _ in range(2)]
    again = Evaluator(load_tasks(list(tasks), include_path=kinds.folder), kinds.tokenizer, kinds.model.config)
    for task in tasks:
        hashes = [[e.item_hash(task, k) for k in range(10)] for e in (*built, again)]
        assert hashes[0] == hashes[1] == hashes[2]
    assert tasks["shuffled_choices"].digest == again.tasks["shuffled_choices"].digest
    docs, asked = tasks["shuffled_choices"].docs, built[0].requests("shuffled_choices").by_item
    assert [doc["label"] for doc in docs] == [group[0].doc["label"] for group in asked]
    assert [doc["label"] for doc in docs] != [doc["label"] for doc in documents(10)]


def test_another_seed_draws_other_examples(kinds: Bench) -> None:
    prompts = []
    for seed in (1234, 7):
        tasks = load_tasks(["with_examples"], include_path=kinds.folder, fewshot_seed=seed)
        requests = Evaluator(tasks, kinds.tokenizer, kinds.model.config).requests("with_examples")
        prompts.append([group[0].args[0] for group in requests.by_item])
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("group", GROUPS)
def test_groups_equal_lm_eval(kinds: Bench, group: str) -> None:
    results = by_lm_eval(kinds, group, bootstrap_iters=2)  # means have an analytic error; any number asks for it
    task_set = find_tasks([group], include_path=kinds.folder)
    evaluator = Evaluator(task_set.tasks, kinds.tokenizer, kinds.model.config)
    scores = group_scores(task_set, score_table(evaluator.score(kinds.model)))
    expected = results.get("groups", {})
    assert set(scores) == set(expected)
    assert (group in scores) is (group != "without")
    for name, row in scores.items():
        for key, value in expected[name].items():
            plain, _, chosen = key.partition(",")
            if not chosen or plain.endswith("_stderr"):
                continue
            score = row[plain]
            assert score.value == pytest.approx(value, rel=1e-5)
            assert score.stderr == pytest.approx(expected[name][f"{plain}_stderr,{chosen}"], rel=1e-5)
            assert score.n == expected[name]["sample_count"][key]
        assert row
