"""The models of the zoo: what ships becomes a checkpoint in the cache, and is good at what it should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.errors import CheckpointError, OutputError
from evomerge.zoo import models as zoo
from evomerge.zoo.models import NAMES, TINY, VERSION, ensure
from tools.zoo.skills import CHOICES

EVAL = Path(__file__).parent.parent.parent / "eval"
BASE, *EXPERTS = TINY


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: str) -> float:
    """Share of 120 benchmark items whose right answer is the likeliest, with transformers alone."""
    lines = (EVAL / "data" / f"zoo_{skill}.jsonl").read_text().splitlines()[::3]
    items = [json.loads(line) for line in lines]
    prompts = [tokenizer(item["prompt"])["input_ids"] for item in items for _ in range(CHOICES)]
    texts = [tokenizer(f"{item['prompt']} {choice}")["input_ids"] for item in items for choice in item["choices"]]
    width = max(map(len, texts))
    ids = torch.tensor([text + [tokenizer.pad_token_id] * (width - len(text)) for text in texts])
    with torch.no_grad():
        logits = model(input_ids=ids).logits.log_softmax(-1)
    chosen = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    sums = [
        row[len(prompt) - 1 : len(text) - 1].sum() for row, prompt, text in zip(chosen, prompts, texts, strict=True)
    ]
    best = torch.stack(sums).view(-1, CHOICES).argmax(1)
    return float((best == torch.tensor([item["label"] for item in items])).double().mean())


def test_the_folder_is_a_hugging_face_checkpoint() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(ensure(BASE), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.generation_config.do_sample is False
    card = (ensure(EXPERTS[0]) / "README.md").read_text()
    _, front_matter, _ = card.split("---\n", 2)
    assert yaml.safe_load(front_matter) | {"license": "apache-2.0", "base_model": f"zoo:{BASE}"} == yaml.safe_load(
        front_matter
    )


def test_an_expert_starts_from_its_base() -> None:
    base, expert = (load_file(ensure(name) / "model.safetensors") for name in (BASE, EXPERTS[0]))
    assert base.keys() == expert.keys()
    norm = "model.norm.weight"
    assert 0 < (base[norm] - expert[norm]).norm() < 0.5 * base[norm].norm()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no model 'arithmetics' \(did you mean 'arithmetic'\?\); it has base, "):
        ensure("arithmetics")


def test_each_expert_is_best_at_its_skill() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ensure(BASE))
    models = {name: AutoModelForCausalLM.from_pretrained(ensure(name)) for name in TINY}
    for expert in EXPERTS:
        skill = expert.removeprefix("tiny-")
        scores = {name: accuracy(model, tokenizer, skill) for name, model in models.items()}
        own = scores.pop(expert)
        assert own > max(scores.values()) + 0.03, (expert, own, scores)


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the models go, with nothing there yet."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path))
    return tmp_path / "zoo" / VERSION


def test_a_model_is_written_once(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [ensure(name) for name in NAMES] == [empty / name for name in NAMES]
    monkeypatch.setattr(zoo, "weight_file", lambda name: pytest.fail("written again"))
    assert [ensure(name) for name in NAMES] == [empty / name for name in NAMES]


def test_what_was_interrupted_is_completed(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "weight_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure(BASE)
    (empty / BASE / ".model.safetensors.1.partial").write_bytes(b"half")  # of a process that was killed
    assert load_file(ensure(BASE) / "model.safetensors").keys() >= {"model.norm.weight"}


def test_processes_at_once(empty: Path) -> None:
    """Each gives the whole model, without loading torch."""
    code = (
        "import sys; from evomerge.zoo.models import ensure, weight_file;"
        "assert (ensure('tiny-base') / 'model.safetensors').read_bytes() == weight_file('tiny-base');"
        "sys.exit('torch' in sys.modules)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not list((empty / BASE).glob(".*"))


def test_a_cache_that_cannot_be_written_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zoo").write_text("a file")
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path))
    with pytest.raises(OutputError, match=r"Not a directory.*set EVOMERGE_CACHE"):
        ensure(BASE)
