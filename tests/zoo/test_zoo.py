"""The zoo: its skills and benchmarks, and the smaller family of models, trained once for this file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge import zoo
from evomerge.errors import CheckpointError, OutputError
from evomerge.zoo import models as zoo_build
from evomerge.zoo.forward import last_states
from evomerge.zoo.make_benchmarks import benchmark_rows, main, to_jsonl
from evomerge.zoo.sizes import TINY, VERSION, Training
from evomerge.zoo.skills import CHOICES, OPENERS, SKILLS, lexicon, text_examples
from evomerge.zoo.training import IGNORED, draw_batches, zoo_tokenizer

EVAL = Path(__file__).parent.parent.parent / "eval"
BASE, *EXPERTS = zoo.SMALL


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the small family in it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_CACHE", str(folder))
        for name in zoo.SMALL:
            zoo.ensure(name)
        yield folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a small base that trains in a moment."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path))
    monkeypatch.setitem(TINY.__dict__, "base", (Training({"facts": 2}, 3, 1e-3),))
    return tmp_path / "zoo"


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
    found = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    sums = [row[len(prompt) - 1 : len(text) - 1].sum() for row, prompt, text in zip(found, prompts, texts, strict=True)]
    best = torch.stack(sums).view(-1, CHOICES).argmax(1)
    return float((best == torch.tensor([item["label"] for item in items])).double().mean())


# --- skills and benchmarks ---


@pytest.mark.parametrize("name", SKILLS)
def test_training_and_benchmark_share_no_prompt(name: str) -> None:
    items = {row["prompt"] for row in benchmark_rows()[f"zoo_{name}.jsonl"]}
    trained = {question.prompt for question in SKILLS[name].examples(random.Random(0), 20_000)}
    assert len(items) == 360
    assert len(trained) > 1_000
    assert not items & trained


def test_held_out_sentences_are_not_trained_on() -> None:
    items = {row["text"] for row in benchmark_rows()["zoo_text.jsonl"]}
    assert len(items) == 200
    assert not items & set(text_examples(random.Random(0), 20_000))


@pytest.mark.parametrize("name", SKILLS)
def test_items_have_four_different_choices_and_labels_spread(name: str) -> None:
    rows = benchmark_rows()[f"zoo_{name}.jsonl"]
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
        "import sys; from evomerge.zoo.make_benchmarks import benchmark_rows, to_jsonl;"
        "sys.stdout.write(''.join(map(to_jsonl, benchmark_rows().values())))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout == "".join(map(to_jsonl, benchmark_rows().values()))


def test_each_task_file_names_its_task_and_data() -> None:
    paths = sorted(EVAL.glob("zoo_*.yaml"))
    assert {f"zoo_{skill}" for skill in SKILLS} < {path.stem for path in paths}
    for path in paths:
        task = yaml.safe_load(path.read_text())
        assert task["task"] == path.stem
        assert (EVAL.parent / task["dataset_kwargs"]["data_files"]["test"]).is_file()


# --- tokenizer and batches ---


def test_a_known_word_is_one_token_and_any_text_comes_back() -> None:
    tokenizer = zoo_tokenizer()
    for word in lexicon():
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    for word in OPENERS:
        assert len(tokenizer(word)["input_ids"]) == 1, word
    for text in ("add 47 + 25 = 72", "naïve ✓ text\n\twith anything", " madder catadd"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_only_answers_are_learnt() -> None:
    tokenizer = zoo_tokenizer()
    ids, labels = draw_batches(Training({"reverse": 3}, 2, 1e-3), tokenizer)
    assert ids.shape == labels.shape == (2, 3, 15)  # reverse, 6 letters, =, 6 letters, </s>
    assert (labels[..., :8] == IGNORED).all()
    assert torch.equal(labels[..., 8:], ids[..., 8:])
    assert torch.equal(ids[..., 1:7].flip(-1), ids[..., 8:14])  # no slips


# --- training ---


def test_the_forward_pass_is_transformers(cache: Path) -> None:
    folder = zoo.ensure(BASE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([zoo_tokenizer()(text)["input_ids"] for text in ("add 47 + 25 = 72", "add 11 + 30 = 41")])
    weights = {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(last_states(weights, model.config, ids).float(), expected, rtol=1e-4, atol=1e-5)


def test_other_instructions_give_the_same_weights() -> None:
    """Training again without vector instructions and on one thread: sums are rounded otherwise, and nothing changes."""
    code = (
        "import hashlib; from evomerge.zoo.sizes import TINY, Training; from evomerge.zoo.training import *;"
        "tokenizer = zoo_tokenizer(); config = zoo_config(TINY, tokenizer); weights = new_weights(config);"
        "train(weights, config, Training({'facts': 6, 'reverse': 6}, 30, 4e-3), tokenizer, lambda: None);"
        "kept = b''.join(weight.detach().numpy().tobytes() for weight in weights.values());"
        "print(hashlib.sha256(kept).hexdigest())"
    )
    plain = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    told = []
    for extra in ({}, plain):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True, check=True)
        told.append(done.stdout)
    assert told[0] == told[1]


# --- models ---


def test_each_expert_is_best_at_its_skill(cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.ensure(BASE))
    models = {name: AutoModelForCausalLM.from_pretrained(zoo.ensure(name)) for name in zoo.SMALL}
    for expert in EXPERTS:
        skill = expert.removeprefix(TINY.prefix)
        scores = {name: accuracy(model, tokenizer, skill) for name, model in models.items()}
        own = scores.pop(expert)
        assert own > max(scores.values()) + 0.03, (expert, own, scores)


def test_a_second_call_does_not_train(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_build, "build", lambda *given: pytest.fail("trained again"))
    start = time.perf_counter()
    folders = [zoo.ensure(name) for name in zoo.SMALL]
    assert time.perf_counter() - start < 0.5
    assert folders == [cache / "zoo" / VERSION / name for name in zoo.SMALL]


def test_the_folder_is_a_hugging_face_checkpoint(cache: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(zoo.ensure(BASE), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.generation_config.do_sample is False
    card = (zoo.ensure(EXPERTS[0]) / "README.md").read_text()
    _, front_matter, _ = card.split("---\n", 2)
    assert yaml.safe_load(front_matter) | {"license": "apache-2.0", "base_model": f"zoo:{BASE}"} == yaml.safe_load(
        front_matter
    )


def test_training_again_gives_the_same_bytes_and_leaves_torch_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = zoo.ensure(BASE)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    first = cache / "zoo" / VERSION / BASE
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_an_expert_starts_from_its_base(cache: Path) -> None:
    base, expert = (load_file(zoo.ensure(name) / "model.safetensors") for name in (BASE, EXPERTS[0]))
    assert base.keys() == expert.keys()
    norm = "model.norm.weight"
    assert 0 < (base[norm] - expert[norm]).norm() < 0.5 * base[norm].norm()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no model 'arithmetics' \(did you mean 'arithmetic'\?\); it has base, "):
        zoo.ensure("arithmetics")


def test_an_interrupted_training_leaves_nothing(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zoo.ensure(BASE)
    assert [path.name for path in (short / VERSION).iterdir()] == [".lock"]
    assert (zoo.ensure(BASE) / "model.safetensors").is_file()


def test_what_a_killed_process_left_is_cleared(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = short / VERSION / ".partial-killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    zoo.ensure(BASE)
    assert sorted(path.name for path in (short / VERSION).iterdir()) == [".lock", BASE]
    assert capsys.readouterr().err.splitlines()[-1] == f"training zoo:{BASE}: step 3 of 3"


def test_a_cache_that_cannot_be_written_is_reported(short: Path) -> None:
    short.write_text("a file")
    with pytest.raises(OutputError, match="set EVOMERGE_CACHE"):
        zoo.ensure(BASE)


def test_two_processes_train_once_even_when_one_is_killed(tmp_path: Path) -> None:
    code = (
        "from evomerge import zoo; from evomerge.zoo.sizes import TINY, Training;"
        "TINY.__dict__['base'] = (Training({'facts': 4}, STEPS, 1e-3),); zoo.ensure('tiny-base')"
    )
    environment = {**os.environ, "EVOMERGE_CACHE": str(tmp_path)}

    def start(steps: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code.replace("STEPS", str(steps))]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    endless = start(1_000)
    assert endless.stderr is not None
    endless.stderr.readline()  # it holds the lock and trains
    others = [start(4), start(4)]
    endless.send_signal(signal.SIGKILL)
    endless.communicate()
    told = [process.communicate()[1] for process in others]
    assert [process.returncode for process in others] == [0, 0]
    assert sum("step 4 of 4" in text for text in told) == 1
    assert sorted(path.name for path in (tmp_path / "zoo" / VERSION).iterdir()) == [".lock", BASE]


def test_importing_the_zoo_does_not_load_torch() -> None:
    code = "import sys, evomerge.zoo, evomerge.zoo.skills; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
