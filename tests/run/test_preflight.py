"""What is told before anything is spent: models that cannot read, and chat models that do not know when to stop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.errors import CheckpointError
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.run.check import check_search
from evomerge.run.preflight import end_of_turn, read_texts, stop_tokens, text_loss
from evomerge.run.search import start
from evomerge.spec.load import parse_spec
from tests.frame import search_spec, write_json

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}END{% endfor %}"


@pytest.fixture
def family(tiny_family: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of the tiny family, to break."""
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_family.items()}


def change(folder: Path, name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrites one tensor of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = to(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def chat(folder: Path, end: str, stops: int | list[int]) -> None:
    """Makes a checkpoint a chat model whose turns end with `end`."""
    (folder / "chat_template.jinja").write_text(TURNS.replace("END", end))
    write_json(folder / "generation_config.json", eos_token_id=stops)


def test_loss_of_even_guesses(tiny_family: dict[str, Path]) -> None:
    """Without an embedding all logits are 0: log(259) nats for each of the 3 + 1 tokens that follow another."""
    model = AutoModelForCausalLM.from_pretrained(tiny_family["base"]).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    loss, guessing = text_loss(model, [[5, 6, 7, 8], [9, 10]])
    assert loss == pytest.approx(math.log(259))
    assert guessing == pytest.approx(math.log(259))


def test_loss_is_the_mean_over_tokens(tiny_family: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family["a"]).eval()
    rows = [[5, 6, 7, 8], [9, 10]]
    with torch.inference_mode():
        means = [float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) for row in rows]
    assert text_loss(model, rows)[0] == pytest.approx((3 * means[0] + means[1]) / 4, rel=1e-5)


def test_models_that_are_fine_say_nothing(tiny_family: dict[str, Path]) -> None:
    runner = ModelRunner(open_problem(parse_spec(search_spec(tiny_family))))
    assert read_texts(runner, {name: str(folder) for name, folder in tiny_family.items()}, "float32") == []


def test_logits_that_overflow_end_the_run_before_its_first_candidate(family: dict[str, Path], tmp_path: Path) -> None:
    """Finite weights, infinite logits: told of every such model, before anything is scored."""
    for name in "ab":
        change(family[name], "model.norm.weight", lambda weight: torch.full_like(weight, 3e38))
    spec = parse_spec(search_spec(family, run__keep=0))
    with pytest.raises(CheckpointError, match="its logits are not finite") as caught:
        start(spec, folder=tmp_path / "run")
    assert [problem[:2] for problem in caught.value.problems] == ["a:", "b:"]
    assert "evaluation.dtype is float32" in caught.value.problems[0]
    assert not (tmp_path / "run").exists()


def test_a_model_worse_than_guessing_is_named(family: dict[str, Path]) -> None:
    change(family["c"], "model.embed_tokens.weight", lambda weight: 200 * weight)
    text = check_search(parse_spec(search_spec(family)))
    lines = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("warning: c: ")
    assert "where guessing costs 5.6" in lines[0]  # log(259) = 5.56


def test_end_of_turn(family: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family["a"])
    tokenizer.chat_template = TURNS.replace("END", "</s>\n")
    assert end_of_turn(tokenizer) == ("</s>", 1)
    tokenizer.chat_template = TURNS.replace("END", "\n")
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert end_of_turn(tokenizer) is None


def test_stop_tokens(family: dict[str, Path]) -> None:
    """a ends turns as it stops; b stops at 1 alone, but ends turns with <pad> (2); c stops at 2 and base does not."""
    chat(family["a"], "</s>", 1)
    chat(family["b"], "<pad>", 1)
    chat(family["c"], "<pad>", [1, 2])
    models = {name: open_checkpoint(str(folder)) for name, folder in family.items()}
    found = stop_tokens(models, models["base"])
    assert [line[:2] for line in found] == ["b:", "c:"]
    assert "ends a turn with '<pad>' (2), but generation stops at 1: set eos_token_id" in found[0]
    assert f"a merge gets the generation_config.json of {family['base']}, which stops at 1" in found[1]
    assert stop_tokens(models, models["c"]) == found[:1]


def test_a_template_inside_the_tokenizers_settings_counts_too(family: dict[str, Path]) -> None:
    write_json(family["a"] / "tokenizer_config.json", chat_template=TURNS.replace("END", "<pad>"))
    model = open_checkpoint(str(family["a"]))
    (line,) = stop_tokens({"a": model}, model)
    assert "'<pad>' (2)" in line
