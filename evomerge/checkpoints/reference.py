"""What a model reference may be, and where it leads.

FOLDER                  a folder with config.json and weights
FILE.safetensors        one file of weights
ORG/NAME[@REVISION]     a model of the Hugging Face Hub
zoo:NAME                a shipped model
BASE+ADAPTER            any of these with a PEFT LoRA adapter (a folder or a Hub id) applied
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from evomerge.checkpoints.header import name_some
from evomerge.errors import CheckpointError
from evomerge.system.files import expand_home, resolve_path
from evomerge.zoo.models import ensure

ZOO = "zoo:"

_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.py", "*.yaml"]
_SMALL += ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_WEIGHTS = ["*.safetensors"]
# Folders hold a model in other forms, but for the numbered modules of an embedding model, such as 2_Dense.
_NOT_THE_MODEL = ["[!0-9]*/*.safetensors", "[!0-9]*/*.bin", "checkpoint-*/*", "onnx/*", "openvino/*", "coreml/*"]


def split_adapter(reference: str, beside: Path | None) -> tuple[str, str | None]:
    """Splits a `base+adapter` reference into ("base", "adapter"), any other into (reference, None).

    A plus sign may also be part of a name: what exists as written is taken as written, and of several plus signs the
    last one behind which an adapter lies.
    """
    if "+" not in reference or resolve_path(reference, beside) is not None:
        return reference, None
    splits = [(reference[:i], reference[i + 1 :]) for i in reversed(range(len(reference))) if reference[i] == "+"]
    splits = [(base.strip(), adapter.strip()) for base, adapter in splits]
    for base, adapter in splits:
        if adapter and resolve_path(adapter, beside) is not None:
            return base, adapter
    return splits[0]


def is_hub_id(reference: str) -> bool:
    """Tells whether a reference without an adapter reads as a model of the Hub."""
    return bool(_HUB.fullmatch(reference)) and not reference.endswith(".safetensors")


def resolve_reference(reference: str, beside: Path | None) -> str:
    """Makes the local paths of a reference absolute; Hub ids and ``zoo:`` names stay as they are.

    Args:
        reference: As written in a recipe.
        beside: The file or folder to look beside first; see `resolve_path`.
    """
    if reference.startswith(ZOO):
        return reference
    whole = resolve_path(reference, beside)
    if whole is not None:
        return str(whole)
    return "+".join(resolve_part(part, beside) for part in reference.split("+"))


def resolve_part(part: str, beside: Path | None) -> str:
    path = None if part.startswith(ZOO) else resolve_path(part, beside)
    return part if path is None else str(path)


def without_adapter(reference: str) -> str:
    """Gives what stands before the first plus sign: the model itself, where no name has a plus sign in it."""
    return reference.partition("+")[0].strip()


def find_model(reference: str, beside: Path | None, *, allow_pickle: bool = False, weights: bool = True) -> Path:
    """Finds the folder or file that a reference without an adapter leads to, downloaded if need be.

    Args:
        reference: What the user wrote.
        beside: The folder of the file it stands in.
        allow_pickle: Also download pickled weights.
        weights: Download weights at all; False for a tokenizer alone.

    Raises:
        CheckpointError: There is no such model; says where it was looked for and what is near.
    """
    if not reference.strip() or "\0" in reference:
        raise CheckpointError(f"not a model: {reference!r}")
    if reference.startswith(ZOO):
        return ensure(reference.removeprefix(ZOO))
    try:
        local = resolve_path(reference, beside)
    except OSError as error:
        raise CheckpointError(f"{reference} cannot be read: {error.strerror}") from error
    if local is not None:
        return local
    hub = _HUB.fullmatch(reference)
    looked = f"no such model: {reference!r}. Looked for a folder or file {_where(beside)}"
    if hub is None:
        raise CheckpointError(f"{looked}{_near(reference, beside)}")
    try:
        return _download(hub["id"], hub["revision"], _patterns(weights, allow_pickle))
    except Exception as error:  # the Hub client's errors differ between its versions (requests, httpx, its own)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{looked}, and for {reference!r} on the Hugging Face Hub ({reason}){_near(reference, beside)}"
        raise CheckpointError(message) from error


def _where(beside: Path | None) -> str:
    return f"beside and above {beside} and in the working directory" if beside else "in the working directory"


def _patterns(weights: bool, allow_pickle: bool) -> list[str]:
    """Lists the files of a repository to download."""
    return [*_SMALL, *(_WEIGHTS if weights else []), *(["*.bin"] if weights and allow_pickle else [])]


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_THE_MODEL))


def _near(reference: str, beside: Path | None) -> str:
    path = expand_home(reference)
    near: list[str] = []
    for root in _roots(path, beside):
        try:
            siblings = [entry.name for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
        except OSError:
            continue
        near += [str(path.parent / name) for name in difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)]
        if not near and path.parent != Path():
            near += [str(path.parent / name) for name in siblings]
    return f"; near it: {name_some(dict.fromkeys(near))}" if near else ""


def _roots(path: Path, beside: Path | None) -> Iterator[Path]:
    for start in (beside, Path.cwd()):
        if start is not None:
            for root in dict.fromkeys([start, *start.parents] if start == beside else [start]):
                if (root / path.parent).is_dir():
                    yield root / path.parent
                    break
