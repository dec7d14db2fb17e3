"""YAML for files that people write: duplicate keys are errors, and every error knows its line.

Two things differ from PyYAML's safe loader. A mapping key is always text, so that ``on:`` is the word. A number
such as ``1e-5`` is a number, although YAML 1.1 asks for a dot in it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any

import yaml

from evomerge.errors import BadInput

_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_SHORT_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
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
    except ValueError as problem:  # an impossible date, a number with too many digits
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
