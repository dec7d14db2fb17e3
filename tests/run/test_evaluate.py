"""A checkpoint scored by itself: any backend, prompts as asked for, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from evomerge.errors import BadInput, CandidateError, OutputError
from evomerge.run.evaluate import evaluate
from tests.evaluation.conftest import documents, write_documents, write_task
from tests.frame import TASKS
from tests.models import byte_tokenizer


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_evaluate(tiny_family: dict[str, Path], backend: Any) -> None:
    tasks = ["tiny_choice", "tiny_text", "tiny_answer"]
    model = str(tiny_family["a"])
    result = evaluate(model, tasks, include_path=[str(TASKS)], limit=6, backend=backend)
    assert result.model == model
    assert list(result.tasks) == tasks
    assert result.tasks["tiny_choice"]["acc"].n == 6
    assert result.tasks["tiny_answer"]["exact_match"].n == 4
    assert list(result.to_json()) == ["model", "tasks"]
    # A random model spreads its guesses over some 259 tokens of a byte each: about eight bits.
    assert 7.5 < result.tasks["tiny_text"]["bits_per_byte"].value < 8.5


def test_backends_agree(tiny_family: dict[str, Path]) -> None:
    tasks = ["tiny_choice", "tiny_text"]
    native, hf = (
        evaluate(str(tiny_family["b"]), tasks, include_path=[str(TASKS)], backend=backend).tasks
        for backend in ("native", "hf")
    )
    for task in tasks:
        for metric in native[task]:
            assert native[task][metric].value == pytest.approx(hf[task][metric].value, abs=1e-5)


def test_evaluate_refuses(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    model, paths = str(tiny_family["a"]), [str(TASKS)]
    with pytest.raises(BadInput, match="dtype"):
        evaluate(model, ["tiny_text"], include_path=paths, dtype="int7")
    with pytest.raises(BadInput, match="none"):
        evaluate(str(tmp_path / "none"), ["tiny_text"], include_path=paths)
    broken = Path(shutil.copytree(tiny_family["a"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CandidateError, match="finite"):
        evaluate(str(broken), ["tiny_text"], include_path=paths)


def test_prompts_are_put_together_as_asked_for(tiny_family: dict[str, Path]) -> None:
    def loss(**options: Any) -> float:
        result = evaluate(str(tiny_family["a"]), ["tiny_choice"], include_path=TASKS, limit=4, **options)
        return result.tasks["tiny_choice"]["loss"].value

    assert loss() == loss(fewshot_as_multiturn=False)  # no chat, no examples
    assert loss() != loss(system_instruction="Answer in one word.")


def test_what_lm_eval_takes(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """Parts of a task, patterns, files, generation settings, and lm-eval's own files of results and samples."""
    model, out = str(tiny_family["a"]), tmp_path / "out"
    tasks = [str(TASKS / "tiny_choice.yaml"), "tiny_ans*"]
    result = evaluate(
        model,
        tasks,
        include_path=TASKS,
        limit=0.3,
        gen_kwargs="max_gen_toks=3,until=['q']",
        max_length=64,
        output_path=out,
        log_samples=True,
    )
    (file,) = out.rglob("results_*.json")
    written = json.loads(file.read_text())
    assert set(written["results"]) == set(result.tasks) == {"tiny_choice", "tiny_answer"}
    acc = result.tasks["tiny_choice"]["acc"]
    assert written["results"]["tiny_choice"]["acc,none"] == acc.value
    assert written["results"]["tiny_choice"]["acc_stderr,none"] == pytest.approx(acc.stderr)
    assert written["n-samples"]["tiny_choice"]["effective"] == acc.n < written["n-samples"]["tiny_choice"]["original"]
    (file,) = out.rglob("samples_tiny_answer_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == list(range(len(samples)))
    assert samples[0]["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 3
    assert samples[0]["filtered_resps"] == samples[0]["resps"][0]


def test_files_need_a_place_and_settings_a_value(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    model, blocked = str(tiny_family["a"]), tmp_path / "file"
    blocked.write_text("")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"log_samples": True}, BadInput, "--output_path"),
        ({"gen_kwargs": "max_gen_toks"}, BadInput, "--gen_kwargs: expected `key=value`"),
        ({"limit": 0}, BadInput, "limit: a number of items"),
        ({"chat_template": tmp_path / "none"}, BadInput, "chat_template: .* cannot be read"),
        ({"output_path": blocked / "inside"}, OutputError, "cannot be written"),
    ]
    for options, kind, message in wrong:
        with pytest.raises(kind, match=message):
            evaluate(model, ["tiny_choice"], include_path=TASKS, **{"limit": 2, **options})


def test_what_is_odd_about_task_files_is_told(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """By task and document; what is beside it in a group or a folder is scored."""
    rows = documents(6)
    holes: dict[str, list[dict[str, Any]]] = {"whole": rows}
    for name, key in (("gap", "question"), ("unlabelled", "label")):
        holes[name] = [row | {key: None} if k == 4 else row for k, row in enumerate(rows)]
    folder, misspelt, mean = tmp_path / "own", {"metric": "acc_nrm"}, {"aggregation": "mean", "higher_is_better": True}
    for name, docs in holes.items():
        write_documents(tmp_path / f"{name}.jsonl", docs)
        write_task(folder, name, f"{name}.jsonl", kind="mc", metric_list=[{"metric": "acc"}])
    write_task(folder, "typo", "whole.jsonl", kind="mc", metric_list=[{"metric": "acc"}, misspelt | mean])
    write_task(folder, "unheard_of", "whole.jsonl", kind="mc", metric_list=[{"metric": "acc"}, misspelt])
    task_list = ["whole", "unlabelled", "gap", "typo", "unheard_of"]
    group = {"group": "all_of_it", "task": task_list, "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "all_of_it.yaml").write_text(json.dumps(group))
    (tmp_path / "stray.yaml").write_text(json.dumps({"group": "stray", "task": ["whole", "nowhere"]}))
    heard: list[str] = []
    result = evaluate(str(tiny_family["a"]), ["all_of_it"], include_path=folder, warn=heard.append)
    assert set(result.tasks) == {"whole", "gap", "typo"}
    assert not result.groups  # it lacks a task
    assert sorted(heard) == [
        "left out: task 'unheard_of' cannot be loaded: lm-eval has no metric 'acc_nrm' (did you mean 'acc_norm'?), and"
        " there is none of that name in the evaluate library within reach",
        "left out: task 'unlabelled', document 4: it has no label (doc_to_target)",
        "task 'gap', document 4: it has no 'question', so its doc_to_text says None there, as in lm-eval (1 of 6"
        " documents)",
        "task 'typo': lm-eval computes no 'acc_nrm' for multiple_choice (did you mean 'acc_norm'?)",
    ]
    assert set(result.tasks["typo"]) >= {"acc", "prob"}
    for asked, reason in (
        (["whole", "unlabelled"], r"'unlabelled', document 4: it has no label"),
        ([str(tmp_path / "stray.yaml")], r"task 'nowhere': neither shipped nor in include_path"),
    ):
        with pytest.raises(BadInput, match=reason):
            evaluate(str(tiny_family["a"]), asked, include_path=folder if len(asked) > 1 else None)


def test_a_folder_is_its_task_files_but_for_names(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "docs.jsonl", documents(4))
    for name in ("one", "other"):
        write_task(tmp_path / "own", name, "docs.jsonl", kind="mc")
    (tmp_path / "one").mkdir()  # a folder of that name is no reason to look into it
    monkeypatch.chdir(tmp_path)
    assert set(evaluate(str(tiny_family["a"]), ["own"], limit=2).tasks) == {"one", "other"}
    assert set(evaluate(str(tiny_family["a"]), ["one"], include_path="own", limit=2).tasks) == {"one"}


def test_an_encoder_decoder_is_refused_with_the_way_on(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=259, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "both_ways")
    byte_tokenizer().save_pretrained(tmp_path / "both_ways")
    with pytest.raises(BadInput, match=r"both_ways: an encoder-decoder .*--backend hf"):
        evaluate(str(tmp_path / "both_ways"), ["tiny_choice"], include_path=TASKS)
    scores = evaluate(str(tmp_path / "both_ways"), ["tiny_choice"], include_path=TASKS, limit=3, backend="hf").tasks
    assert scores["tiny_choice"]["acc"].n == 3


def test_generation_config_is_the_models_own(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """With a penalty that no repeated token survives, something else is written."""

    def written(name: str, **settings: Any) -> list[str]:
        folder = Path(shutil.copytree(tiny_family["a"], tmp_path / name))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
        evaluate(
            str(folder), ["tiny_answer"], include_path=TASKS, output_path=tmp_path / f"{name}_out", log_samples=True
        )
        (file,) = (tmp_path / f"{name}_out").rglob("samples_*.jsonl")
        return [json.loads(line)["resps"][0][0] for line in file.read_text().splitlines()]

    plain, penalised = written("plain"), written("penalised", repetition_penalty=5.0)
    assert plain != penalised
    assert all(len(set(text)) >= len(text) - 1 for text in penalised)


def test_metrics_of_the_corpus_have_bootstrapped_errors(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(6))
    write_task(tmp_path / "tasks", "pairs")
    options: dict[str, Any] = {"include_path": tmp_path / "tasks", "output_path": tmp_path / "out.json"}
    score = evaluate(str(tiny_family["a"]), ["pairs"], **options).tasks["pairs"]["f1"]
    assert score.stderr is not None
    assert 0 < score.stderr < 0.4
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())
    assert results["results"]["pairs"]["f1_stderr,none"] == score.stderr  # lm-eval's own, of as many samples
    assert results["config"]["bootstrap_iters"] == 200
    none = evaluate(str(tiny_family["a"]), ["pairs"], **options, bootstrap_iters=0).tasks["pairs"]["f1"]
    assert (none.value, none.stderr) == (score.value, None)


def test_a_package_that_is_not_there_is_named_with_lm_evals_extra(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(2))
    for name, module in (("known", "langdetect"), ("unknown", "no_such_module")):
        path = write_task(tmp_path / "tasks", name, kind="mc", doc_to_text=f"!function of_{name}.text")
        path.write_text(path.read_text().replace(f"'!function of_{name}.text'", f"!function of_{name}.text"))
        raising = f"raise ModuleNotFoundError('No module', name={module!r})\n"
        (tmp_path / "tasks" / f"of_{name}.py").write_text(raising)
    for name, package in (("known", r'"lm-eval\[ifeval\]"'), ("unknown", "no_such_module")):
        with pytest.raises(BadInput, match=f"task '{name}' cannot be loaded.*pip install {package}"):
            evaluate(str(tiny_family["a"]), [name], include_path=tmp_path / "tasks")


def test_warnings_go_where_they_are_asked_to_go(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(2))
    write_task(tmp_path / "tasks", "long", kind="mc", doc_to_text="{{text*40}}")
    warnings: list[str] = []
    evaluate(str(tiny_family["a"]), ["long"], include_path=tmp_path / "tasks", warn=warnings.append)
    assert len(warnings) == 1
    with pytest.warns(UserWarning, match="task 'long': 2 of 2 items are longer than the context of 512 tokens"):
        evaluate(str(tiny_family["a"]), ["long"], include_path=tmp_path / "tasks")
