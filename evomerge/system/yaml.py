"""YAML for files that people write: duplicate keys are errors, and every error knows its line.

Two things differ from PyYAML's safe loader. A mapping key is always text, so that ``on:`` is the word. A number
such as ``1e-5`` is a number, although YAML 1.1 asks for a dot in it. And a document has limits that nobody's file
meets: of its size, its depth, and of what its aliases stand for when they are written out.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any, NoReturn

import yaml

from evomerge.errors import BadInput

_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
MOST_YAML = 4 * 2**20
"""Bytes of a file."""
_MOST_NODES = 200_000
_DEEPEST = 100
_SHORT_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def get_single_node(self) -> Any:
        return _limited(super().get_single_node())

    def get_node(self) -> Any:
        return _limited(super().get_node())

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.tag == _MERGE:
                continue
            key.tag = _TEXT
            line = key.start_mark.line + 1
            if key.value in first:
                text = f"the key '{key.value}' is given twice (first in line {first[key.value]}): keep one"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            first[key.value] = line
        return super().construct_mapping(node, deep)


def _limited(root: yaml.Node | None) -> yaml.Node | None:
    """Refuses a document whose aliases lead back to what holds them, or stand for more than anybody writes."""
    measured: dict[int, tuple[int, int] | None] = {}

    def refuse(node: yaml.Node, text: str) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, text, node.start_mark)

    def measure(node: yaml.Node) -> tuple[int, int]:
        """Counts the values in a node, and how deep they are, aliases written out."""
        if id(node) in measured:
            return measured[id(node)] or refuse(node, "an alias stands for what it is in")
        measured[id(node)] = None
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = [measure(part) for part in parts] if isinstance(parts, list) else []
        size, depth = 1 + sum(n for n, _ in inside), 1 + max((d for _, d in inside), default=0)
        if size > _MOST_NODES or depth > _DEEPEST:
            refuse(node, f"with its aliases written out it has over {_MOST_NODES} values, or is over {_DEEPEST} deep")
        measured[id(node)] = size, depth
        return size, depth

    if root is not None:
        measure(root)
    return root


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SHORT_FLOAT, list("-+0123456789"))


def read_yaml(text: str, where: str, error: type[BadInput]) -> Any:
    """Reads one YAML document.

    Args:
        text: The document.
        where: The name of the file, for messages.
        error: Which of our errors to raise.

    Returns:
        Plain Python values; None for an empty document.

    Raises:
        BadInput: `error`, for text that is no YAML (with the line), duplicate keys, or several documents.
    """
    documents = read_documents(text, where, error)
    if len(documents) > 1:
        raise error(f"{where}: has {len(documents)} documents (separated by ---), expected one")
    return documents[0] if documents else None


def read_documents(text: str, where: str, error: type[BadInput]) -> list[Any]:
    """Reads every YAML document of a text, those that are empty left out; see `read_yaml`.

    Raises:
        BadInput: `error`, for text that is no YAML (with the line), or duplicate keys.
    """
    try:
        return [d for d in yaml.load_all(text, Loader=_Loader) if d is not None]
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise error(f"{where}{line}: not valid YAML: {problem.problem or problem.context}") from None
    except yaml.YAMLError as problem:
        raise error(f"{where}: not valid YAML: {' '.join(str(problem).split())}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as problem:
        # An impossible date, a number with too many digits, a value that is not what its tag says.
        raise error(f"{where}: not valid YAML: {problem}") from None
    except RecursionError:
        raise error(f"{where}: not valid YAML: nested too deeply") from None


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    """Lists of plain values on one line, as people write gradients and ranges."""
    flow = not any(isinstance(entry, list | dict) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    """Unicode's own line breaks are escaped; PyYAML would write them raw, and read them back as something else."""
    style = '"' if any(character in data for character in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(_TEXT, data, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _SHORT_FLOAT, list("-+0123456789"))


def write_yaml(data: Any) -> str:
    """Writes plain values as YAML that `read_yaml` reads back as the same, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)


def write_documents(documents: Iterable[Any]) -> str:
    """Writes several YAML documents that `read_documents` reads back as the same."""
    return "---\n".join(write_yaml(document) for document in documents)
