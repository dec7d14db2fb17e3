from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.backends.native.forward import forward_pass
from evomerge.evaluation.backends.native.logprobs import supports_tree_masks
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from tests.evaluation.conftest import CONFIGS, Bench, documents, write_documents, write_task
from tests.models import VOCABULARY


def test_scores_do_not_depend_on_batches_or_on_the_items_around(bench: Bench) -> None:
    whole = bench.evaluator("mc", "rolling").score(bench.model)
    small = bench.evaluator("mc", "rolling", batch_tokens=64)
    order = [7, 3, 11, 0]
    some = small.score(bench.model, {"mc": order, "rolling": order})
    for task, metric in (("mc", "prob"), ("mc", "acc"), ("rolling", "bits_per_byte")):
        assert some[task].items == tuple(f"{task}:{k}" for k in order)
        expected = whole[task].take(order).values(metric)
        np.testing.assert_allclose(some[task].values(metric), expected, rtol=1e-4)


def test_scoring_again_gives_the_same_bits_without_building_anything_anew(bench: Bench) -> None:
    evaluator = bench.evaluator()
    selection = {name: tuple(range(0, 24, 2)) for name in CONFIGS}
    first, again = evaluator.score(bench.model, selection), evaluator.score(bench.model, selection)
    assert {t: s.scores() for t, s in first.items()} == {t: s.scores() for t, s in again.items()}
    backend: Any = evaluator.backend
    requests = evaluator.requests("mc")
    assert backend.packed(requests, selection["mc"]) is backend.packed(requests, selection["mc"])


def test_smooth_metrics_by_hand(bench: Bench) -> None:
    evaluator = bench.evaluator("mc", "ll")
    scores = evaluator.score(bench.model, {"mc": [2], "ll": [2]})
    doc = documents()[2]
    backend: Any = evaluator.backend
    lls = np.array([answer[0][0] for answer in backend.respond(bench.model, evaluator.requests("mc"), [2])[0]])
    shares = np.exp(lls) / np.exp(lls).sum()
    assert scores["mc"].score("prob").value == pytest.approx(shares[doc["label"]])
    assert scores["mc"].score("loss").value == pytest.approx(-np.log(shares[doc["label"]]))
    lengths = np.array([len(choice) for choice in doc["choices"]])
    normed = np.exp(lls / lengths * lengths.mean())
    assert scores["mc"].score("prob_norm").value == pytest.approx(normed[doc["label"]] / normed.sum())
    assert scores["mc"].score("nll_byte").value == pytest.approx(-lls[doc["label"]] / lengths[doc["label"]])  # ASCII
    ((((ll, _),),),) = backend.respond(bench.model, evaluator.requests("ll"), [2])
    assert scores["ll"].score("nll").value == pytest.approx(-ll)
    assert scores["ll"].score("prob").value == pytest.approx(np.exp(ll))


def test_digests_follow_what_they_name(bench: Bench) -> None:
    evaluator = bench.evaluator("mc", "gen")
    evaluator.prepare(bench.model)
    first = evaluator.batch_digest({"mc": (0, 1, 2)})
    assert first == bench.evaluator("mc").batch_digest({"mc": (0, 1, 2)})
    others = [
        evaluator.batch_digest({"mc": (0, 1, 3)}),
        evaluator.batch_digest({"gen": (0, 1, 2)}),
        bench.evaluator("mc", backend="hf").batch_digest({"mc": (0, 1, 2)}),
    ]
    assert len({first, *others}) == 4
    digests = {bench.evaluator("mc", batch_tokens=tokens).batch_digest() for tokens in (64, 4096)}
    assert len(digests) == 2
    hashes = [evaluator.item_hash("mc", k) for k in range(24)]
    assert len(set(hashes)) == 24
    assert hashes == [bench.evaluator("mc").item_hash("mc", k) for k in range(24)]


def test_nan_weights_fail_and_get_no_score(bench: Bench) -> None:
    broken = copy.deepcopy(bench.model)
    evaluator = bench.evaluator()
    evaluator.prepare(bench.model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    for task in CONFIGS:
        with pytest.raises(CandidateError, match="not finite"):
            evaluator.score(broken, {task: [0, 1]})
    with pytest.raises(CandidateError, match="not finite"):
        bench.evaluator("mc").score(broken)
    with pytest.raises(CandidateError, match="not finite"):
        bench.evaluator("mc", backend="hf").score(broken)
    # The evaluator is none the worse for it.
    assert evaluator.score(bench.model, {"mc": [0, 1]})["mc"].score("acc").n == 2


def test_an_empty_selection_is_refused(bench: Bench) -> None:
    with pytest.raises(TaskError, match="'mc': no items are selected"):
        bench.evaluator("mc").score(bench.model, {"mc": ()})
    with pytest.raises(TaskError, match="'other' was not loaded; there are mc"):
        bench.evaluator("mc").score(bench.model, {"other": (0,)})


def test_a_text_longer_than_the_context_is_refused(bench: Bench) -> None:
    with pytest.raises(TaskError, match=r"task 'pairs', item \d+: a text of \d+ tokens to score does not fit .* 32"):
        bench.evaluator("pairs", max_length=32).score(bench.model)
    with pytest.raises(TaskError, match="'gen' generates up to 12 tokens, which leaves no room"):
        bench.evaluator("gen", max_length=12).score(bench.model)


def test_an_empty_text_is_refused(bench: Bench, tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", [{**doc, "text": ""} for doc in documents(3)])
    write_task(tmp_path / "tasks", "rolling")
    tasks = load_tasks(["rolling"], include_path=tmp_path / "tasks")
    with pytest.raises(TaskError, match="item 0: its text is empty"):
        Evaluator(tasks, bench.tokenizer, bench.model.config).score(bench.model)


def test_a_tokenizer_without_a_start_or_a_template_is_refused(bench: Bench) -> None:
    tokenizer = copy.deepcopy(bench.tokenizer)
    with pytest.raises(TaskError, match="the tokenizer has no chat template"):
        bench.evaluator("mc", apply_chat_template=True)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(TaskError, match="neither a BOS nor an EOS token"):
        Evaluator(load_tasks(["mc"], include_path=bench.folder), tokenizer, bench.model.config)


def test_a_chat_template_wraps_every_prompt(bench: Bench) -> None:
    tokenizer = copy.deepcopy(bench.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tasks = load_tasks(["mc"], include_path=bench.folder)
    evaluator = Evaluator(tasks, tokenizer, bench.model.config, apply_chat_template=True)
    prompt = evaluator.requests("mc").by_item[1][0].args[0]
    assert prompt == f"[user]Q: {documents()[1]['question']}\nA:[assistant]"
    assert evaluator.score(bench.model, {"mc": [0, 1]})["mc"].score("acc").n == 2


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def mistral(window: int) -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.3,
        eos_token_id=1,
        bos_token_id=0,
    )
    return MistralForCausalLM(config).eval()


class Deaf(torch.nn.Module):
    """A model that ignores whatever mask it is given."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.dtype = model, model.config, model.dtype
        self.generation_config = model.generation_config

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: Any, use_cache: bool, **ignored: Any) -> Any:
        return self.model(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("name", ["gpt2", "wide window", "narrow window", "deaf"])
def test_other_architectures_get_the_numbers_of_one_sequence_a_row(bench: Bench, name: str) -> None:
    models = {"gpt2": gpt2, "wide window": lambda: mistral(4096), "narrow window": lambda: mistral(12)}
    model = Deaf(bench.model) if name == "deaf" else models[name]()
    with torch.inference_mode(), forward_pass(model) as forward:
        assert supports_tree_masks(forward) is (name in ("gpt2", "wide window"))
    evaluator = bench.evaluator("mc", "rolling")
    plain = bench.evaluator("mc", "rolling")
    backend: Any = plain.backend
    backend.logprobs.tree_masks = False
    scores, reference = evaluator.score(model), plain.score(model)
    np.testing.assert_allclose(scores["mc"].values("loss"), reference["mc"].values("loss"), atol=1e-3)
    expected = reference["rolling"].values("bits_per_byte")
    np.testing.assert_allclose(scores["rolling"].values("bits_per_byte"), expected, rtol=1e-4)


def test_a_soft_cap_after_the_head_counts(bench: Bench) -> None:
    """Scores come from the logits the model gives, not from its head alone."""

    class Capped(Deaf):
        def forward(self, **inputs: Any) -> Any:
            output = self.model(**inputs)
            output.logits = output.logits / 30
            return output

    scores = bench.evaluator("mc").score(Capped(bench.model))["mc"]
    plain = bench.evaluator("mc").score(bench.model)["mc"]
    assert scores.score("loss").value != pytest.approx(plain.score("loss").value, rel=0.01)


def test_bfloat16_models_support_tree_masks(bench: Bench) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench.checkpoint, dtype=torch.bfloat16).eval()
    with torch.inference_mode(), forward_pass(model) as forward:
        assert supports_tree_masks(forward)
    assert AutoTokenizer.from_pretrained(bench.checkpoint).bos_token_id == 0
