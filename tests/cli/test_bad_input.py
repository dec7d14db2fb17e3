"""Benchmarks, models and settings that cannot be scored, as a user meets them: a message in time, and no score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.evaluation.conftest import documents, write_documents, write_task
from tests.frame import invoke, search_spec

NOTHING = "def nothing(docs):\n    return docs.select([])\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some good tasks and one for everything that can be wrong."""
    root = tmp_path_factory.mktemp("bad")
    folder = root / "tasks"
    write_documents(root / "data" / "docs.jsonl", documents())
    write_documents(root / "data" / "none.jsonl", [])
    for name in ("mc", "gen", "rolling"):
        write_task(folder, name)
    write_task(folder, "no_data", "data/lost.jsonl", kind="mc")
    write_task(folder, "no_documents", "data/none.jsonl", kind="mc")
    write_task(folder, "no_split", kind="mc", test_split="validation")
    write_task(folder, "remote", kind="mc", dataset_path="nobody/nothing", dataset_kwargs={})
    nothing_left = write_task(folder, "nothing_left", kind="mc")
    nothing_left.write_text(nothing_left.read_text() + "process_docs: !function utils.nothing\n")
    (folder / "utils.py").write_text(NOTHING)
    write_task(folder, "long_choice", kind="mc", doc_to_choice="{{['a', text*40]}}", doc_to_target="{{label % 2}}")
    write_task(folder, "long_prompt", kind="mc", doc_to_text="{{text*9}}")
    write_task(folder, "long_answer", kind="gen", generation_kwargs={"until": ["x"], "max_gen_toks": 512})
    write_task(folder, "many_examples", kind="mc", num_fewshot=60, fewshot_split="test")
    return folder


@pytest.fixture
def search(tiny_family: dict[str, Path], tasks: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a search of some tasks."""

    def write(*names: Any, **changes: Any) -> Path:
        listed = [name if isinstance(name, dict) else {"task": name} for name in names]
        path = tmp_path / "search.yaml"
        content = search_spec(
            tiny_family,
            **{
                "evaluation__include_path": str(tasks),
                "evaluation__tasks": listed,
                "evaluation__guard": [],
                "run__dir": str(tmp_path / "run"),
                **changes,
            },
        )
        path.write_text(yaml.safe_dump(content))
        return path

    return write


REFUSED = {
    "no_data": "task 'no_data': no data file data/lost.jsonl; looked for ",
    "no_documents": "task 'no_documents' cannot be loaded: a split of its data ",
    "no_split": "have no split 'validation'",
    "remote": "its dataset 'nobody/nothing' is neither here nor in reach",
    "nothing_left": "task 'nothing_left' cannot be loaded: a split of its data ",
    "long_choice": "tokens to score does not fit the context of 512",
    "long_answer": "generates up to 512 tokens, which leaves no room for a prompt in the model's context of 512",
    "many_examples": "it wants 60 examples before a question, more than the split that they come from has",
    "mmc": "unknown task 'mmc' (did you mean 'mc'?)",
}


@pytest.mark.parametrize("task", REFUSED)
@pytest.mark.parametrize("command", ["check", "run", "eval"])
def test_a_task_that_cannot_be_scored(
    search: Callable[..., Path],
    tasks: Path,
    tiny_family: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    task: str,
    command: str,
) -> None:
    path = search(task)
    evaluation = [tiny_family["a"], "--tasks", task, "--include-path", tasks]
    ended = invoke(capsys, command, *(evaluation if command == "eval" else [path]))
    assert (ended.code, ended.out) == (2, "")
    assert REFUSED[task] in ended.err
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not list((path.parent / "run" / "scores").glob("*"))  # nothing was scored


def test_everything_is_told_at_once(search: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    wrong = search(
        {"task": "mc", "metric": "acc_nrm"},
        {"task": "gen", "metric": "exact_match,lwo"},
        "rollin",
        evaluation__guard=["no_documents", "lgn"],
        space__genes={"wieght": {"low": 0.1}},
    )
    ended = invoke(capsys, "check", wrong)
    assert ended.code == 2
    for text in (
        "task 'mc' has no metric 'acc_nrm' (did you mean 'acc_norm'?); it has acc, acc_norm",
        "task 'gen' has no metric 'exact_match,lwo': no filter 'lwo' (did you mean 'low'?); it has 'plain', 'low'",
        "unknown task 'rollin' (did you mean 'rolling'?)",
        "task 'no_documents' cannot be loaded",
        "unknown task 'lgn'",
        "wieght",
    ):
        assert text in ended.err
    assert ended.err.count("error: ") == 6


def test_every_task_with_an_item_that_cannot_be_scored_is_told(
    search: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = invoke(capsys, "check", search("mc", "long_choice", evaluation__guard=["long_answer"]))
    assert ended.code == 2
    assert ended.err.count("error: ") == 2


def test_fewer_items_than_asked_for(search: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = search("mc", evaluation__splits={"search": 20, "select": 3, "test": 2})
    for command in ("check", "run"):
        ended = invoke(capsys, command, path)
        assert ended.code == 2
        assert "task 'mc' has 24 items, fewer than the splits ask for (search 20, select 3, test 2)" in ended.err


def test_prompts_that_lose_their_beginning_are_counted(
    search: Callable[..., Path], tasks: Path, tiny_family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # A token a byte: nine texts, a space and the choice; 512 tokens and the one after them, which is not read, fit.
    expected = sum(len(doc["text"]) * 9 + 1 + max(map(len, doc["choices"])) > 513 for doc in documents())
    assert 0 < expected < 24
    ended = invoke(capsys, "eval", tiny_family["a"], "--tasks", "long_prompt", "--include-path", tasks, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["tasks"]["long_prompt"]["acc"]["n"] == 24
    (line,) = ended.err.splitlines()
    assert line.startswith(f"warning: task 'long_prompt': {expected} of 24 items are longer than the context of 512")
    assert line.endswith("their prompts lose their beginning, as in lm-eval")
    checked = invoke(capsys, "check", search("long_prompt"))
    assert checked.code == 0
    assert checked.out.startswith("warning: task 'long_prompt': ")


def changed_copy(source: Path, folder: Path, *tokens: str) -> Path:
    """A copy of a checkpoint whose tokenizer lacks some special tokens."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for token in tokens:
        config.pop(token)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("missing", "task", "message"),
    [
        (["bos_token"], "mc", ""),
        (["eos_token"], "mc", ""),
        (["eos_token"], "gen", "the tokenizer has no EOS token, which generated text ends with"),
        (["bos_token", "eos_token"], "rolling", "the tokenizer has neither a BOS nor an EOS token"),
    ],
)
def test_a_tokenizer_without_special_tokens(
    tiny_family: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    missing: list[str],
    task: str,
    message: str,
) -> None:
    folder = changed_copy(tiny_family["a"], tmp_path / "model", *missing)
    ended = invoke(capsys, "eval", folder, "--tasks", task, "--include-path", tasks, "--limit", "2")
    assert ended.code == (2 if message else 0)
    assert message in ended.err


def test_a_chat_without_a_template(
    search: Callable[..., Path], tasks: Path, tiny_family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = search("mc", evaluation__apply_chat_template=True)
    evaluation = [tiny_family["a"], "--tasks", "mc", "--include-path", tasks, "--apply-chat-template"]
    for arguments in (["check", path], ["run", path], ["eval", *evaluation]):
        ended = invoke(capsys, *arguments)
        assert (ended.code, ended.out) == (2, "")
        assert "apply_chat_template is on, but the tokenizer has no chat template" in ended.err


@pytest.mark.parametrize("backend", ["native", "hf"])
@pytest.mark.parametrize("task", ["mc", "gen", "rolling"])
def test_numbers_that_are_not_finite(
    tiny_family: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    task: str,
) -> None:
    """The weights are finite, what they compute is not."""
    folder = Path(shutil.copytree(tiny_family["a"], tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    weights["model.embed_tokens.weight"] *= 1e20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = ["eval", folder, "--tasks", task, "--include-path", tasks, "--limit", "2", "--backend", backend]
    ended = invoke(capsys, *arguments)
    assert (ended.code, ended.out) == (1, "")
    assert "not finite, so it has no score" in ended.err


def test_what_vllm_cannot_be_given(search: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"dtype": "half", "tensor_parallel_size": 2, "quantization": "fp8"}
    given = search("mc", evaluation__backend="vllm", evaluation__device="mps", evaluation__vllm=arguments)
    ended = invoke(capsys, "check", given)
    assert ended.code == 2
    assert "evaluation.device: backend vllm runs on cpu or cuda, got 'mps'" in ended.err
    assert "evaluation.vllm.dtype: is evaluation.dtype" in ended.err
    assert "evaluation.vllm.tensor_parallel_size: is 1: candidates are handed over within one process" in ended.err
    assert "quantization" not in ended.err
    ended = invoke(capsys, "check", search("mc", evaluation__vllm={"quantization": "fp8"}))
    assert ended.code == 2
    assert "evaluation.vllm: only with `backend: vllm`" in ended.err


def test_a_group_is_scored_as_a_whole(
    tasks: Path, tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tasks.parent, tmp_path / "copy")) / "tasks"
    whole = {"group": "both", "task": ["mc", "rolling"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(whole))
    arguments = ["eval", tiny_family["a"], "--tasks", "both", "--include-path", folder, "--limit", "5"]
    found = json.loads(invoke(capsys, *arguments, "--json").out)
    assert set(found["tasks"]) == {"mc", "rolling"}
    assert found["groups"] == {"both": {"acc": found["tasks"]["mc"]["acc"]}}
    assert "| group both | acc" in invoke(capsys, *arguments).out
