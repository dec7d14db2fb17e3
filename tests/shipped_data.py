"""Synthetic rows with the columns that shipped lm-eval tasks read, in folders that stand for the Hub's data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

from evomerge.evaluation.tasks.shipped import shipped_folder, shipped_index

Row = dict[str, Any]
_NOUNS = ("cat", "dog", "river", "stone", "teacher", "window", "garden", "train")
_VERBS = ("sat on", "ran to", "looked at", "walked by", "forgot", "painted")


def text(k: int, part: int = 0) -> str:
    """A sentence, another one for every row and part."""
    n = 7 * k + 3 * part
    return f"The {_NOUNS[n % 8]} {_VERBS[n % 6]} the {_NOUNS[(n // 6 + part) % 8]} {n} times."


def words(k: int, count: int) -> list[str]:
    """Distinct short answers."""
    return [f"{_NOUNS[(k + 3 * j) % 8]} {j}" for j in range(count)]


def letter(k: int, count: int = 4) -> str:
    """A letter of so many choices."""
    return "ABCDE"[k % count]


def _choices(k: int) -> Row:
    return {"text": words(k, 4), "label": list("ABCD")}


def _multiple(k: int) -> Row:
    return {"question": text(k), "choices": words(k, 4), "answer": k % 4, "subject": "x"}


def _pair(first: str, second: str, labels: int = 2) -> Callable[[int], Row]:
    return lambda k: {first: text(k), second: text(k, 1), "label": k % labels, "idx": k}


def _true_of(k: int, count: int) -> Row:
    return {"choices": words(k, 4), "labels": [int(j < count) for j in range(4)]}


def _program(k: int) -> Row:
    return {
        **{"task_id": f"HumanEval/{k}", "entry_point": "add", "canonical_solution": f"    return x + {k}\n"},
        "prompt": f'def add(x):\n    """Adds {k}."""\n',
        "test": f"def check(candidate):\n    assert candidate(1) == {k + 1}\n    assert candidate(2) == {k + 2}\n",
    }


def _basic_program(k: int) -> Row:
    return {
        **{"task_id": k, "text": f"Add {k} to a number.", "code": f"def add(x):\n    return x + {k}"},
        "test_list": [f"assert add({x}) == {x + k}" for x in range(3)],
    }


ROWS: Mapping[str, Callable[[int], Row]] = {
    "mmlu_abstract_algebra": _multiple,
    "hellaswag": lambda k: {
        **{"activity_label": "Cats", "ctx_a": text(k), "ctx_b": "it ran", "endings": words(k, 4), "label": str(k % 4)}
    },
    "winogrande": lambda k: {
        **{
            "sentence": f"The _ {_VERBS[k % 6]} the stone.",
            "option1": "cat",
            "option2": "dog",
            "answer": str(1 + k % 2),
        }
    },
    "arc_easy": lambda k: {"question": text(k), "choices": _choices(k), "answerKey": letter(k)},
    "arc_challenge": lambda k: {"question": text(k), "choices": _choices(k), "answerKey": letter(k)},
    "piqa": lambda k: {"goal": text(k), "sol1": text(k, 1), "sol2": text(k, 2), "label": k % 2},
    "boolq": lambda k: {"passage": text(k), "question": text(k, 1), "label": k % 2},
    "gsm8k": lambda k: {"question": text(k), "answer": f"It is {k}.\n#### {k}"},
    "truthfulqa_mc1": lambda k: {"question": text(k), "mc1_targets": _true_of(k, 1), "mc2_targets": _true_of(k, 2)},
    "truthfulqa_mc2": lambda k: {"question": text(k), "mc1_targets": _true_of(k, 1), "mc2_targets": _true_of(k, 2)},
    "lambada_openai": lambda k: {"text": text(k)[:-1]},
    "wikitext": lambda k: {"page": " ".join(text(k, part) for part in range(4))},
    "openbookqa": lambda k: {"question_stem": text(k), "choices": _choices(k), "answerKey": letter(k)},
    "sciq": lambda k: {
        "question": text(k),
        "support": text(k, 1),
        **dict(zip(("distractor1", "distractor2", "distractor3", "correct_answer"), words(k, 4), strict=True)),
    },
    "copa": lambda k: {
        "premise": text(k),
        "question": ("cause", "effect")[k % 2],
        **{"choice1": text(k, 1), "choice2": text(k, 2), "label": k % 2},
    },
    "cb": _pair("premise", "hypothesis", 3),
    "wic": lambda k: {
        **{"word": text(k)[4:8].strip(), "sentence1": text(k), "sentence2": text(k, 1), "label": k % 2},
        **{"start1": 4, "end1": 8, "start2": 4, "end2": 8},
    },
    "multirc": lambda k: {"paragraph": text(k), "question": text(k, 1), "answer": words(k, 1)[0], "label": k % 2},
    "rte": _pair("sentence1", "sentence2"),
    "mrpc": _pair("sentence1", "sentence2"),
    "wnli": _pair("sentence1", "sentence2"),
    "qqp": _pair("question1", "question2"),
    "qnli": _pair("question", "sentence"),
    "mnli": _pair("premise", "hypothesis", 3),
    "cola": lambda k: {"sentence": text(k), "label": k % 2, "idx": k},
    "sst2": lambda k: {"sentence": text(k), "label": k % 2, "idx": k},
    "swag": lambda k: {
        "startphrase": text(k),
        **{f"ending{j}": ending for j, ending in enumerate(words(k, 4))},
        "label": k % 4,
    },
    "logiqa": lambda k: {
        **{"context": text(k), "question": text(k, 1), "options": words(k, 4), "label": letter(k).lower()}
    },
    "mathqa": lambda k: {
        "Problem": text(k),
        "options": " , ".join(f"{c} ) {k + j}" for j, c in enumerate("abcde")),
        "correct": letter(k, 5).lower(),
    },
    "pubmedqa": lambda k: {
        **{"QUESTION": text(k), "CONTEXTS": [text(k, 1), text(k, 2)]},
        "final_decision": ("yes", "no", "maybe")[k % 3],
    },
    "medmcqa": lambda k: {
        "question": text(k),
        **dict(zip(("opa", "opb", "opc", "opd"), words(k, 4), strict=True)),
        "cop": k % 4,
    },
    "commonsense_qa": lambda k: {
        "question": text(k),
        "choices": {"label": list("ABCDE"), "text": words(k, 5)},
        "answerKey": letter(k, 5),
    },
    "social_iqa": lambda k: {
        **{"context": text(k), "question": text(k, 1), "label": str(1 + k % 3)},
        **dict(zip(("answerA", "answerB", "answerC"), words(k, 3), strict=True)),
    },
    "anli_r1": _pair("premise", "hypothesis", 3),
    "triviaqa": lambda k: {"question": text(k)[:-1], "answer": {"aliases": words(k, 3)}},
    "nq_open": lambda k: {"question": text(k)[:-1], "answer": words(k, 2)},
    "asdiv": lambda k: {"body": text(k), "question": text(k, 1), "answer": f"{k} (stones)"},
    "headqa_en": lambda k: {
        "qtext": text(k),
        "answers": [{"aid": j + 1, "atext": answer} for j, answer in enumerate(words(k, 4))],
        "ra": 1 + k % 4,
    },
    "gpqa_main_zeroshot": lambda k: {
        "Question": text(k),
        "Correct Answer": f"right {k}",
        **{f"Incorrect Answer {j}": f"wrong {j} {k}" for j in (1, 2, 3)},
    },
    "paws_en": lambda k: {"sentence1": text(k), "sentence2": text(k, 1), "label": k % 2},
    "humaneval": _program,
    "humaneval_plus": _program,
    "humaneval_single_line_infilling": lambda k: {**_program(k), "suffix": "\n"},
    "mbpp": _basic_program,
    "mbpp_plus": lambda k: {**_basic_program(k), "prompt": f"Add {k} to a number."},
    "cruxeval_input": lambda k: {"code": f"def f(x):\n    return x + {k}", "input": "1", "output": str(k + 1)},
    "webqs": lambda k: {"question": text(k), "answers": words(k, 2)},
}
"""Task to the columns of its documents, by their number."""


def members(group: str) -> list[str]:
    """The tasks of a shipped group that lists them."""
    listed: list[str] = config_of(group)["task"]
    return listed


def config_of(name: str) -> dict[str, Any]:
    """What a shipped YAML file says, functions unresolved."""
    file = shipped_index()[name][1]
    assert file is not None
    config: dict[str, Any] = load_yaml(shipped_folder() / file, resolve_func=False)
    return config


def bbh_row(name: str) -> Callable[[int], Row]:
    """The rows of a task of leaderboard_bbh, from its choices."""
    choices = config_of(name)["doc_to_choice"]
    return lambda k: {"input": text(k), "target": choices[k % len(choices)]}


def write_shipped_data(root: Path, rows: Mapping[str, Callable[[int], Row]], count: int) -> None:
    """Writes folders that `datasets` finds from `root` under the Hub's names: every split of a task has the same rows.

    Args:
        root: What will be the working directory.
        rows: Shipped task to its rows by number.
        count: Rows of each.
    """
    configs: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        config = config_of(name)
        folder = root / config["dataset_path"]
        folder.mkdir(parents=True, exist_ok=True)
        key = config.get("dataset_name") or "default"
        (folder / f"{key}.jsonl").write_text("".join(json.dumps(row(k)) + "\n" for k in range(count)))
        configs.setdefault(config["dataset_path"], {})[key] = list(_splits(config))
    for path, listed in configs.items():
        described = [
            {"config_name": key, "data_files": [{"split": split, "path": f"{key}.jsonl"} for split in splits]}
            for key, splits in listed.items()
        ]
        (root / path / "README.md").write_text(f"---\n{json.dumps({'configs': described})}\n---\n")


def _splits(config: Mapping[str, Any]) -> Iterable[str]:
    given = [config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    given.append((config.get("fewshot_config") or {}).get("split"))
    return dict.fromkeys(split for split in given if split)
