"""The training of the zoo: exact on every machine, and kept without loss in what ships."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.zoo import models
from evomerge.zoo.models import TINY, ensure
from tests.tools.short_training import SHORT
from tools.zoo import __main__ as zoo
from tools.zoo.forward import last_states
from tools.zoo.sizes import SIZES, Training
from tools.zoo.skills import OPENERS, lexicon
from tools.zoo.training import IGNORED, draw_batches, zoo_tokenizer


def test_a_known_word_is_one_token_and_any_text_comes_back() -> None:
    tokenizer = zoo_tokenizer()
    for word in lexicon():
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    for word in OPENERS:
        assert len(tokenizer(word)["input_ids"]) == 1, word
    for text in ("add 47 + 25 = 72", "naïve ✓ text\n\twith anything", " madder catadd"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_only_answers_are_learnt() -> None:
    tokenizer = zoo_tokenizer()
    ids, labels = draw_batches(Training({"reverse": 3}, 2, 1e-3), tokenizer)
    assert ids.shape == labels.shape == (2, 3, 15)  # reverse, 6 letters, =, 6 letters, </s>
    assert (labels[..., :8] == IGNORED).all()
    assert torch.equal(labels[..., 8:], ids[..., 8:])
    assert torch.equal(ids[..., 1:7].flip(-1), ids[..., 8:14])  # no slips


def test_the_forward_pass_is_transformers() -> None:
    folder = ensure(TINY[0])
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([zoo_tokenizer()(text)["input_ids"] for text in ("add 47 + 25 = 72", "add 11 + 30 = 41")])
    weights = {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(last_states(weights, model.config, ids).float(), expected, rtol=1e-4, atol=1e-5)


def test_the_names_are_those_that_ship() -> None:
    assert tuple(name for size in SIZES for name in size.names) == models.NAMES


_SHORT_TRAINING = """
import hashlib
from tests.tools.short_training import SHORT
from tools.zoo.__main__ import trained
print(hashlib.sha256(b"".join(trained(SHORT).values())).hexdigest())
"""


def test_a_short_training_gives_known_bits() -> None:
    """Without vector instructions and on one thread, as with them: sums are rounded otherwise, and nothing changes."""
    plain = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SHORT_TRAINING]
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6a6cda6744dee5be4fafd52e325bcd7430660b194cd3e80c4ea38b44409a39e6"


def test_what_is_written_is_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written once, it compares as equal, whatever torch has drawn since; a changed file is named."""
    monkeypatch.setattr(zoo, "SIZES", (SHORT,))
    monkeypatch.setattr(zoo, "DATA", tmp_path)
    monkeypatch.setattr(models, "DATA", tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert zoo.main([]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().err.splitlines()[3] == "training zoo:tiny-base: step 20 of 20"
    torch.rand(1)
    assert zoo.main(["--check"]) == 0
    (tmp_path / "tiny-facts.z").write_bytes((tmp_path / "tiny-reverse.z").read_bytes())
    assert zoo.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "other than trained: tiny-facts.z"


def test_minus_zero_is_kept() -> None:
    weights = torch.tensor([0.0, -0.0, 1.0, -(2.0**-20), 15.5])
    base = zoo.save({"w": torch.tensor([-0.0, 0.0, -1.0, 3.0, -15.5])})
    content = zoo.save({"w": weights})
    assert zlib.decompress(zoo.packed(content, base))[-20:-15] == bytes([0, 255, 0, 1, 0])  # the lowest bytes
