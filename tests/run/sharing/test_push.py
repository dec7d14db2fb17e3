"""`push`: what arrives at the Hub, byte by byte; what does not leave; what it says where the Hub refuses."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from evomerge.recipe import parse_recipe
from evomerge.run.folder import RunFolder
from evomerge.spec.schema import SearchSpec
from tests.frame import Ended, files, invoke, process
from tests.hub_server import DIRECT, TOKEN, HubServer, Repo, hub_server, point_at


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, to which checkpoints are added."""
    return Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("pushed") / "tiny"))


def kept(run: Path) -> Path:
    winner = RunFolder.existing(run).result().winner.candidate  # type: ignore[union-attr]
    return run / "best" / f"candidate-{winner}"


@dataclass(frozen=True)
class Pushed:
    """A push to a repository that was not there: how it ended, and what arrived."""

    ended: Ended
    url: str
    repo: Repo


@pytest.fixture(scope="module")
def pushed(run: Path) -> Pushed:
    with pytest.MonkeyPatch.context() as patch, hub_server(patch) as hub:
        done = process("push", run, "org/merged", more={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", **DIRECT})
        return Pushed(done, hub.url, hub.repos["org/merged"])


@pytest.mark.slow
def test_what_arrives(run: Path, pushed: Pushed) -> None:
    from huggingface_hub import ModelCard

    assert pushed.ended.code == 0, pushed.ended.err
    repo = pushed.repo
    winner = kept(run).name.partition("-")[2]
    assert pushed.ended.out.startswith(f"candidate {winner} is at {pushed.url}/org/merged (private): ")
    assert repo.private
    here = dict(files(kept(run)))
    assert set(repo.files) == {*here, "report.html", "search.yaml"}
    rewritten = {"README.md", "recipe.yaml"}
    assert {name: repo.files[name] for name in here.keys() - rewritten} == {
        name: content for name, content in here.items() if name not in rewritten
    }
    card = ModelCard(repo.files["README.md"].decode(), ignore_metadata_errors=False)
    assert card.data.tags[:2] == ["evomerge", "merge"]
    assert [(result.dataset_name, result.metric_type) for result in card.data.eval_results] == [
        *(("tiny_choice", "acc"), ("tiny_text", "bits_per_byte"))
    ]
    assert "## Beside it\n\n`report.html` has the search" in card.text
    recipe = parse_recipe(yaml.safe_load(repo.files["recipe.yaml"]))
    assert set(recipe.models()) <= {"./base", "./a", "./b", "./c"}
    search = SearchSpec.model_validate(yaml.safe_load(repo.files["search.yaml"]))
    assert search.models.sources == {name: f"./{name}" for name in "abc"}
    assert search.evaluation.include_path == ["./tasks"]
    assert search.search == RunFolder.existing(run).spec.search
    [(message, paths)] = repo.commits
    assert message == f"Candidate {winner} of the search tiny, merged with EvoMerge"
    assert set(paths) == set(repo.files)


@pytest.mark.slow
def test_what_does_not_leave(run: Path, pushed: Pushed, tiny_family: dict[str, Path]) -> None:
    assert TOKEN not in pushed.ended.out + pushed.ended.err
    for name, content in pushed.repo.files.items():
        for path in (tiny_family["base"].parent, run.parent, Path(__file__).parents[2], TOKEN):
            assert str(path).encode() not in content, (name, path)
    assert TOKEN.encode() not in b"".join(content for _, content in files(run))


@pytest.mark.slow
def test_again_and_another_candidate(run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/merged"] = Repo(private=True, files={"notes.txt": b"mine", "README.md": b"old"})
    first = invoke(capsys, "push", run, "org/merged", "--message", "First")
    assert "the repository was there: this is commit " in first.out
    assert hub.repos["org/merged"].files["notes.txt"] == b"mine"
    assert hub.repos["org/merged"].commits[0][0] == "First"
    again = invoke(capsys, "push", run, "org/merged", "--public")
    assert "(private)" in again.out
    assert "it stays private: only its settings on the Hub" in again.out
    assert "the same to the last byte: no new commit after" in again.out
    assert hub.uploads == 1
    other = next(c for c in RunFolder.existing(run).candidates() if c.generation == 0 and c.state == "done")
    ended = invoke(capsys, "push", run, "org/merged", "--candidate", str(other.number))
    assert ended.code == 0, ended.err
    assert f"writing candidate {other.number} to " in ended.err
    weights = (run / "best" / f"candidate-{other.number}" / "model.safetensors").read_bytes()
    assert hub.repos["org/merged"].files["model.safetensors"] == weights
    assert [len(paths) for _, paths in hub.repos["org/merged"].commits][1] >= 4


@pytest.mark.slow
def test_an_interrupted_push_goes_on(run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults["/commit/"] = 503
    ended = invoke(capsys, "push", run, "org/merged")
    assert ended.code == 2
    assert "the Hub has trouble (status 503); the same command goes on from here" in ended.err
    assert hub.repos["org/merged"].files == {}
    assert invoke(capsys, "push", run, "org/merged").code == 0
    assert hub.uploads == 1  # the weights went up the first time
    assert hub.repos["org/merged"].files["model.safetensors"] == (kept(run) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_private_unless_it_is_wanted_public(run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/open"] = Repo(private=False)
    refused = invoke(capsys, "push", run, "org/open")
    assert refused.code == 2
    assert "org/open is there, and everyone can see it: --public pushes to it all the same" in refused.err
    assert hub.repos["org/open"].files == {}
    assert "(public)" in invoke(capsys, "push", run, "org/open", "--public").out
    assert invoke(capsys, "push", run, "org/new", "--public").code == 0
    assert not hub.repos["org/new"].private


def test_a_dry_run_sends_nothing(run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    ended = invoke(capsys, "push", run, "org/merged", "--dry-run")
    assert ended.code == 0, ended.err
    assert hub.calls == []
    rows = {row.split("|")[1].strip() for row in ended.out.splitlines() if row.startswith("| ")}
    assert {"README.md", "model.safetensors", "search.yaml", "report.html"} < rows
    assert "Nothing was sent." in ended.out


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ({"whoami": 401}, "the Hub does not take the token: log in again"),
        ({"repos/create": 403}, "the token may not write to org/merged: it needs that right"),
        ({"/commit/": 409}, "org/merged: somebody else wrote to it just now: run the command again"),
        ({"validate-yaml": 400}, "Invalid metadata in README.md"),
        ({"/preupload/": 413}, "org/merged: the Hub refused it, with status 413. It says: "),
    ],
)
def test_what_the_hub_refuses(
    run: Path, hub: HubServer, faults: dict[str, int], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.update(faults)
    ended = invoke(capsys, "push", run, "org/merged")
    assert ended.code == 2
    assert text in ended.err
    assert len(ended.err.splitlines()) == 1
    assert TOKEN not in ended.err


def test_without_a_token_or_a_way_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    def said(repository: str = "org/merged") -> str:
        ended = invoke(capsys, "push", run, repository)
        assert ended.code == 2
        return ended.err

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_at(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "no token of the Hub: `hf auth login`, or HF_TOKEN" in said()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the Hub cannot be reached; the same command goes on from here" in said()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set" in said()
    assert "org/a/b: write it as ORG/NAME" in said("org/a/b")


def test_a_name_that_the_hub_has_not_and_a_token_that_may_only_read(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "org/a--b: no name of a repository: " in invoke(capsys, "push", run, "org/a--b").err
    hub.role = "read"
    ended = invoke(capsys, "push", run, "org/merged")
    assert ended.code == 2
    assert "the Hub's token may only read" in ended.err


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another's": (
        "recipe.yaml",
        lambda path: path.write_text("merge_method: passthrough\nmodels: [{model: ./a}]\n"),
        "recipe.yaml: is not that of candidate",
    ),
    "no card": ("README.md", lambda path: path.unlink(), "no README.md; without the folder, it is written again"),
    "a card that is a pipe": ("README.md", lambda path: replaced(path, os.mkfifo), "no README.md; without the folder"),
    "no text": ("README.md", lambda path: path.write_bytes(bytes(range(256))), "README.md"),
    "cut weights": ("model.safetensors", lambda path: os.truncate(path, 5000), "model.safetensors"),
}


@pytest.mark.parametrize(("name", "damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_not_whole_does_not_go_up(
    run: Path,
    hub: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], object],
    text: str,
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "tiny"))
    damage(kept(other) / name)
    ended = invoke(capsys, "push", other, "org/merged")
    assert ended.code == 2
    assert text in ended.err
    assert hub.repos == {}


def test_what_is_no_part_of_a_checkpoint_stays_here(
    run: Path, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "tiny"))
    folder = kept(other)
    (folder / ".env").write_text("KEY=1")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    os.mkfifo(folder / "pipe")
    (folder / "link.json").symlink_to("/etc/hostname")
    (folder / "tokenizer_config.json").write_text('{"name_or_path": "/home/me/model", "model_max_length": 64}')
    ended = invoke(capsys, "push", other, "org/merged", "--dry-run")
    assert ended.code == 0, ended.err
    assert not [name for name in (".env", ".git", "pipe", "link.json") if f"| {name}" in ended.out]
    assert invoke(capsys, "push", other, "org/merged").code == 0
    assert json.loads(hub.repos["org/merged"].files["tokenizer_config.json"]) == {"model_max_length": 64}
