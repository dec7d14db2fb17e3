"""From logits to log-likelihoods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.evaluation.backends.native import forward as forward_module
from evomerge.evaluation.backends.native import logprobs
from evomerge.evaluation.backends.native.forward import forward_pass, head_is_last
from evomerge.evaluation.backends.native.prefix_trees import build_tree, pack_trees
from tests.evaluation.conftest import Bench
from tests.evaluation.test_evaluator import Deaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 700, 2**19])
def test_log_probabilities_are_those_of_a_softmax(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_LOGITS", chunk)
    logits = (torch.randn(9, 300, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)
    rows, targets = torch.tensor([0, 2, 2, 5, 8]), torch.tensor([7, 299, 1, 0, 30])
    logits[5, 0] = 90.0
    log_probs, best = logprobs._log_probs(logits, rows, targets)
    wide = logits.double().numpy()
    top = wide.max(axis=1, keepdims=True)
    softmax = wide - top - np.log(np.exp(wide - top).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_probs, softmax[rows, targets], rtol=1e-6, atol=1e-5)
    assert best.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_score(bad: float) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 4] = bad
    with pytest.raises(CandidateError, match="not finite"):
        logprobs._log_probs(logits, torch.tensor([1]), torch.tensor([0]))


def test_of_equal_logits_greedy_decoding_takes_the_first() -> None:
    logits = torch.zeros(4, 5)
    logits[:, 1] = logits[:, 3] = 1.0
    rows, targets, requests = torch.arange(4), torch.tensor([1, 3, 3, 0]), np.array([0, 1, 2, 2])
    _, best = logprobs._log_probs(logits, rows, targets)
    assert best.tolist() == [True, True, True, False]
    logprobs._break_ties(logits, rows, targets, best, requests)
    # Request 2 is not greedy anyway, so nobody looks at its other token.
    assert best.tolist() == [True, False, True, False]


def test_the_head_in_parts_gives_what_the_model_gives(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[5, 9, 30, 7, 20, 8], [40, 3, 9]]
    trees = [build_tree([text], [[*text[1:], 6]], [k]) for k, text in enumerate(texts)]
    (batch,) = pack_trees(trees, share_rows=True, batch_tokens=64, max_scored=64).batches
    monkeypatch.setattr(forward_module, "HEAD_LOGITS", 2 * 259)  # two rows of 259 tokens at a time
    with torch.inference_mode(), forward_pass(bench.model) as forward:
        whole, _ = logprobs.batch_logprobs(forward, batch, head_is_last=False)
        parts, _ = logprobs.batch_logprobs(forward, batch, head_is_last=True)
        monkeypatch.undo()
        assert head_is_last(forward)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert len(whole) == 9


def test_a_head_is_not_called_alone_where_something_follows_it(bench: Bench) -> None:
    class Capped(Deaf):
        def forward(self, **inputs: object) -> object:
            output = self.model(**inputs)
            output.logits = torch.tanh(output.logits / 30) * 30
            return output

    with torch.inference_mode(), forward_pass(Capped(bench.model)) as forward:
        assert not head_is_last(forward)
