"""A candidate on the Hugging Face Hub: its checkpoint and card, with the recipe, the report and the search beside it.

Everything goes up in one commit, through huggingface_hub, which sends no file twice: a push that was interrupted and is
run again sends what is missing.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.reference import is_hub_id
from evomerge.errors import BadInput, EvoMergeError, RunError, ServiceError
from evomerge.recipe import load_recipe
from evomerge.report.html import report_page
from evomerge.report.lineage import whole_recipe
from evomerge.report.run_data import SAMPLES
from evomerge.report.tables import table
from evomerge.run.export import ITEMS, export_candidate, find_candidate
from evomerge.run.folder import RunFolder
from evomerge.run.report import read_run
from evomerge.run.sharing.public import PublicTexts
from evomerge.study.candidate import Candidate
from evomerge.system.files import read_text
from evomerge.system.text import one_line, printable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Files = Mapping[str, Path | bytes]
"""Path in the repository to a file here, or to its content."""

_OURS = ("README.md", "recipe.yaml", "scores.json", ITEMS, SAMPLES)
_TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class _Repository:
    """What there is under a name on the Hub: its last commit, None where there is nothing; who may see it."""

    name: str
    commit: str | None
    private: bool


def push_candidate(
    run: Path,
    repository: str,
    *,
    candidate: int | None = None,
    public: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> str:
    """Uploads a candidate to the Hub, in one commit; files that are there under other names stay as they are.

    Args:
        run: The run folder.
        repository: ORG/NAME; it is made where it is missing.
        candidate: Its number; None for the winner.
        public: Let everyone see a repository that is made, or take one that everyone sees.
        message: Of the commit.
        dry_run: Send nothing, list what would go up.
        report: Is told of what takes long.

    Returns:
        What was uploaded and where it is, or what would be, as text.

    Raises:
        BadInput: The run, the candidate, the name or the token does not serve.
        ServiceError: The Hub cannot be reached, or fails; the same command goes on.
    """
    if not is_hub_id(repository) or "@" in repository:
        raise BadInput(f"{one_line(repository)}: write it as ORG/NAME, with your name or your organisation's first")
    folder = RunFolder.existing(run)
    chosen = find_candidate(folder, candidate)
    if chosen.state != "done":
        raise RunError(f"{run}: candidate {chosen.number} has no scores ({chosen.state}: {chosen.failure})")
    if dry_run:
        files = _files(folder, _checkpoint(folder, chosen, report), chosen)
        return f"{_listing(files)}\n\nNothing was sent. Without --dry-run this goes to {repository}."
    with _hub_errors(repository):
        api = _api()
        before = _look(api, repository, public)
    files = _files(folder, _checkpoint(folder, chosen, report), chosen)
    text = message or f"Candidate {chosen.number} of the search {folder.spec.name}, merged with EvoMerge"
    with _hub_errors(repository):
        uploaded = _upload(api, before, files, chosen, text)
    if public and before.private:
        uploaded += "\nit stays private: only its settings on the Hub make a repository public that is there"
    return uploaded


def _checkpoint(folder: RunFolder, candidate: Candidate, report: Callable[[str], None]) -> Path:
    """The candidate's checkpoint in the run's `best/`, written if it is not there."""
    path = folder.root / "best" / f"candidate-{candidate.number}"
    if not path.exists():
        report(f"writing candidate {candidate.number} to {path}")
        path.parent.mkdir(exist_ok=True)
        report(export_candidate(folder.root, path, candidate=candidate.number))
    else:
        _check_kept(path, folder, candidate)
    return path


def _check_kept(path: Path, folder: RunFolder, candidate: Candidate) -> None:
    """Raises BadInput where a checkpoint is not whole, or another candidate's."""
    again = "without the folder, it is written again"
    missing = [name for name in ("README.md", "recipe.yaml") if not (path / name).is_file()]
    if missing:
        raise RunError(f"{path}: no {' and no '.join(missing)}; {again}")
    if load_recipe(path / "recipe.yaml").digest != whole_recipe(folder.candidates(), candidate).digest:
        raise RunError(f"{path / 'recipe.yaml'}: is not that of candidate {candidate.number}; {again}")
    open_checkpoint(str(path))


def _files(folder: RunFolder, checkpoint: Path, candidate: Candidate) -> Files:
    """All that goes up. Hidden files, and links, are no part of a checkpoint."""
    texts = PublicTexts(folder)
    files: dict[str, Path | bytes] = {}
    for at, folders, names in os.walk(checkpoint):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        paths = (Path(at) / name for name in sorted(names) if not name.startswith("."))
        ordinary = (path for path in paths if path.is_file() and not path.is_symlink())
        files |= {path.relative_to(checkpoint).as_posix(): path for path in ordinary}
    for name in _OURS:
        if name in files or name == "README.md":
            files[name] = texts.text(read_text(checkpoint / name, RunError)).encode()
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = _without_origin(checkpoint / "tokenizer_config.json")
    files["README.md"] = _with_companions(files["README.md"], any(n.startswith("./") for n in texts.local.values()))
    files["search.yaml"] = texts.search_yaml(candidate.number).encode()
    files["report.html"] = _report(folder, texts, candidate.number).encode()
    return dict(sorted(files.items()))


def _without_origin(path: Path) -> bytes:
    """A tokenizer's configuration without the folder that it was once loaded from."""
    content = path.read_bytes()
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        return content
    origin = settings.get("name_or_path") if isinstance(settings, dict) else None
    if not (isinstance(origin, str) and Path(origin).is_absolute()):
        return content
    del settings["name_or_path"]
    return json.dumps(settings, indent=2, ensure_ascii=False).encode()


def _with_companions(card: Path | bytes, local: bool) -> bytes:
    """A card with what lies beside it in the repository."""
    assert isinstance(card, bytes)
    more = (
        "\n## Beside it\n\n`report.html` has the search in pictures (download it and open it), `search.yaml` is its "
        "specification, for `evomerge run search.yaml`."
    )
    here = " In both, and in the recipe, `./NAME` is a model or a file that its author had." if local else ""
    return card.rstrip() + f"\n{more}{here}\n".encode()


def _report(folder: RunFolder, texts: PublicTexts, candidate: int) -> str:
    """The report's page; what is Plotly's in it stays as it is."""
    data = read_run(folder.root)
    clean = replace(
        data,
        folder=f"runs/{folder.spec.name}",
        history=tuple(replace(c, failure=texts.message(c.failure)) for c in data.history),
        random_history=tuple(replace(c, failure=texts.message(c.failure)) for c in data.random_history),
        search_yaml=texts.search_yaml(candidate),
    )
    page = report_page(clean)
    start = page.index("<script>")
    end = page.index("</script>", start)
    return texts.text(page[:start]) + page[start:end] + texts.paths(page[end:])


def _listing(files: Files) -> str:
    sizes = {name: _size(content) for name, content in files.items()}
    rows = [[name, _bytes_text(size)] for name, size in sizes.items()]
    return table(["file", "size"], [*rows, [f"{len(files)} files", _bytes_text(sum(sizes.values()))]])


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _bytes_text(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _api() -> HfApi:
    """The Hub's client, with the token of whoever is logged in."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so that nothing goes to the Hub: unset it")
    api = HfApi(library_name="evomerge")
    role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise BadInput(f"the Hub's token may only read: make one that may write, at {_TOKENS}, and log in with it")
    return api


def _look(api: HfApi, repository: str, public: bool) -> _Repository:
    """What is there already; what everyone sees is not pushed to unasked."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return _Repository(repository, None, not public)
    if not info.private and not public:
        raise BadInput(f"{repository} is there, and everyone can see it: --public pushes to it all the same")
    return _Repository(repository, info.sha or "", bool(info.private))


def _upload(api: HfApi, before: _Repository, files: Files, candidate: Candidate, message: str) -> str:
    from huggingface_hub import CommitOperationAdd

    repository = before.name
    if before.commit is None:
        api.create_repo(repository, private=before.private, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = api.create_commit(repository, operations, commit_message=message)
    visible = "private" if before.private else "public"
    total = _bytes_text(sum(_size(content) for content in files.values()))
    lines = [f"candidate {candidate.number} is at {api.endpoint}/{repository} ({visible}): {len(files)} files, {total}"]
    if before.commit is None:
        pass
    elif commit.oid == before.commit:
        lines.append(f"it was there already, the same to the last byte: no new commit after {commit.oid[:7]}")
    else:
        lines.append(
            f"the repository was there: this is commit {commit.oid[:7]}; files of other names are as they were"
        )
    return "\n".join(lines)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """What the Hub or the way to it refuses, in our words."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    network = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)  # the first is that of its HTTP library
    try:
        yield
    except EvoMergeError:
        raise
    except LocalTokenNotFoundError:
        raise BadInput(
            f"no token of the Hub: `hf auth login`, or HF_TOKEN, with one that may write ({_TOKENS})"
        ) from None
    except HFValidationError as error:
        raise BadInput(f"{repository}: no name of a repository: {one_line(str(error), 400)}") from None
    except Exception as error:
        chain = list(_causes(error))
        refused = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
        said = one_line(printable(str(error)), 400)
        if refused is not None and getattr(refused, "response", None) is not None:
            of_card = isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError)
            raise _refusal(repository, refused, said if of_card else "") from None
        if any(isinstance(e, network) for e in chain):
            raise ServiceError(f"the Hub cannot be reached; the same command goes on from here ({said})") from None
        if isinstance(error, RuntimeError | ValueError):  # of its storage; of an answer that is none
            raise ServiceError(
                f"{repository}: the upload failed; the same command goes on from here ({said})"
            ) from None
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refusal(repository: str, error: Any, said: str) -> BadInput:
    """An answer with an error's status."""
    status = error.response.status_code
    said = said or one_line(printable(error.server_message or str(error)), 400)
    organisation = repository.partition("/")[0]
    refused = functools.partial(_with_reason, said=said)
    if status == 401:
        return refused(f"the Hub does not take the token: log in again (`hf auth login`), or mend HF_TOKEN ({_TOKENS})")
    if status == 403:
        return refused(
            f"the token may not write to {repository}: it needs that right, and its owner a part in {organisation}"
        )
    if status == 404:
        return refused(f"{repository}: the Hub has no such name, or the token may not see it")
    if status in (409, 412):
        return ServiceError(f"{repository}: somebody else wrote to it just now: run the command again ({said})")
    if status < 500 and status not in (408, 429):
        return refused(f"{repository}: the Hub refused it, with status {status}")
    return ServiceError(f"the Hub has trouble (status {status}); the same command goes on from here ({said})")


def _with_reason(text: str, said: str) -> BadInput:
    return BadInput(f"{text}. It says: {said}" if said else text)
