"""Rows that come and go behind one shared beginning: the texts of HFLM, whatever the attention takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from evomerge.errors import CandidateError
from evomerge.evaluation.backends.native import generation
from evomerge.evaluation.backends.native.decoding import Rows, attention_in_parts, read_stem, supports_parts
from evomerge.evaluation.backends.native.forward import forward_pass
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.system.quiet import quiet
from tests.evaluation.conftest import Bench, documents, write_documents, write_task

SHOTS, ITEMS = 2, 24


@pytest.fixture(scope="module")
def few_shot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a task with two examples before every question; the last question leaves no room for them all."""
    root = tmp_path_factory.mktemp("few_shot")
    docs = documents(ITEMS)
    docs[-1]["question"] = "under a river " * 20
    write_documents(root / "data" / "docs.jsonl", docs)
    sampler = {"sampler": "first_n", "split": "test"}
    kwargs = {"until": ["0", "Y"], "max_gen_toks": 30, "do_sample": False}
    options = {"num_fewshot": SHOTS, "fewshot_split": "test", "fewshot_config": sampler, "generation_kwargs": kwargs}
    write_task(root / "tasks", "gen", **options)
    return root / "tasks"


@pytest.fixture(scope="module")
def expected(bench: Bench, few_shot: Path) -> list[str]:
    """What HFLM writes."""
    requests = evaluator_of(bench, few_shot).requests("gen")
    with quiet():
        lm = HFLM(pretrained=bench.model, tokenizer=bench.tokenizer, batch_size=4, max_length=330)
        instances = [copy.deepcopy(group[0]) for group in requests.by_item]
        return list(lm.generate_until(instances, disable_tqdm=True))


def evaluator_of(bench: Bench, folder: Path) -> Evaluator:
    tasks = load_tasks(["gen"], include_path=folder)
    return Evaluator(tasks, bench.tokenizer, bench.model.config, max_length=330, threads=1)


@pytest.mark.parametrize("in_parts", [True, False])
def test_rows_that_take_the_places_of_others_are_written_as_hflm_writes_them(
    bench: Bench, few_shot: Path, expected: list[str], in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_parts:
        monkeypatch.setattr("evomerge.evaluation.backends.native.decoding.supports_parts", lambda forward: False)
    monkeypatch.setattr(generation, "MAX_ROWS", 5)
    evaluator = evaluator_of(bench, few_shot)
    evaluator.prepare(bench.model)
    read: list[torch.Size] = []
    hook = bench.model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    answers = evaluator.backend.respond(bench.model, evaluator.requests("gen"), range(SHOTS, ITEMS))
    hook.remove()
    assert [answer[0][0] for answer in answers] == expected[SHOTS:]
    assert len({len(text) for text in expected}) > 4  # rows stop at different times
    assert max(rows for rows, _ in read) == 5
    # One prompt is cut on its left and shares nothing; what the others begin with is still read once.
    prompts = [group[0].args[0] for group in evaluator.requests("gen").by_item]
    columns = zip(*prompts[SHOTS:-1], strict=False)
    beginning = next(k for k, characters in enumerate(columns) if len(set(characters)) > 1)
    assert sum(length >= beginning for _, length in read) == 2
    assert bench.model.config._attn_implementation == "sdpa"


def test_both_ways_give_the_same_logits_when_rows_have_moved_and_stores_have_grown(bench: Bench) -> None:
    stem, texts = [*range(40, 80)], [[5, 6, 7], [9], [11, 12], [13, 14, 15, 16, 17]]
    logits = []
    with torch.inference_mode(), forward_pass(bench.model) as forward:
        for in_parts in (True, False):
            with attention_in_parts(bench.model, on=in_parts):
                rows = Rows(forward, read_stem(forward, stem), 4, in_parts=in_parts)
                rows.add(texts[:3])
                assert rows.keep([1, 2]) == [2, 1]
                rows.add(texts[3:])
                for token in range(80):
                    after = rows.step([20 + token % 7, 30, 31])
                logits.append(after)
        written = [[*texts[2], *(20 + token % 7 for token in range(80))], [9, *[30] * 80], [*texts[3], *[31] * 80]]
        plain = [bench.model(input_ids=torch.tensor([stem + text])).logits[0, -1] for text in written]
    for one, other, alone in zip(*logits, plain, strict=True):
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, alone, rtol=1e-4, atol=1e-4)


def test_a_model_says_whether_its_attention_can_be_taken_apart(bench: Bench) -> None:
    def ask(model: Any) -> bool:
        with torch.inference_mode(), forward_pass(model) as forward:
            return supports_parts(forward)

    assert ask(bench.model)
    other = copy.deepcopy(bench.model)
    other.config._attn_implementation = "eager"
    assert not ask(other)
    other = copy.deepcopy(bench.model)
    for layer in other.model.layers:  # one that never asks for the interface
        layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
    assert not ask(other)
    with torch.no_grad():
        other = copy.deepcopy(bench.model)
        other.model.norm.weight.fill_(torch.nan)
    with pytest.raises(CandidateError, match="not finite"):
        ask(other)
