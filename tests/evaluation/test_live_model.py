"""What scorers may ask of the live model."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.evaluation.live_model import BackendModel
from tests.evaluation.conftest import Bench

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"


@pytest.fixture
def model(bench: Bench) -> BackendModel:
    evaluator = bench.evaluator("gen")
    evaluator.prepare(bench.model)
    return BackendModel("mine", bench.model, evaluator.backend, evaluator.encoder)


def test_texts_do_not_depend_on_what_else_is_asked(model: BackendModel) -> None:
    prompts = ["the river is", "seven stones and", "a"]
    together = model.generate(prompts, max_new_tokens=8)
    assert together == [model.generate([prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert all(together)
    assert model.generate([]) == []


def test_a_stop_string_ends_a_text(model: BackendModel) -> None:
    (whole,) = model.generate(["the river is"], max_new_tokens=8)
    stop = whole[3]
    assert model.generate(["the river is"], max_new_tokens=8, stop=stop) == [whole.partition(stop)[0]]


def test_chat_renders_the_template(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = bench.evaluator("gen")
    evaluator.prepare(bench.model)
    model = BackendModel("mine", bench.model, evaluator.backend, evaluator.encoder)
    with pytest.raises(TaskError, match="the tokenizer has no chat template"):
        model.chat([[{"role": "user", "content": "the river"}]])
    monkeypatch.setattr(bench.tokenizer, "chat_template", TEMPLATE)
    answers = model.chat([[{"role": "user", "content": "the river"}]], max_new_tokens=6)
    assert answers == model.generate(["user: the river\nassistant:"], max_new_tokens=6)


def test_log_likelihoods_in_the_order_of_the_pairs(model: BackendModel) -> None:
    pairs = [("the river", " is"), ("the river", " was"), ("a stone", " is"), ("the river", " is")]
    values = model.loglikelihood(pairs)
    assert values[0] == pytest.approx(values[3])
    assert len(set(values)) >= 3
    assert model.loglikelihood([]) == []


def test_what_no_candidate_asks_again_is_not_kept_for_ever(
    bench: Bench, model: BackendModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(f"the river {k}", " is") for k in range(12)]
    expected = model.loglikelihood(pairs), model.generate([text for text, _ in pairs], max_new_tokens=2)
    for module in ("tasks.requests", "backends.native.backend", "backends.native.generation"):
        monkeypatch.setattr(f"evomerge.evaluation.{module}.MOST_KEPT", 5)
    evaluator = bench.evaluator("gen")
    evaluator.prepare(bench.model)
    forgetful = BackendModel("mine", bench.model, evaluator.backend, evaluator.encoder)
    assert (forgetful.loglikelihood(pairs), forgetful.generate([text for text, _ in pairs], 2)) == expected
    backend: Any = evaluator.backend
    assert max(map(len, (evaluator.encoder._pairs, backend._pairs, backend.generator._prompts))) <= 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("text"), "generate: a list is expected, got the text 'text'"),
        (lambda m: m.generate([1]), "generate: a text is expected, got the number 1"),
        (lambda m: m.loglikelihood([("a", None)]), "loglikelihood: a text is expected, got nothing"),
        (lambda m: m.loglikelihood([("a", "")]), "the text to score is empty"),
        (lambda m: m.generate(["a"], max_new_tokens=10**6), "no room for a prompt"),
    ],
)
def test_what_cannot_be_asked(model: BackendModel, call: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        call(model)
