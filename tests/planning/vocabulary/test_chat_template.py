"""Chat templates: formats by name, `auto`, and Jinja of the recipe's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from evomerge.errors import RecipeError
from evomerge.planning.vocabulary.chat_template import FORMATS, chosen_template
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.models import byte_tokenizer

TURNS = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]

# The conversation above, and the same without its system message, each as it goes into the model for the next answer.
RENDERED = {
    "alpaca": (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nBye\n\n### Response:\n",
        "### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nBye\n\n### Response:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "exaone": (
        "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|user|]Bye\n[|assistant|]",
        "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Yes?<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s> [INST] Be kind.\n\nHi [/INST] Yes?</s> [INST] Bye [/INST]",
        "<s> [INST] Hi [/INST] Yes?</s> [INST] Bye [/INST]",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORMATS[name]
    messages = [{"role": role, "content": content} for role, content in TURNS]
    found = tuple(
        tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=True)
        for part in (messages, messages[1:])
    )
    assert found == RENDERED[name]


def recipe(folders: list[Path], **more: Any) -> Any:
    models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders]
    return parse_recipe({"merge_method": "linear", "models": models, **more})


@pytest.fixture
def three(tiny_family: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Three models, of which the last two have the same template, one of them in an old place."""
    folders = [Path(shutil.copytree(tiny_family[name], tmp_path / name)) for name in "abc"]
    (folders[0] / "chat_template.jinja").write_text("{{ 'first' }}")
    (folders[1] / "chat_template.jinja").write_text("{{ 'common' }}\n")
    config = json.loads((folders[2] / "tokenizer_config.json").read_text()) | {"chat_template": "{{ 'common' }}"}
    (folders[2] / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


@pytest.mark.parametrize(
    ("wanted", "order", "expected"),
    [
        ("auto", [0, 1, 2], "{{ 'common' }}"),
        ("auto", [0, 1], "{{ 'first' }}"),
        ("chatml", [2, 0], FORMATS["chatml"]),
        ("{{ messages[0].content }}", [2], "{{ messages[0].content }}"),
    ],
)
def test_the_template_is_written(
    three: list[Path], tmp_path: Path, wanted: str, order: list[int], expected: str
) -> None:
    out = tmp_path / "out"
    merge_to_folder(recipe([three[i] for i in order], chat_template=wanted), out)
    assert AutoTokenizer.from_pretrained(out).chat_template == expected
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    own = (three[order[0]] / "tokenizer.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == own


def test_auto_without_any(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    warnings: list[str] = []
    merge_to_folder(recipe([tiny_family["a"]], chat_template="auto"), tmp_path / "out", warn=warnings.append)
    assert warnings == ["chat_template: auto finds none: no model has one"]
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_what_is_no_template() -> None:
    with pytest.raises(RecipeError, match=r"no format is called 'chatlm', .* \(did you mean 'chatml'\?\)"):
        chosen_template("chatlm", [])
    with pytest.raises(RecipeError, match="line 2 of the Jinja template: Unexpected end of template"):
        chosen_template("{% for m in messages %}\n{{ m.content }}", [])
    loop = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert chosen_template(loop, []) == loop
