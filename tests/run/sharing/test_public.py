"""What a run's texts say to others: names in the place of paths, no host of an office, no secret, still a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.run.folder import RunFolder
from evomerge.run.sharing.public import PublicTexts
from evomerge.spec.schema import SearchSpec


def texts(root: Path, **evaluation: Any) -> PublicTexts:
    """Of a run over models at several places of one name."""
    spec = SearchSpec.model_validate(
        {
            "name": "secret-free",
            "models": {
                "base": "/data/team/base model",
                "sources": {
                    "math": "/data/math/final",
                    "code": "/data/code/final",
                    "chat": "org/chat@main",
                    "tuned": "org/chat+/data/adapters/final",
                },
            },
            "evaluation": {
                "tasks": [
                    {"task": "mine", "python": "/data/team/metric.py:score", "data": "/data/team/items.jsonl"},
                    {"task": "marks", "data": "/data/other/items.jsonl", "judge": judge("http://gpu7:8000/v1")},
                    {"task": "paid", "data": "/data/team/items.jsonl", "judge": judge("https://api.judge.com/v1")},
                ],
                **evaluation,
            },
            "run": {"dir": "/data/runs/x", "storage": "postgresql://me:hunter2hunter2@db.corp/runs"},
        }
    )
    return PublicTexts(RunFolder(root, spec))


def judge(endpoint: str) -> dict[str, Any]:
    return {"endpoint": endpoint, "model": "judge"}


def test_the_search_as_others_read_it(tmp_path: Path) -> None:
    text = texts(tmp_path).search_yaml(7)
    assert text.startswith("# The search that made this model, its candidate 7: evomerge run search.yaml\n# ./NAME is ")
    spec = SearchSpec.model_validate(yaml.safe_load(text))
    assert spec.models.base == "./base"
    assert spec.models.sources == {
        **{"math": "./math", "code": "./code", "chat": "org/chat@main"},
        "tuned": "org/chat+./final",
    }
    assert [task.python for task in spec.evaluation.tasks] == ["./metric.py:score", None, None]
    assert [task.data for task in spec.evaluation.tasks] == ["./items.jsonl", "./items-2.jsonl", "./items.jsonl"]
    endpoints = [task.judge.endpoint for task in spec.evaluation.tasks if task.judge is not None]
    assert endpoints == ["http://localhost:8000/v1", "https://api.judge.com/v1"]
    assert not [word for word in ("/data", "gpu7", "hunter2", "db.corp", "storage") if word in text]


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("model: /data/math/final", "model: ./math"),
        ("/data/math/final/config.json", "./math/config.json"),
        ("/data/math/final-2 is another", "/data/math/final-2 is another"),
        ('"/data/team/base model"', '"./base"'),
        ("org/chat+/data/adapters/final.", "org/chat+./final."),
        ("asked http://gpu7:8000/v1/chat", "asked http://localhost:8000/v1/chat"),
        ("in ~", "in ~"),
    ],
)
def test_texts(tmp_path: Path, text: str, public: str) -> None:
    assert texts(tmp_path).text(text) == public


def test_the_home_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    written = texts(tmp_path).text(f"{tmp_path}/log.txt /home/someone/x /home/someones correct-horse")
    assert written == "runs/secret-free/log.txt ~/x /home/someones ***"


def test_messages_lose_their_paths(tmp_path: Path) -> None:
    message = texts(tmp_path).message("cannot read /mnt/disk/a/b.safetensors: 1/2 of it, see https://x.org/a/b")
    assert message == "cannot read b.safetensors: 1/2 of it, see https://x.org/a/b"
    assert texts(tmp_path).message(None) is None


def test_shipped_files_keep_their_names(tmp_path: Path) -> None:
    from evomerge.spec.load import shipped_folder

    public = texts(tmp_path, include_path=[str(shipped_folder() / "eval")])
    assert "include_path:\n  - eval\n" in public.search_yaml(0)
