"""The same numbers as lm-eval's HFLM, for every type of request."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.system.quiet import quiet
from tests.architectures import ARCHITECTURES, CAUSAL
from tests.evaluation.conftest import CONFIGS, Bench, tasks_of

TOLERANCE = 1e-4
ITEMS = 2


def hflm(bench: Bench, **options: Any) -> HFLM:
    with quiet():
        return HFLM(pretrained=bench.model, tokenizer=bench.tokenizer, batch_size=4, **options)


def responses(evaluator: Evaluator, bench: Bench, task: str) -> list[Any]:
    """What the native backend answers to every request of a task."""
    evaluator.prepare(bench.model)
    requests = evaluator.requests(task)
    answers = evaluator.backend.respond(bench.model, requests, range(len(requests.by_item)))
    return [answer[0] for group in answers for answer in group]


def reference(evaluator: Evaluator, lm: HFLM, task: str) -> list[Any]:
    """What HFLM answers to the same requests."""
    instances = [copy.deepcopy(i) for group in evaluator.requests(task).by_item for i in group]
    with quiet():
        return list(getattr(lm, instances[0].request_type)(instances, disable_tqdm=True))


@pytest.fixture(scope="module")
def hflm_responses(bench: Bench) -> Callable[..., list[Any]]:
    """What HFLM answers to a task of the folder at a length of the context; each is asked once."""

    @functools.cache
    def ask(task: str, max_length: int | None = None) -> list[Any]:
        return reference(bench.evaluator(task, max_length=max_length), hflm(bench, max_length=max_length), task)

    return ask


@pytest.mark.parametrize(
    ("task", "max_length"), [("mc", None), ("mc", 24), ("pairs", None), ("pairs", 420), ("ll", None), ("ll", 24)]
)
def test_loglikelihoods_equal_hflm(
    bench: Bench, hflm_responses: Callable[..., list[Any]], task: str, max_length: int | None
) -> None:
    # At 24 tokens most contexts lose their left part, so that hardly anything is shared any more.
    evaluator = bench.evaluator(task, max_length=max_length)
    native, expected = responses(evaluator, bench, task), hflm_responses(task, max_length)
    assert [greedy for _, greedy in native] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([ll for ll, _ in native], [ll for ll, _ in expected], atol=TOLERANCE, rtol=2e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_equals_hflm(bench: Bench, name: str) -> None:
    """Long and short sequences in one batch, and text: each kind of layer has its own way to be padded and cached."""
    model = ARCHITECTURES[name].build_for_bytes(512)
    with quiet():
        lm = HFLM(pretrained=model, tokenizer=bench.tokenizer, batch_size=1)
    evaluator = Evaluator(tasks_of(bench.folder, ("mc", "gen")), bench.tokenizer, model.config)
    evaluator.prepare(model)
    for task in ("mc", "gen"):
        requests = evaluator.requests(task)
        native = [a[0] for group in evaluator.backend.respond(model, requests, range(ITEMS)) for a in group]
        instances = [copy.deepcopy(i) for group in requests.by_item[:ITEMS] for i in group]
        with quiet():
            expected = getattr(lm, instances[0].request_type)(instances, disable_tqdm=True)
        if task == "gen":
            assert native == expected
        else:
            np.testing.assert_allclose([ll for ll, _ in native], [ll for ll, _ in expected], atol=TOLERANCE, rtol=2e-6)


def test_no_number_depends_on_threads(bench: Bench) -> None:
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(responses(bench.evaluator("mc"), bench, "mc"))
    finally:
        torch.set_num_threads(before)
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_generated_text_is_batched_for_the_threads_of_the_run(bench: Bench) -> None:
    """Not for those of the process, which has a share of them where there are several workers."""
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outcomes.append(bench.evaluator("gen", threads=3).batch_digest())
        alone = bench.evaluator("gen").batch_digest()
    finally:
        torch.set_num_threads(before)
    assert outcomes[0] == outcomes[1] == alone
    assert outcomes[0] != bench.evaluator("gen", threads=1).batch_digest()


@pytest.mark.parametrize("max_length", [None, 50])
def test_rolling_loglikelihoods_equal_hflm(
    bench: Bench, hflm_responses: Callable[..., list[Any]], max_length: int | None
) -> None:
    # At 50 tokens nearly every text takes several windows.
    evaluator = bench.evaluator("rolling", max_length=max_length)
    native, expected = responses(evaluator, bench, "rolling"), hflm_responses("rolling", max_length)
    np.testing.assert_allclose(native, expected, atol=TOLERANCE, rtol=2e-6)


@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_generations_equal_hflm(bench: Bench, hflm_responses: Callable[..., list[Any]], batch_tokens: int) -> None:
    evaluator = bench.evaluator("gen", batch_tokens=batch_tokens)
    native = responses(evaluator, bench, "gen")
    assert native == hflm_responses("gen")
    assert len({len(text) for text in native}) > 3  # rows stop at different times


def test_prompts_with_a_shared_beginning_equal_hflm(bench: Bench, tmp_path: Any) -> None:
    """The same two examples before every question: read once, for one row."""
    from tests.evaluation.conftest import documents, write_documents, write_task

    write_documents(tmp_path / "data" / "docs.jsonl", documents(14))
    sampler = {"sampler": "first_n", "split": "test"}
    write_task(tmp_path / "tasks", "gen", num_fewshot=2, fewshot_split="test", fewshot_config=sampler)
    evaluator = Evaluator(load_tasks(["gen"], include_path=tmp_path / "tasks"), bench.tokenizer, bench.model.config)
    read = []
    hook = bench.model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    native = responses(evaluator, bench, "gen")
    hook.remove()
    assert native == reference(evaluator, hflm(bench), "gen")
    assert len(set(native)) > 3
    assert any(rows == 1 and length > 32 for rows, length in read[-40:])


def test_generations_by_transformers_equal_hflm(bench: Bench, hflm_responses: Callable[..., list[Any]]) -> None:
    """The path for models that do not take part in our own loop."""
    evaluator = bench.evaluator("gen")
    instances = [i for group in evaluator.requests("gen").by_item for i in group]
    texts = evaluator.backend.generator.respond(bench.model, instances, own_loop=False)  # type: ignore[attr-defined]
    assert [text for (text,) in texts] == hflm_responses("gen")


@pytest.fixture(scope="module")
def by_lm_eval(bench: Bench) -> dict[str, dict[str, float]]:
    """What `lm_eval` reports for every task, on the first 20 items."""
    from evomerge.evaluation.tasks.task_data import single_specs

    with quiet():
        manager = TaskManager(include_path=str(bench.folder), include_defaults=False)
        specs = [single_specs(name, manager.task_index)[0].load for name in CONFIGS]
        results = simple_evaluate(hflm(bench), tasks=specs, task_manager=manager, limit=20, bootstrap_iters=0)
    return results["results"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_every_metric_equals_lm_eval(bench: Bench, backend: Any, by_lm_eval: dict[str, dict[str, float]]) -> None:
    evaluator = bench.evaluator(backend=backend)
    scores = evaluator.score(bench.model, {name: range(20) for name in CONFIGS})
    compared = 0
    for task, results in by_lm_eval.items():
        for key, value in results.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr"):
                continue
            full = f"{metric},{name}" if f"{metric},{name}" in scores[task].names else metric
            assert scores[task].score(full).value == pytest.approx(value, rel=1e-5, abs=1e-9), (task, key)
            compared += 1
    assert compared == 13
    assert scores["pairs"].score("f1").stderr is None
    assert not scores["pairs"].is_itemwise("f1")


def test_standard_errors_equal_lm_eval(bench: Bench) -> None:
    """lm-eval gives means their analytic error: the sample standard deviation over the root of n."""
    from evomerge.evaluation.tasks.task_data import single_specs

    with quiet():
        manager = TaskManager(include_path=str(bench.folder), include_defaults=False)
        results = simple_evaluate(
            hflm(bench), tasks=[single_specs("mc", manager.task_index)[0].load], task_manager=manager
        )
    score = bench.evaluator("mc").score(bench.model)["mc"].score("acc")
    assert score.stderr == pytest.approx(results["results"]["mc"]["acc_stderr,none"], rel=1e-6)
    assert score.n == 24


def test_few_shot_prompts_equal_lm_eval(bench: Bench, tmp_path: Any) -> None:
    from tests.evaluation.conftest import documents, write_documents, write_task

    write_documents(tmp_path / "data" / "docs.jsonl", documents(12))
    path = write_task(tmp_path / "tasks", "mc", num_fewshot=2, fewshot_split="test")
    tasks = load_tasks(["mc"], include_path=tmp_path / "tasks")
    scores = Evaluator(tasks, bench.tokenizer, bench.model.config).score(bench.model)["mc"]
    from evomerge.evaluation.tasks.task_data import single_specs

    with quiet():
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        results = simple_evaluate(
            hflm(bench), tasks=[single_specs("mc", manager.task_index)[0].load], task_manager=manager, bootstrap_iters=0
        )
    samples = sorted(results["samples"]["mc"], key=lambda sample: sample["doc_id"])
    assert [sample["acc"] for sample in samples] == scores.values("acc").tolist()
    again = Evaluator(load_tasks(["mc"], include_path=tmp_path / "tasks"), bench.tokenizer, bench.model.config)
    prompts = [i.args[0] for group in again.requests("mc").by_item for i in group]
    assert prompts == [argument[0] for sample in samples for argument in sample["arguments"]]


def test_bfloat16_is_within_rounding_of_hflm(bench: Bench) -> None:
    model = copy.deepcopy(bench.model).to(torch.bfloat16)
    half = Bench(model, bench.tokenizer, bench.folder, bench.checkpoint)
    evaluator = half.evaluator("mc")
    native = [ll for ll, _ in responses(evaluator, half, "mc")]
    expected = [ll for ll, _ in reference(evaluator, hflm(half), "mc")]
    np.testing.assert_allclose(native, expected, rtol=0.03)
