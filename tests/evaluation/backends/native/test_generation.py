"""Where generated text ends, and what generation_config.json says of it: the texts of HFLM with one prompt a batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, GenerationConfig

from evomerge.errors import TaskError
from evomerge.evaluation.backends.registry import BackendOptions
from evomerge.evaluation.backends.vllm import VLLMBackend
from evomerge.evaluation.backends.vllm_double import connect_double
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.system.quiet import quiet
from tests.evaluation.conftest import documents, write_documents, write_task
from tests.models import byte_tokenizer, write_tiny_llama

END = "<|im_end|>"
CHAIN = [":", " ", "7", ".", END, "8", "?"]
"""What the model writes, one token after the other, whatever stood before; then from the start again."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model that writes the chain, where after a space "9" is nearly as likely as "7"; and its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    ids = [tokenizer.encode(piece)[0] for piece in CHAIN]
    rival = tokenizer.encode("9")[0]
    model: Any = AutoModelForCausalLM.from_pretrained(
        write_tiny_llama(tmp_path_factory.mktemp("chain") / "model", 0, tied=False), dtype=torch.float32
    ).eval()
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        table = model.model.embed_tokens.weight.normal_()
        unit = table / table.norm(dim=-1, keepdim=True)
        model.lm_head.weight.zero_()
        for before, after in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.lm_head.weight[after] = unit[before]
        model.lm_head.weight[rival] = 0.98 * unit[ids[1]]
        model.lm_head.weight[ids[3]] += unit[rival]
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    write_documents(root / "data" / "docs.jsonl", documents(4))
    for name, until in (("sums", ["\n"]), ("turns", [END])):
        kwargs = {"until": until, "do_sample": False, "max_gen_toks": 12}
        write_task(root / "tasks", name, kind="gen", generation_kwargs=kwargs)
    together = {"until": ["\n"], "do_sample": False, "max_length": 80}
    write_task(root / "tasks", "together", kind="gen", generation_kwargs=together)
    write_task(root / "tasks", "too_short", kind="gen", generation_kwargs=together | {"max_length": 5})
    write_task(root / "tasks", "unknown_key", kind="gen", generation_kwargs={"until": ["\n"], "hottness": 2})
    return root / "tasks"


def texts(chain: tuple[Any, Any], folder: Path, task: str, eos: str, settings: dict[str, Any], **options: Any) -> Any:
    """(the texts of the native backend, those of HFLM with one prompt a batch)."""
    model, tokenizer = copy.copy(chain[0]), copy.deepcopy(chain[1])
    tokenizer.eos_token = eos
    model.generation_config = GenerationConfig(**{"eos_token_id": 1, "pad_token_id": 1} | settings)
    evaluator = Evaluator(load_tasks([task], include_path=folder), tokenizer, model.config, **options)
    evaluator.prepare(model)
    requests = evaluator.requests(task)
    own = [answer[0][0] for answer in evaluator.backend.respond(model, requests, range(4))]
    with quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
        instances = [copy.deepcopy(group[0]) for group in requests.by_item]
        return own, list(lm.generate_until(instances, disable_tqdm=True))


CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "an end token of generation_config.json alone": ("sums", "</s>", {"eos_token_id": [1, 259]}, " 7."),
    "the tokenizer's end token alone": ("sums", END, {}, " 7."),
    "a special token in the task's until alone": ("turns", "</s>", {}, " 7."),
    "a repetition penalty": ("sums", "</s>", {"repetition_penalty": 1.3, "eos_token_id": [1, 259]}, ""),
    "none of them": ("sums", "</s>", {}, " 7.8?: 7.8"),
    "max_new_tokens, which goes before the task's limit": ("sums", "</s>", {"max_new_tokens": 3}, " 7."),
    "max_length, of prompt and text together": ("together", "</s>", {}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_end_where_hflms_do(chain: tuple[Any, Any], folder: Path, case: str) -> None:
    task, eos, settings, beginning = CASES[case]
    own, expected = texts(chain, folder, task, eos, settings)
    assert own == expected
    assert own[0].startswith(beginning)
    if case == "an end token of generation_config.json alone":
        assert own == [" 7."] * 4


@pytest.mark.parametrize("end", [".", 17])
def test_what_comes_before_the_end_of_thinking_does_not_count(
    chain: tuple[Any, Any], folder: Path, end: str | int
) -> None:
    if isinstance(end, int):
        end = chain[1].encode(".")[0]
    own, expected = texts(chain, folder, "sums", "</s>", {}, think_end_token=end)
    assert own == expected
    assert not any("." in text for text in own)
    model, tokenizer = chain
    evaluator = Evaluator(load_tasks(["sums"], include_path=folder), tokenizer, model.config)
    requests = evaluator.requests("sums")
    options = BackendOptions(evaluator.encoder, len(tokenizer), think_end_token=end)
    answers = VLLMBackend(options, connect_double).respond(model, requests, range(4))
    given = [answer[0][0].replace("<|im_end|>", "") for answer in answers]  # lm-eval leaves it in what vLLM writes
    assert given == expected


def test_settings_that_cannot_be_are_told_with_the_task(chain: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = chain
    for task, reason in (("too_short", "max_length is 5"), ("unknown_key", "hottness")):
        evaluator = Evaluator(load_tasks([task], include_path=folder), tokenizer, model.config)
        with pytest.raises(TaskError, match=rf"task '{task}'.*{reason}"):
            evaluator.score(model)


def test_a_pad_token_without_a_row_is_no_obstacle(chain: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = chain[0], copy.deepcopy(chain[1])
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.pad_token = "[PAD]"
    assert tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]
    tasks = load_tasks(["sums"], include_path=folder)
    padded = Evaluator(tasks, tokenizer, model.config).score(model)["sums"]
    plain = Evaluator(tasks, chain[1], model.config).score(model)["sums"]
    assert padded.values("exact_match").tolist() == plain.values("exact_match").tolist()
