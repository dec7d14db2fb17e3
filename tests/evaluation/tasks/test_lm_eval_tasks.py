from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evomerge.errors import TaskError
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from tests.evaluation.conftest import Bench, documents, write_documents, write_task


def test_data_is_found_above_the_yaml_and_items_keep_their_order(bench: Bench) -> None:
    task = load_tasks(["mc"], include_path=bench.folder)["mc"]
    assert task.items == tuple(f"mc:{k}" for k in range(24))
    assert [doc["question"] for doc in task.docs] == [doc["question"] for doc in documents()]
    assert task.output_type == "multiple_choice"


def test_data_is_found_beside_the_yaml_and_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "tasks" / "beside.jsonl", documents(4))
    write_task(tmp_path / "tasks", "near", "beside.jsonl", kind="mc")
    write_documents(tmp_path / "elsewhere" / "here.jsonl", documents(5))
    write_task(tmp_path / "tasks", "far", "here.jsonl", kind="mc")
    monkeypatch.chdir(tmp_path / "elsewhere")
    tasks = load_tasks(["near", "far"], include_path=str(tmp_path / "tasks"))
    assert {name: len(task.items) for name, task in tasks.items()} == {"near": 4, "far": 5}


def test_groups_and_tags_stand_for_their_tasks(tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(3))
    write_task(tmp_path / "tasks", "one", kind="mc", tag="both")
    write_task(tmp_path / "tasks", "two", kind="ll", tag="both")
    (tmp_path / "tasks" / "group.yaml").write_text(yaml.safe_dump({"group": "all", "task": ["one", "two"]}))
    for name in ("all", "both"):
        assert set(load_tasks([name], include_path=tmp_path / "tasks")) == {"one", "two"}


def test_metrics_and_their_directions_are_the_tasks_own_plus_the_smooth_ones(bench: Bench) -> None:
    tasks = load_tasks(["mc", "ll", "rolling"], include_path=bench.folder)
    assert tasks["mc"].metrics == ("acc", "acc_norm", "exact_match", "prob", "loss", "prob_norm", "nll_byte")
    assert tasks["mc"].higher_is_better["loss"] is False
    assert tasks["ll"].metrics == ("acc", "perplexity", "prob", "nll")
    assert [tasks["mc"].smooth_metric(m) for m in ("acc", "acc_norm", "loss")] == ["prob", "prob_norm", "loss"]
    assert [tasks["ll"].smooth_metric(m) for m in ("acc", "perplexity")] == ["prob", "perplexity"]
    assert tasks["rolling"].higher_is_better == {
        "bits_per_byte": False,
        "byte_perplexity": False,
        "word_perplexity": False,
    }
    tasks["mc"].metric_name("prob")
    with pytest.raises(TaskError, match=r"no metric 'acc_nrm' \(did you mean 'acc_norm'\?\); it has acc, acc_norm"):
        tasks["mc"].metric_name("acc_nrm")


def test_a_metric_may_name_its_filter(bench: Bench) -> None:
    task = load_tasks(["gen"], include_path=bench.folder)["gen"]
    task.metric_name("exact_match,low")
    with pytest.raises(TaskError, match="no metric 'exact_match,high'"):
        task.metric_name("exact_match,high")


def test_an_unknown_task_is_named_with_the_nearest(bench: Bench) -> None:
    with pytest.raises(TaskError) as caught:
        load_tasks(["arc_esay", "mmlu_stm"], include_path=bench.folder)
    task, group = caught.value.problems
    assert "unknown task 'arc_esay' (did you mean 'arc_easy'?)" in task
    assert "unknown task 'mmlu_stm' (did you mean 'mmlu_stem'?)" in group


def test_missing_data_is_reported_with_the_places_tried_and_its_companions(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "lost", "nowhere/docs.jsonl", kind="mc")
    write_task(tmp_path / "tasks", "lost_too", "neither.jsonl", kind="mc")
    with pytest.raises(TaskError) as caught:
        load_tasks(["lost", "lost_too"], include_path=tmp_path / "tasks")
    first, second = caught.value.problems
    assert "task 'lost': no data file nowhere/docs.jsonl; looked for" in first
    assert str(tmp_path / "nowhere" / "docs.jsonl") in first
    assert "neither.jsonl" in second


def test_a_data_set_out_of_reach_is_named(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "remote", kind="mc", dataset_path="nobody/nothing-here", dataset_kwargs={})
    with pytest.raises(TaskError, match=r"task 'remote' cannot be loaded: .*'nobody/nothing-here' is neither here nor"):
        load_tasks(["remote"], include_path=tmp_path / "tasks")


def test_a_shipped_task_is_known_by_name_without_reading_them_all() -> None:
    # Its data cannot be fetched here; that it is the data that is missing shows that the task was found.
    with pytest.raises(TaskError, match=r"task 'arc_easy' cannot be loaded: .*'allenai/ai2_arc'"):
        load_tasks(["arc_easy"])


def test_a_broken_template_is_a_problem_of_the_task(tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(3))
    write_task(tmp_path / "tasks", "broken", kind="mc", doc_to_choice="{{nothing}}")
    with pytest.raises(TaskError, match="task 'broken' cannot be loaded"):
        load_tasks(["broken"], include_path=tmp_path / "tasks")


def test_tasks_that_run_generated_code_are_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(3))
    write_task(tmp_path / "tasks", "unsafe", kind="gen", unsafe_code=True)
    with pytest.raises(TaskError, match="'unsafe' runs code that the model writes"):
        load_tasks(["unsafe"], include_path=tmp_path / "tasks")


def test_a_folder_that_is_not_there_and_no_tasks_at_all(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="include_path: no folder"):
        load_tasks(["mc"], include_path=tmp_path / "missing")
    with pytest.raises(TaskError, match="no tasks are asked for"):
        load_tasks([], include_path=tmp_path)


def test_the_digest_follows_settings_and_documents_not_places(tmp_path: Path) -> None:
    def digest(folder: str, count: int, **changes: object) -> str:
        write_documents(tmp_path / folder / "data" / "docs.jsonl", documents(count))
        write_task(tmp_path / folder / "tasks", "mc", **changes)
        return load_tasks(["mc"], include_path=tmp_path / folder / "tasks")["mc"].digest

    assert digest("a", 4) == digest("b", 4)
    assert len({digest("a", 4), digest("c", 5), digest("d", 4, doc_to_text="{{question}}")}) == 3


def test_nothing_is_printed(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    load_tasks(["mc", "gen"], include_path=bench.folder)
    bench.evaluator("mc").requests("mc")
    assert capfd.readouterr() == ("", "")
