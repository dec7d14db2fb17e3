"""A search from start to end: its folder, its budget, going on, and what may not change under it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.errors import BadInput, CandidateError, EvoMergeError, RecipeError, RunError
from evomerge.evaluation.scores import ItemScores
from evomerge.evaluation.splits import SEARCH, SELECT, TEST
from evomerge.objective.item_sampling import Sample
from evomerge.problem.candidate_evaluator import CandidateEvaluator
from evomerge.problem.fake_evaluator import FakeRunner, fake_problem
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.report.result import CandidateCounts
from evomerge.report.tables import result_table, status_text
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.run.status import read_status
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate
from evomerge.system.locks import exclusive
from tests.evaluation.conftest import documents, write_documents, write_task
from tests.fakes import FAKE, fake_spec
from tests.frame import changed, files, invoke, search_spec
from tests.models import write_tiny_llama


def candidates(folder: Path) -> tuple[Candidate, ...]:
    return RunFolder.existing(folder).candidates()


def lasting(found: tuple[Candidate, ...]) -> list[tuple[Any, ...]]:
    """Everything of the candidates but the time that they took."""
    return [
        (c.number, c.generation, c.genome, c.recipe, c.recipe_hash, c.parents, c.operator, c.state, c.fitness, c.scores)
        for c in found
    ]


SHORT = fake_spec(search__candidates=7, search__finalists=2)
"""A search of seven candidates without models."""


@pytest.fixture
def small(tiny_family: dict[str, Path]) -> SearchSpec:
    """A search of seven candidates without checkpoints."""
    return parse_spec(search_spec(tiny_family, search__candidates=7, search__finalists=2, run__keep=0))


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(finished_run, tmp_path / "copied"))


def test_what_a_run_leaves(finished_run: Path, tiny_family: dict[str, Path]) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "search.yaml",
        "resolved.yaml",
        "environment.json",
        "study.log",
        "scores",
        "log.txt",
        "result.json",
    }
    assert (finished_run / "search.yaml").read_text() == (finished_run.parent / "tiny.yaml").read_text()
    resolved = yaml.safe_load((finished_run / "resolved.yaml").read_text())
    assert resolved["models"]["sources"] == {name: str(tiny_family[name]) for name in "abc"}
    environment = json.loads((finished_run / "environment.json").read_text())
    assert set(environment["content"]["models"]) == {str(folder) for folder in tiny_family.values()}
    assert set(environment["content"]["items"]) == {"tiny_choice", "tiny_text", "tiny_answer"}
    assert {"torch", "transformers", "lm_eval", "threads"} <= set(environment["versions"])
    result = json.loads((finished_run / "result.json").read_text())
    assert [p.name for p in (finished_run / "best").iterdir()] == [f"candidate-{result['winner']['candidate']}"]
    log = (finished_run / "log.txt").read_text()
    assert "candidate 17 of 18" in log
    assert "Traceback" not in log


def test_budget_is_exact_and_recipe_hashes_are_distinct(finished_run: Path) -> None:
    found = candidates(finished_run)
    assert [c.number for c in found] == list(range(18))
    assert len({c.recipe_hash for c in found}) == 18
    result = json.loads((finished_run / "result.json").read_text())
    counts = result["candidates"]
    assert counts["done"] + counts["failed"] + counts["pruned"] == counts["budget"] == 18


def test_generation_0_and_descent(finished_run: Path) -> None:
    found = candidates(finished_run)
    first = [c.operator for c in found if c.generation == 0]
    assert first[:5] == ["parent:base", "parent:a", "parent:b", "parent:c", "uniform average"]
    assert {"dare_ties (defaults)", "frankenmerge (defaults)"} <= set(first)
    for candidate in found:
        generations = [found[parent].generation for parent in candidate.parents]
        assert all(g < candidate.generation for g in generations)
        assert bool(candidate.parents) == (candidate.generation > 0)


def test_winner_is_the_best_finalist_over_search_and_select(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    ranked = sorted(candidates(finished_run), key=lambda c: (-(c.fitness or 0), c.number))
    assert [f["candidate"] for f in result["finalists"]] == [c.number for c in ranked[:3]]
    best = max(result["finalists"], key=lambda f: f["pooled"])
    assert result["winner"]["candidate"] == best["candidate"]
    for split in (SEARCH, SELECT, TEST):
        measured = result["winner"]["fitness"][split]
        assert set(measured) == {"value", "stderr", "n"}
        assert measured["n"] == {SEARCH: 20, SELECT: 10, TEST: 10}[split]
    assert set(result["winner"]["scores"]) == {"search", "select", "test", "guard"}
    names = {"parent:base", "parent:a", "parent:b", "parent:c", "uniform average"}
    winner = candidates(finished_run)[result["winner"]["candidate"]]
    assert set(result["baselines"]) >= names - {winner.operator}
    for row in result["baselines"].values():
        gain = result["winner"]["fitness"]["test"]["value"] - row["fitness"]["test"]["value"]
        assert row["winner_less_this"]["value"] == pytest.approx(gain)
        low, high = row["winner_less_this"]["interval"]
        assert low <= row["winner_less_this"]["value"] <= high
        assert {"wins", "losses", "p"} <= set(row["winner_less_this"]["tasks"]["tiny_choice"])
    assert result["verdict"].startswith("The winner is ")
    log = (finished_run / "log.txt").read_text()
    assert (f"WARNING evomerge.run: {result['verdict']}" in log) == bool(result["within_noise_of"])
    fitness = result["winner"]["fitness"]
    assert result["selection_bias"]["value"] == pytest.approx(fitness[SEARCH]["value"] - fitness[TEST]["value"])
    for finalist in result["finalists"]:
        assert finalist["winner_less_this"]["value"] == pytest.approx(best["pooled"] - finalist["pooled"])
        if finalist["candidate"] == best["candidate"]:
            assert finalist["winner_less_this"] == {"value": 0.0, "stderr": 0.0}


@pytest.mark.parametrize(("fitness", "steering"), [("smooth", "prob"), ("metric", "acc")])
def test_accuracy_is_reported_whatever_steers(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], fitness: str, steering: str
) -> None:
    changes: dict[str, Any] = {"search__candidates": 7, "search__finalists": 2, "run__keep": 0}
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(search_spec(tiny_family, evaluation__fitness=fitness, **changes)))
    ended = invoke(capsys, "run", path, "--dir", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(g["metric"], g["steered_by"]) for g in result["goals"]] == [
        ("acc", steering),
        ("bits_per_byte", "bits_per_byte"),
    ]
    found = {c.operator: c for c in candidates(tmp_path / "run")}
    sources = [found[f"parent:{name}"].scores[SEARCH] for name in "abc"]
    best_bits = min(s["tiny_text"]["bits_per_byte"]["value"] for s in sources)

    def relative(scores: Any, metric: str) -> float:
        best = max(s["tiny_choice"][metric]["value"] for s in sources)
        bits = best_bits / scores["tiny_text"]["bits_per_byte"]["value"]
        return float((scores["tiny_choice"][metric]["value"] / best + 2 * bits) / 3)

    for candidate in found.values():
        assert candidate.fitness == pytest.approx(relative(candidate.scores[SEARCH], steering))
    for split in (SEARCH, TEST):
        told = relative(result["winner"]["scores"][split], "acc")
        assert result["winner"]["fitness"][split]["value"] == pytest.approx(told)
    assert "tiny_choice acc" in ended.out


def test_relative_fitness_of_the_sources(finished_run: Path) -> None:
    """The fitness is each task's score over the best source's, bits per byte inverted, weighted 1 : 2.

    What steers is the probability of the right choice, in accuracy's place.
    """
    found = {c.operator: c for c in candidates(finished_run)}
    sources = [found[f"parent:{name}"].scores[SEARCH] for name in "abc"]
    best_prob = max(s["tiny_choice"]["prob"]["value"] for s in sources)
    best_bits = min(s["tiny_text"]["bits_per_byte"]["value"] for s in sources)
    for candidate in found.values():
        scores = candidate.scores[SEARCH]
        prob = scores["tiny_choice"]["prob"]["value"] / best_prob
        bits = best_bits / scores["tiny_text"]["bits_per_byte"]["value"]
        assert candidate.fitness == pytest.approx((prob + 2 * bits) / 3)


def test_items_that_tell_candidates_apart_steer(tmp_path: Path) -> None:
    """Half of the search items are scored; the record has estimates, the finalists are scored on all of them."""
    changes: dict[str, Any] = {"search__finalists": 2, "evaluation__informative": 0.5}
    short = fake_spec(search__candidates=5, **changes)
    start(short, folder=tmp_path / "parts", parts=FAKE)
    result = resume(tmp_path / "parts", candidates=7, parts=FAKE)
    whole = fake_spec(search__candidates=7, **changes)
    assert start(whole, folder=tmp_path / "whole", parts=FAKE) == result
    assert lasting(candidates(tmp_path / "parts")) == lasting(candidates(tmp_path / "whole"))
    informative = result.informative
    assert informative is not None
    assert {task: (drawn.items, drawn.of) for task, drawn in informative.tasks.items()} == {
        "choice": (10, 20),
        "text": (10, 20),
    }
    drawn_items = RunFolder.existing(tmp_path / "whole").scores.load_samples()
    assert drawn_items is not None
    samples = {task: Sample.from_json(sample) for task, sample in drawn_items.items()}
    problem = fake_problem(whole)
    runner = FakeRunner(problem)
    for task, sample in samples.items():
        assert set(sample.items) < {problem.tasks[task].items[k] for k in problem.splits[SEARCH][task]}
        assert sum(sample.weights) == pytest.approx(informative.tasks[task].of)
    found = {c.number: c for c in candidates(tmp_path / "whole")}
    folder = RunFolder.existing(tmp_path / "whole")
    for finalist in informative.finalists:
        candidate = found[finalist.candidate]
        assert finalist.estimate == candidate.fitness
        assert candidate.scores[SEARCH]["choice"]["acc"]["n"] == 10
        kept = folder.scores.load(runner.plan(candidate.recipe).digest, SEARCH)
        assert kept is not None
        acc = kept["choice"]
        drawn = dict(zip(samples["choice"].items, samples["choice"].weights, strict=True))
        weights = [drawn.get(item, 0.0) for item in acc.items]
        expected = float(acc.values("acc") @ weights) / sum(weights)
        assert candidate.scores[SEARCH]["choice"]["acc"]["value"] == pytest.approx(expected)
    for candidate in found.values():
        if candidate.generation == 0:  # was scored on all of them, and is judged by the same part as the others
            kept = folder.scores.load(runner.plan(candidate.recipe).digest, SEARCH)
            assert kept is not None
            assert len(kept["choice"].items) == 20
        assert candidate.scores[SEARCH]["choice"]["acc"]["n"] == 10
    assert "estimated from those drawn" in result_table(result)
    assert result.winner.scores[SEARCH]["choice"]["acc"].n == 20


def test_members_of_groups_and_errors_of_corpus_metrics_are_in_the_result(
    tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(24))
    for name, kind in (("quiz", "mc"), ("other", "mc"), ("pairs", "pairs")):
        write_task(tmp_path / "tasks", name, kind=kind)
    group = {"group": "both", "task": ["quiz", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "both.yaml").write_text(yaml.safe_dump(group))
    wanted = search_spec(
        tiny_family,
        evaluation__include_path=str(tmp_path / "tasks"),
        evaluation__tasks=[{"task": "both", "metric": "acc"}, {"task": "pairs", "metric": "f1"}],
        evaluation__guard=[],
        evaluation__scale="raw",
        evaluation__fitness="metric",
        evaluation__bootstrap_iters=20,
        space__methods=["linear"],
        space__frankenmerge=...,
        search__candidates=2,
        search__finalists=1,
        run__keep=0,
    )
    result = start(parse_spec(wanted), folder=tmp_path / "run")
    assert result == RunFolder.existing(tmp_path / "run").result()
    for row in (result.winner, *result.baselines.values()):
        for split in (SEARCH, SELECT, TEST) if row is result.winner else (SEARCH, TEST):
            members, whole = row.members[split], row.scores[split]
            assert set(members) == {"both"}
            scores = members["both"]
            assert set(scores) == {"quiz", "other"}
            correct = sum(score["acc"].value * score["acc"].n for score in scores.values())
            assert correct == pytest.approx(whole["both"]["acc"].value * whole["both"]["acc"].n)
            f1, fitness = whole["pairs"]["f1"].stderr, row.fitness[split].stderr
            acc = whole["both"]["acc"].stderr
            assert f1 is not None
            assert acc is not None
            assert f1 > 0
            assert fitness == pytest.approx(((f1**2 + acc**2) / 4) ** 0.5)


def test_splits_are_disjoint(small: SearchSpec) -> None:
    problem = open_problem(small)
    for task, count in (("tiny_choice", 24), ("tiny_text", 16)):
        parts = [problem.splits[split][task] for split in (SEARCH, SELECT, TEST)]
        assert sorted(i for part in parts for i in part) == list(range(count))
        assert [len(part) for part in parts] == [count // 2, count // 4, count // 4]
    assert list(problem.splits["guard"]) == ["tiny_answer"]


def test_a_run_of_an_older_version_goes_on(finished_run: Path, tmp_path: Path) -> None:
    """What this version added is missing from its specification and its result, which is written anew.

    It had no checksums either, so that its files have to be accepted once.
    """
    root = Path(shutil.copytree(finished_run, tmp_path / "run"))
    resolved = yaml.safe_load((root / "resolved.yaml").read_text())
    for key in ("informative", "cache"):
        del resolved["evaluation"][key]
    del resolved["search"]["baseline"]
    (root / "resolved.yaml").write_text(yaml.safe_dump(resolved))
    with pytest.raises(RunError, match=r"resolved\.yaml: has no checksum: .*--accept-edited"):
        read_status(root)
    assert RunFolder.existing(root, accept_edited=True).spec.search.baseline is None
    result = json.loads((root / "result.json").read_text())
    for row in result["baselines"].values():
        row["winner_less_this"] = {key: row["winner_less_this"][key] for key in ("value", "stderr")}
    (root / "result.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match=r"winner_less_this\.interval: is missing") as raised:
        read_status(root)
    assert "without it, `evomerge resume` writes it" in raised.value.problems[-1]
    (root / "result.json").unlink()
    assert "18 of 18 candidates: 18 scored in full" in status_text(read_status(root))
    assert resume(root, candidates=19).candidates.done == 19


def test_rerun_of_a_finished_run_changes_nothing(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volatile = {".lock", "log.txt"}
    before = {name: content for name, content in files(copied) if name not in volatile}
    path = copied.parent / "tiny.yaml"
    path.write_text((copied / "search.yaml").read_text())
    first = invoke(capsys, "run", path, "--dir", copied)
    again = invoke(capsys, "resume", copied)
    result = RunFolder.existing(copied).result()
    assert result is not None
    assert first.out == again.out == result_table(result) + "\n"
    assert {name: content for name, content in files(copied) if name not in volatile} == before


@pytest.mark.parametrize("changes", [{}, {"evaluation__racing": True, "search__baseline": "random"}])
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Seven candidates, then eighteen: the same as eighteen at once."""
    short = fake_spec(search__candidates=7, **changes)
    whole = start(fake_spec(search__candidates=18, **changes), folder=tmp_path / "whole", parts=FAKE)
    start(short, folder=tmp_path / "run", parts=FAKE)
    assert len(candidates(tmp_path / "run")) == 7
    result = resume(tmp_path / "run", candidates=18, parts=FAKE)
    assert lasting(candidates(tmp_path / "run")) == lasting(candidates(tmp_path / "whole"))
    assert result == whole
    assert result.candidates.budget == 18
    # The file still says 7: the run stays as it was extended.
    assert start(short, folder=tmp_path / "run", parts=FAKE).candidates.budget == 18
    with pytest.raises(RunError, match="the budget is 18; --candidates can only extend it"):
        resume(tmp_path / "run", candidates=9)
    with pytest.raises(RunError, match="the budget is 18; --candidates can only extend it"):
        start(short, folder=tmp_path / "run", candidates=9)


@pytest.mark.parametrize(
    ("change", "in_diff"),
    [
        ({"search__seed": 1}, "seed: 1"),
        ({"space__layer_groups": 1}, "layer_groups: 1"),
        ({"evaluation__scale": "raw", "evaluation__tasks": ["tiny_text"]}, "scale: raw"),
        ({"run__storage": "sqlite:///other.db"}, "storage: sqlite:///other.db"),
    ],
)
def test_another_search_in_the_same_folder(
    finished_run: Path, tiny_family: dict[str, Path], change: dict[str, Any], in_diff: str
) -> None:
    other = parse_spec(search_spec(tiny_family, **change))
    with pytest.raises(RunError, match="holds a run of another search") as caught:
        start(other, folder=finished_run)
    assert f"+{in_diff}" in caught.value.problems[0].replace("+  ", "+").replace("+  ", "+")


def test_what_may_change_under_a_run(copied: Path, tiny_family: dict[str, Path]) -> None:
    spec = parse_spec(search_spec(tiny_family, run__keep=0, search__stop={"hours": 5}))
    start(spec, folder=copied)
    assert RunFolder.existing(copied).spec.search.stop.hours == 5


def test_changed_weights_are_refused(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    family = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_family.items()}
    spec = parse_spec(search_spec(family, search__candidates=2, run__keep=0, search__finalists=1))
    start(spec, folder=tmp_path / "run")
    before = {name: content for name, content in files(tmp_path / "run") if name not in {".lock", "log.txt"}}
    shutil.rmtree(family["b"])
    write_tiny_llama(family["b"], 9, base=family["base"])
    with pytest.raises(RunError, match="the models or the data have changed") as caught:
        resume(tmp_path / "run")
    assert str(family["b"]) in caught.value.problems[0]
    assert str(family["c"]) + ":" not in [line[1:] for line in caught.value.problems[0].splitlines() if line[0] in "+-"]
    assert {n: c for n, c in files(tmp_path / "run") if n not in {".lock", "log.txt"}} == before


def test_changed_data_is_refused(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    tasks = Path(shutil.copytree(search_spec(tiny_family)["evaluation"]["include_path"], tmp_path / "tasks"))
    content = search_spec(tiny_family, search__candidates=2, run__keep=0, search__finalists=1)
    spec = parse_spec(changed(content, {"evaluation__include_path": str(tasks)}))
    start(spec, folder=tmp_path / "run")
    lines = (tasks / "tiny_text.jsonl").read_text().splitlines()
    (tasks / "tiny_text.jsonl").write_text("\n".join(['{"text": "something else"}', *lines[1:]]) + "\n")
    with pytest.raises(RunError, match="tiny_text"):
        start(spec, folder=tmp_path / "run")


def test_another_process_holds_the_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.system.locks._PAUSE", 0.001)
    resolved = (copied / "resolved.yaml").read_text()
    with exclusive(copied / ".lock", "it"), pytest.raises(RunError, match=r"is in use by process \d+"):
        resume(copied, candidates=40)
    assert (copied / "resolved.yaml").read_text() == resolved
    resume(copied)


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty, and no run"):
        start(SHORT, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RunError, match="no run here"):
        resume(tmp_path / "nothing")


def test_folder_begun_and_killed(tmp_path: Path) -> None:
    """A kill between the folder's making and its first complete file is no reason to refuse it."""
    root = tmp_path / "run"
    (root / "scores").mkdir(parents=True)
    (root / "search.yaml").write_text("half")
    (root / ".resolved.yaml.123.partial").write_text("ha")
    RunFolder.create(root, SHORT, "given")
    assert RunFolder.existing(root).spec == SHORT
    assert (root / "search.yaml").read_text() == "given"


def _broken(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    """Makes what scores without models raise where `fails(recipe, split)` gives an error."""
    scores, evaluate, plan = CandidateEvaluator.scores, CandidateEvaluator.__call__, FakeRunner.plan
    proposals: list[Any] = []

    def breaking(self: CandidateEvaluator, recipe: Any, split: str) -> Any:
        error = fails(recipe, split)
        if error is not None:
            raise error
        return scores(self, recipe, split)

    def noting(self: CandidateEvaluator, proposal: Any) -> Any:
        proposals.append(proposal)
        try:
            return evaluate(self, proposal)
        finally:
            proposals.clear()

    def failing(self: FakeRunner, recipe: Any) -> Any:
        error = fails(recipe, SEARCH) if proposals else None
        if error is not None:
            raise error
        return plan(self, recipe)

    monkeypatch.setattr(CandidateEvaluator, "scores", breaking)
    monkeypatch.setattr(CandidateEvaluator, "__call__", noting)
    monkeypatch.setattr(FakeRunner, "plan", failing)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CandidateError("its logits are not finite"), "not scored"),
        (RuntimeError("out of luck"), "RuntimeError"),
        (ZeroDivisionError("no"), "ZeroDivisionError"),
        (RecipeError("weights sum to zero"), "impossible recipe"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_failing_candidate_is_recorded_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    """One baseline and one later candidate fail; the run ends with the budget spent, and its table without them."""
    _broken(monkeypatch, lambda recipe, split: error if recipe["merge_method"] == "task_arithmetic" else None)
    result = start(SHORT, folder=tmp_path / "run", parts=FAKE)
    found = candidates(tmp_path / "run")
    failed = [c for c in found if c.state == "failed"]
    assert [c.recipe["merge_method"] for c in failed] == ["task_arithmetic"] * len(failed)
    assert failed
    assert {c.failure_kind for c in failed} == {kind}
    assert all(c.fitness is None for c in failed)
    assert result.candidates == CandidateCounts(done=7 - len(failed), failed=len(failed), pruned=0, budget=7)
    assert lasting(candidates(tmp_path / "run")) == lasting(found)


def test_logits_that_are_not_finite_fail(small: SearchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real path: a model whose weights overflow gives no score."""
    from evomerge.engine.resident import Resident

    write = Resident.write

    def overflowing(self: Resident, plan: Any) -> Any:
        model, written = write(self, plan)
        if len(plan.operations) and plan.operations[0].method == "task_arithmetic":
            with torch.no_grad():
                model.model.norm.weight.fill_(float("inf"))
        return model, written

    monkeypatch.setattr(Resident, "write", overflowing)
    start(small, folder=tmp_path / "run")
    failed = [c for c in candidates(tmp_path / "run") if c.state == "failed"]
    assert failed
    assert all("finite" in str(c.failure) for c in failed)


def test_ten_failures_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = set(SHORT.models.sources.values())

    def fails(recipe: Any, split: str) -> Exception | None:
        single = len(recipe.get("models", [])) == 1 and recipe["models"][0]["model"] in sources
        return None if single else RuntimeError("the disk is on fire")

    _broken(monkeypatch, fails)
    with pytest.raises(
        EvoMergeError,
        match=r"10 candidates in a row failed with RuntimeError.*disk is on fire\. One cause is .* goes on",
    ) as caught:
        start(fake_spec(), folder=tmp_path / "run", parts=FAKE)
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, BadInput)
    assert sum(c.state == "failed" for c in candidates(tmp_path / "run")) >= 10


def test_finalists_and_rivals_without_scores_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(SHORT, folder=tmp_path / "run", parts=FAKE)
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    winner, runner_up = (f["candidate"] for f in sorted(first["finalists"], key=lambda f: -f["pooled"]))
    by_number = {c.number: c for c in candidates(tmp_path / "run")}
    gone = [by_number[winner].recipe, by_number[4].recipe]
    shutil.rmtree(tmp_path / "run")

    def fails(recipe: Any, split: str) -> Exception | None:
        return CandidateError("not finite") if split == TEST and recipe in gone else None

    _broken(monkeypatch, fails)
    result = start(SHORT, folder=tmp_path / "run", parts=FAKE)
    assert result.winner.candidate == runner_up
    assert by_number[4].operator not in result.baselines
    assert f"candidate {winner} is left out: not finite" in (tmp_path / "run" / "log.txt").read_text()


def test_a_source_that_cannot_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, lambda recipe, split: CandidateError("its logits are not finite"))
    with pytest.raises(EvoMergeError, match=r"models\.sources\.a: cannot be scored: its logits are not finite"):
        start(SHORT, folder=tmp_path / "run", parts=FAKE)


def test_raw_scale_and_random_search(tmp_path: Path) -> None:
    """With one unit, raw fitness is the score itself; bits per byte counts downwards."""
    tasks = [{"task": "text", "metric": "bits_per_byte"}]
    changes: dict[str, Any] = {"evaluation__tasks": tasks, "evaluation__scale": "raw", "evaluation__guard": []}
    spec = fake_spec(search__algorithm="random", search__candidates=14, **changes)
    result = start(spec, folder=tmp_path / "run", parts=FAKE)
    found = candidates(tmp_path / "run")
    assert len(found) == result.candidates.done == 14
    for candidate in found:
        assert candidate.fitness == -candidate.scores[SEARCH]["text"]["bits_per_byte"]["value"]
    assert "guard" not in result.winner.scores


def test_what_is_wrong_is_told_together(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """A missing model, a task without its data; then an unknown metric, a gene that no method has."""
    tasks = Path(shutil.copytree(search_spec(tiny_family)["evaluation"]["include_path"], tmp_path / "tasks"))
    (tasks / "tiny_choice.jsonl").unlink()
    content = search_spec(tiny_family, models__sources={"a": str(tmp_path / "none"), "b": str(tiny_family["b"])})
    spec = parse_spec(changed(content, {"evaluation__include_path": str(tasks)}))
    with pytest.raises(BadInput) as caught:
        open_problem(spec)
    assert len(caught.value.problems) == 2
    assert "none" in caught.value.problems[0]
    assert "no data file tiny_choice.jsonl" in caught.value.problems[1]
    content = search_spec(tiny_family, space__genes={"wait": {"low": 0}})
    spec = parse_spec(changed(content, {"evaluation__tasks": [{"task": "tiny_text", "metric": "acc"}]}))
    with pytest.raises(BadInput) as caught:
        open_problem(spec)
    assert "has no metric 'acc'" in caught.value.problems[0]
    assert "no gene 'wait' (did you mean 'weight'?)" in caught.value.problems[1]


def test_the_record_is_an_optuna_study(finished_run: Path) -> None:
    """As optuna-dashboard opens it: with nothing of ours in between."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    backend = JournalFileBackend(str(finished_run / "study.log"))
    study = optuna.load_study(study_name="tiny", storage=optuna.storages.JournalStorage(backend))
    known = candidates(finished_run)
    assert [trial.value for trial in study.trials] == [candidate.fitness for candidate in known]
    assert study.best_value == max(c.fitness for c in known if c.fitness is not None)
    assert all(trial.params for trial in study.trials)


def test_kept_scores_are_the_candidates_own(finished_run: Path) -> None:
    """What the run folder keeps by plan and split gives the record's scores again."""
    folder = RunFolder.existing(finished_run)
    runner = ModelRunner(open_problem(folder.spec))
    for candidate in folder.candidates():
        kept = folder.scores.load(runner.plan(candidate.recipe).digest, SEARCH)
        assert kept is not None
        for task, item_scores in kept.items():
            assert isinstance(item_scores, ItemScores)
            for metric, score in item_scores.scores().items():
                assert candidate.scores[SEARCH][task][metric] == score.to_json()


def test_controls_are_two_more_to_beat(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """The same search over shuffled sources and an adapter trained on the search items, both kept where they are."""
    changes = {"search__controls": ["shuffled", "lora"], "search__candidates": 8, "run__keep": 0}
    spec = parse_spec(search_spec(tiny_family, **changes))
    root = tmp_path / "run"
    result = start(spec, folder=root)
    names = [name for name in result.baselines if name.startswith(("shuffled sources: its", "LoRA: its adapter-"))]
    assert len(names) == 2
    for name in names:
        row = result.baselines[name]
        assert row.candidate is None
        assert set(row.fitness) == {"search", "select", "test"}
        assert row.winner_less_this.n == result.winner.fitness["test"].n
    control = RunFolder.existing(root / "controls" / "shuffled" / "run")
    assert control.spec.models.shuffled
    first = [c.recipe for c in RunFolder.existing(root).candidates()[:3]]
    assert [c.recipe for c in control.candidates()[:3]] == first  # the same search, of other tensors
    (root / "result.json").unlink()
    assert start(spec, folder=root).to_json() == result.to_json()


def test_a_dtype_that_is_left_open_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run keeps it, also where the same file is run again on another machine."""
    spec = fake_spec(search__candidates=5, search__finalists=2, evaluation__dtype="auto")
    monkeypatch.setattr("evomerge.problem.problem.fastest_dtype", lambda shapes, device: "bfloat16")
    start(spec, folder=tmp_path / "run", parts=FAKE)
    assert RunFolder.existing(tmp_path / "run").spec.evaluation.dtype == "bfloat16"
    monkeypatch.setattr("evomerge.problem.problem.fastest_dtype", lambda shapes, device: "float32")
    start(spec, folder=tmp_path / "run", candidates=7, parts=FAKE)
    assert RunFolder.existing(tmp_path / "run").spec.evaluation.dtype == "bfloat16"
    with pytest.raises(RunError, match="dtype: float32"):
        start(fake_spec(search__candidates=7, search__finalists=2), folder=tmp_path / "run", parts=FAKE)
