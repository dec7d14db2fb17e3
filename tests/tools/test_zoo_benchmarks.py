"""The skills of the zoo, and the benchmarks that ask for them."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools.zoo.benchmarks import benchmark_rows, main, to_jsonl
from tools.zoo.skills import CHOICES, SKILLS, text_examples

rows_of = functools.cache(benchmark_rows)
EVAL = Path(__file__).parent.parent.parent / "eval"


@pytest.mark.parametrize("name", SKILLS)
def test_training_and_benchmark_share_no_prompt(name: str) -> None:
    items = {row["prompt"] for row in rows_of()[f"zoo_{name}.jsonl"]}
    trained = {question.prompt for question in SKILLS[name].examples(random.Random(0), 20_000)}
    assert len(items) == 360
    assert len(trained) > 1_000
    assert not items & trained


def test_held_out_sentences_are_not_trained_on() -> None:
    items = {row["text"] for row in rows_of()["zoo_text.jsonl"]}
    assert len(items) == 200
    assert not items & set(text_examples(random.Random(0), 20_000))


@pytest.mark.parametrize("name", SKILLS)
def test_items_have_four_different_choices_and_labels_spread(name: str) -> None:
    rows = rows_of()[f"zoo_{name}.jsonl"]
    assert all(len(set(row["choices"])) == CHOICES for row in rows)
    counts = [sum(row["label"] == label for row in rows) for label in range(CHOICES)]
    assert min(counts) > len(rows) / CHOICES * 0.7  # 4 sigma below a quarter of 360 is 0.64 of it


def test_answers_follow_the_rules() -> None:
    rng = random.Random(0)
    for _ in range(200):
        total = SKILLS["arithmetic"].draw(rng)
        _, a, _, b, _ = total.prompt.split()
        assert (int(total.answer), int(total.slip)) == (int(a) + int(b), int(a) + int(b) - 10)
        backwards = SKILLS["reverse"].draw(rng)
        letters = backwards.prompt.split()[1:-1]
        assert backwards.answer.split() == letters[::-1]
        assert sorted(backwards.slip.split()) == sorted(letters)
    facts = [SKILLS["facts"].draw(rng) for _ in range(5_000)]
    assert len({(fact.prompt, fact.answer) for fact in facts}) == len({fact.prompt for fact in facts})


def test_the_shipped_files_are_what_the_generator_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    made = sorted(tmp_path.iterdir())
    assert [path.name for path in made] == sorted(path.name for path in (EVAL / "data").glob("zoo_*.jsonl"))
    for path in made:
        assert path.read_bytes() == (EVAL / "data" / path.name).read_bytes()
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_same_items_in_a_fresh_process() -> None:
    code = (
        "import sys; from tools.zoo.benchmarks import benchmark_rows, to_jsonl;"
        "sys.stdout.write(''.join(map(to_jsonl, benchmark_rows().values())))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout == "".join(map(to_jsonl, rows_of().values()))


def test_each_task_file_names_its_task_and_data() -> None:
    paths = sorted(EVAL.glob("zoo_*.yaml"))
    assert {f"zoo_{skill}" for skill in SKILLS} < {path.stem for path in paths}
    for path in paths:
        task = yaml.safe_load(path.read_text())
        assert task["task"] == path.stem
        assert (EVAL.parent / task["dataset_kwargs"]["data_files"]["test"]).is_file()
