"""What of a task file runs: Python is named, Jinja reaches nothing but its document, chat templates have a limit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.evaluation.tasks.strangers import require_bounded

ROWS = [{"q": f"the cat {k} sat on the", "c": ["mat", "dog"], "a": k % 2} for k in range(6)]


def task_file(folder: Path, rows: list[dict[str, Any]] = ROWS, **more: Any) -> Path:
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "task": "t",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "t.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ q }}",
        "doc_to_choice": "c",
        "doc_to_target": "a",
    }
    text = json.dumps(values | more, indent=1).replace('"!function strangers.text"', "!function strangers.text")
    (folder / "t.yaml").write_text(text)
    return folder


REACHES = [
    "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ (q ~ '')['__cl' ~ 'ass__'] }}",
    "{{ '{0.__class__}'.format(q) }}{{ q.__class__ }}",
    "{{ q | attr('__class__') }}",
]


@pytest.mark.parametrize("template", REACHES)
def test_jinja_that_reaches_further_is_refused(tmp_path: Path, template: str) -> None:
    folder = task_file(tmp_path, doc_to_text=template.replace("FILE", str(tmp_path / "reached")) + "{{ q }}")
    with pytest.raises(TaskError, match=r"task 't' cannot be loaded: .*(unsafe|undefined|no attribute|not safe)"):
        load_tasks(["t"], include_path=folder)
    assert not (tmp_path / "reached").exists()


def test_ordinary_jinja_works(tmp_path: Path) -> None:
    template = "{% for x in c %}{{ loop.index }}: {{ x | trim }} {% endfor %}{{ q | regex_replace('cat', 'dog') }}"
    task = load_tasks(["t"], include_path=task_file(tmp_path, doc_to_text=template))["t"]
    assert task.lm_eval_task.doc_to_text(task.docs[0]).endswith("the dog 0 sat on the")
    assert task.python_files == ()


@pytest.mark.parametrize("key", ["doc_to_text", "process_docs"])
def test_python_of_a_task_is_named(tmp_path: Path, key: str) -> None:
    body = "return doc['q']" if key == "doc_to_text" else "return doc"
    (tmp_path / "strangers.py").write_text(f"def text(doc):\n    {body}\n")
    task = load_tasks(["t"], include_path=task_file(tmp_path, **{key: "!function strangers.text"}))["t"]
    assert task.python_files == (tmp_path / "strangers.py",)


def test_a_pipe_among_task_files_is_refused(tmp_path: Path) -> None:
    os.mkfifo(task_file(tmp_path) / "pipe.yaml")
    with pytest.raises(TaskError, match=r"pipe\.yaml is not an ordinary file"):
        load_tasks(["t"], include_path=tmp_path)


@pytest.mark.parametrize(("label", "choices"), [(777, None), (-1, None), ("cow", None), ([0, 5], None)])
def test_labels_out_of_range_are_told_by_document(tmp_path: Path, label: Any, choices: Any) -> None:
    rows = [{**row, "a": label} if k == 4 else row for k, row in enumerate(ROWS)]
    if isinstance(label, list):
        rows = [{**row, "a": row["a"] if isinstance(row["a"], list) else [row["a"]]} for row in rows]
    if isinstance(label, str):
        rows = [{**row, "a": row["a"] if isinstance(row["a"], str) else row["c"][row["a"]]} for row in rows]
    task = load_tasks(["t"], include_path=task_file(tmp_path, rows))["t"]
    (note,) = task.label_notes(range(6))
    assert note.startswith(f"task 't', document 4: its label {label!r} (doc_to_target) is none of its choices")
    assert task.label_notes([0, 1]) == []
    with pytest.raises(TaskError, match=r"document 4: its label .* every document"):
        task.label_notes([4])


def test_every_label_out_of_range_or_no_choices(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"the label \(doc_to_target\) of its first document is none of its choices"):
        load_tasks(["t"], include_path=task_file(tmp_path, [{**row, "a": 777} for row in ROWS]))
    with pytest.raises(TaskError, match=r"choice"):
        load_tasks(["t"], include_path=task_file(tmp_path, [{**row, "c": [""], "a": 0} for row in ROWS]))
    rows = [{**row, "c": []} if k == 4 else row for k, row in enumerate(ROWS)]
    task = load_tasks(["t"], include_path=task_file(tmp_path, rows))["t"]
    with pytest.raises(TaskError, match=r"document 4: it has no choices \(doc_to_choice\)"):
        task.label_notes(range(6))


def test_a_chat_template_has_a_limit() -> None:
    require_bounded("{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    require_bounded("{{ raise_exception('no system role') }}")
    for harm in ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "{{ ('a' * 10 ** 10) | length }}"):
        with pytest.raises(TaskError, match="chat template does not render"):
            require_bounded(harm)


@pytest.mark.parametrize(
    "text", ["null\n", "[1, [2], {}]\n", "3\n", '{"q": 1}\nnull\n', '{"q": 1}\n{"q"\n', "[" * 5000, "words\n"]
)
def test_data_that_is_no_table_is_told_by_its_line(tmp_path: Path, text: str) -> None:
    """Some of these crash the process in the package that reads them."""
    (task_file(tmp_path) / "t.jsonl").write_text(text)
    with pytest.raises(TaskError, match=r"t\.jsonl(, line \d)?: is no JSON object"):
        load_tasks(["t"], include_path=tmp_path)


def test_a_pipe_is_no_data(tmp_path: Path) -> None:
    (task_file(tmp_path) / "t.jsonl").unlink()
    os.mkfifo(tmp_path / "t.jsonl")
    with pytest.raises(TaskError, match=r"t\.jsonl is not an ordinary file"):
        load_tasks(["t"], include_path=tmp_path)
