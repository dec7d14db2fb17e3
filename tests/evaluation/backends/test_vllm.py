"""The vLLM backend with a double in the engine's place."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from evomerge.errors import BadInput, CandidateError
from evomerge.evaluation.backends.registry import BackendOptions
from evomerge.evaluation.backends.vllm import Engine, VLLMBackend, Weights, connect_vllm
from evomerge.evaluation.backends.vllm_double import DoubleLLM, connect_double
from evomerge.evaluation.tasks.requests import Encoder
from tests.evaluation.conftest import CONFIGS, Bench
from tests.models import VOCABULARY


@pytest.fixture
def backend(bench: Bench) -> VLLMBackend:
    return VLLMBackend(BackendOptions(Encoder(bench.tokenizer, 512), VOCABULARY), connect_double)


def double(backend: VLLMBackend) -> DoubleLLM:
    assert isinstance(backend._engine, Engine)
    llm = backend._engine.llm
    assert isinstance(llm, DoubleLLM)
    return llm


def evaluator(bench: Bench, backend: VLLMBackend) -> Any:
    made = bench.evaluator()
    made.backend = backend
    return made


def test_scores_are_the_candidates_and_every_candidate_is_handed_over(bench: Bench, backend: VLLMBackend) -> None:
    other = copy.deepcopy(bench.model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight *= -1
    selection = {name: [3, 0, 7] for name in CONFIGS}
    made, native = evaluator(bench, backend), bench.evaluator()
    for model in (bench.model, other, bench.model):
        scores, expected = made.score(model, selection), native.score(model, selection)
        for task in CONFIGS:
            for metric in expected[task].metrics.keys() - {"tokens"}:  # of the text that it gives
                np.testing.assert_allclose(
                    scores[task].values(metric), expected[task].values(metric), rtol=1e-4, atol=1e-5
                )
    round_ = ["start", "update", "finish", "reset"]
    assert double(backend).calls == ["init", *round_ * 3]  # one engine, three candidates


def test_weights_changed_in_place_reach_the_engine(bench: Bench, backend: VLLMBackend) -> None:
    """A search has one resident model, whose tensors change under it."""
    model = copy.deepcopy(bench.model)
    made = evaluator(bench, backend)
    before = made.score(model, {"rolling": [0, 1]})["rolling"].score("bits_per_byte").value
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    after = made.score(model, {"rolling": [0, 1]})["rolling"].score("bits_per_byte").value
    expected = bench.evaluator().score(model, {"rolling": [0, 1]})["rolling"].score("bits_per_byte").value
    assert after == pytest.approx(expected, rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)


def test_a_model_of_other_layers_gets_an_engine_of_its_own(bench: Bench, backend: VLLMBackend) -> None:
    backend.prepare(bench.model)
    first = double(backend)
    config = copy.deepcopy(bench.model.config)
    config.num_hidden_layers = 6
    longer = LlamaForCausalLM(config).eval()
    for k in range(6):  # the first two layers twice, sharing their tensors, as the resident model does it
        longer.model.layers[k] = copy.copy(bench.model.model.layers[max(0, k - 2)])
    backend.prepare(longer)
    assert double(backend) is not first
    for layer, expected in zip(double(backend).model.model.layers, longer.model.layers, strict=True):
        torch.testing.assert_close(layer.mlp.up_proj.weight, expected.mlp.up_proj.weight)


def test_weights_have_a_checkpoints_names(bench: Bench) -> None:
    names = [name for name, _ in Weights(bench.model)]
    assert len(set(names)) == len(names)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied, so a file has none
    untied = LlamaForCausalLM(type(bench.model.config)(**bench.model.config.to_dict() | {"tie_word_embeddings": False}))
    assert "lm_head.weight" in [name for name, _ in Weights(untied)]


def test_a_model_that_is_not_finite_has_no_score(bench: Bench, backend: VLLMBackend) -> None:
    broken = copy.deepcopy(bench.model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CandidateError, match="not finite"):
        evaluator(bench, backend).score(broken, {"gen": [0]})


def test_digests_tell_backends_and_items_apart(bench: Bench, backend: VLLMBackend) -> None:
    requests = bench.evaluator("mc").requests("mc")
    assert backend.digest(requests, [0, 1]) != backend.digest(requests, [1, 0])
    assert bench.evaluator("mc", backend="hf").backend.digest(requests, [0, 1]) != backend.digest(requests, [0, 1])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_install(bench: Bench) -> None:
    with pytest.raises(BadInput, match=r'vLLM is not installed; run pip install "evomerge\[vllm\]"'):
        bench.evaluator("mc", backend="vllm")


def test_a_model_on_the_cpu_is_refused(bench: Bench) -> None:
    model = AutoModelForCausalLM.from_config(bench.model.config)
    with pytest.raises(BadInput, match="device has to be cuda, got cpu"):
        connect_vllm(bench.folder, Weights(model), 512)
