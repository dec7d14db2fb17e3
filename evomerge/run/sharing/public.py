"""What a run's texts say to others: no path, host or secret, and the search as one can repeat it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from evomerge.checkpoints.reference import split_adapter
from evomerge.run.folder import RunFolder
from evomerge.spec.load import shipped_folder
from evomerge.system.secrets import masked

_PRIVATE_HOSTS = (".local", ".internal", ".intranet", ".lan", ".corp", ".home", ".localdomain", ".arpa")
_PATH = re.compile(r"(?<![\w.:~/-])/(?:[^\s/'\"]+/)+([^\s/'\"]+)")
_SHIPPED = ("eval", "search_spaces")
_SECTIONS = ("name", "models", "space", "evaluation", "search")  # `run` is about this machine


class PublicTexts:
    """Rewrites texts of a run: its own models and files become ``./NAME``, the rest of the disk is not named.

    Args:
        folder: The run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._root = folder.root
        self._spec = folder.spec

    @cached_property
    def local(self) -> dict[str, str]:
        """What the search names on this machine (files, folders, endpoints), and what others read in its place."""
        models = self._spec.models
        names: dict[str, str] = {}
        for name, reference in [*models.sources.items(), *([("base", models.base)] if models.base else [])]:
            base, adapter = split_adapter(reference, None)
            if adapter is None and Path(base).is_absolute():
                names.setdefault(base, f"./{name}")
        for key, text in _strings(self._spec.model_dump(include=set(_SECTIONS))):
            if key == "endpoint":
                names[text] = _public_endpoint(text)
            for path in _paths(text):
                names.setdefault(path, _free(path, set(names.values())))
        return names

    @cached_property
    def _replacements(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        """Patterns and what takes their place: the longest first, as texts, JSON and HTML write them."""
        pairs = self.local | {str(self._root.resolve()): f"runs/{self._spec.name}"}
        if len(home := str(Path.home())) > 1:
            pairs.setdefault(home, "~")
        forms = [
            (form, public)
            for before, public in sorted(pairs.items(), key=lambda pair: -len(pair[0]))
            for form in dict.fromkeys((before, json.dumps(before)[1:-1], html.escape(before, quote=True)))
        ]
        return tuple(
            (re.compile(rf"(?<![A-Za-z0-9/]){re.escape(form)}(?![\w-]|\.\w)"), public.replace("\\", r"\\"))
            for form, public in forms
        )

    def paths(self, text: str) -> str:
        """Replaces what the search names on this machine, and the user's home."""
        for pattern, public in self._replacements:
            text = pattern.sub(public, text)
        return text

    def text(self, text: str) -> str:
        """Does the same, and takes out secrets."""
        return masked(self.paths(text))

    def message(self, text: str | None) -> str | None:
        """Makes an error's message public: of any path in it the last part is left."""
        return None if text is None else _PATH.sub(r"\1", self.text(text))

    def search_yaml(self, candidate: int) -> str:
        """Writes the resolved specification, but for what is about this machine."""
        content = self._spec.model_dump(include=set(_SECTIONS), exclude_none=True)
        heading = f"# The search that made this model, its candidate {candidate}: evomerge run search.yaml\n"
        if any(name.startswith("./") for name in self.local.values()):
            heading += "# ./NAME is a model or a file that its author had: put yours there.\n"
        return heading + masked(yaml.safe_dump(self._mapped(content), sort_keys=False, allow_unicode=True))

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.paths(value)
        if isinstance(value, Mapping):
            return {key: self._mapped(inner) for key, inner in value.items()}
        return [self._mapped(inner) for inner in value] if isinstance(value, list) else value


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a specification with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _paths(text: str) -> list[str]:
    """The absolute paths that a value of a specification is made of: a path, base+adapter, or FILE.py:NAME."""
    if "\n" in text:
        return []
    base, adapter = split_adapter(text, None)
    parts = [re.sub(r"(\.py):\w+$", r"\1", part) for part in (base, adapter or "")]
    return [part for part in parts if Path(part).is_absolute()]


def _free(path: str, taken: set[str]) -> str:
    """A name for a path: from the shipped files where it is one, else its last part, numbered where that is taken."""
    if any(Path(path).is_relative_to(shipped_folder() / name) for name in _SHIPPED):
        return Path(path).relative_to(shipped_folder()).as_posix()
    stem, suffix = Path(path).stem, Path(path).suffix
    names = (f"./{stem}{f'-{k}' if k > 1 else ''}{suffix}" for k in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _public_endpoint(url: str) -> str:
    """A server that the world can reach, as it is; of any other only that there is one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        public = ip_address(host).is_global
    except ValueError:
        public = "." in host and not host.endswith(_PRIVATE_HOSTS)
    port = f":{parts.port}" if parts.port else ""
    return url if public else f"{parts.scheme}://localhost{port}{parts.path}"
