"""The reference pages, from what the code declares: keys of searches and recipes, methods, algorithms, commands.

    python -m tools.docs.reference docs/reference

`make docs` does it before it builds the site.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.cli.main import app
from evomerge.methods.registry import METHODS, STAGES
from evomerge.recipe.json_schema import recipe_schema
from evomerge.spec.schema import search_schema

_DEPTH = 6  # of headings and of what is nested


def search_page() -> str:
    """Writes the page of search.yaml: a table for each section."""
    schema = search_schema()
    parts = [
        "# search.yaml\n",
        "`evomerge check FILE` finds what is wrong with one; `evomerge schema search` prints this for editors.\n",
        _section("At the top", schema, schema),
    ]
    for key in ("models", "space", "evaluation", "search", "run"):
        parts += _sections(key, schema["properties"][key], schema, 2)
    return "\n".join(parts)


def _sections(path: str, value: Mapping[str, Any], schema: Mapping[str, Any], depth: int) -> list[str]:
    """The section at a key, and those inside it."""
    if depth > _DEPTH:
        return []
    parts = []
    for name in dict.fromkeys(_references(value)):
        section = schema["$defs"][name]
        section = next((form for form in section.get("anyOf", ()) if "properties" in form), section)
        if "properties" not in section:
            continue
        parts.append(_section(f"`{path}`", section, schema, depth))
        for key, inner in section["properties"].items():
            parts += _sections(f"{path}.{key}", inner, schema, depth + 1)
    return parts


def _section(title: str, section: Mapping[str, Any], schema: Mapping[str, Any], depth: int = 2) -> str:
    required = section.get("required", ())
    rows = [
        [f"`{key}`", _type(value, schema), _default(key, value, required), value["description"]]
        for key, value in section["properties"].items()
    ]
    return f"{'#' * min(depth, 4)} {title}\n\n{_table(['key', 'what', 'default', 'meaning'], rows)}\n"


def _references(value: Any) -> Iterable[str]:
    """The sections that a value's schema refers to."""
    if isinstance(value, Mapping):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _type(value: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in value:
        return ", ".join(dict.fromkeys(_type(form, schema) for form in value["anyOf"] if form.get("type") != "null"))
    if "$ref" in value:
        return "mapping, below"
    if "enum" in value or "const" in value:
        choices = value.get("enum", [value.get("const")])
        return " \\| ".join(f"`{choice}`" for choice in choices) if len(choices) <= 5 else "one of a list"
    kind = value.get("type", "anything")
    if kind == "array":
        inner = _type(value.get("items", {}), schema)
        return f"list of {inner}"
    low = value.get("minimum", value.get("exclusiveMinimum"))
    high = value.get("maximum", value.get("exclusiveMaximum"))
    if low is not None and abs(low) < 10**9:
        upper = f" to {high:g}" if high is not None and high < 10**5 else " or more"
        return f"{kind}, {low:g}{upper}"
    return kind if isinstance(kind, str) else " or ".join(kind)


def _default(key: str, value: Mapping[str, Any], required: Sequence[str]) -> str:
    if key in required:
        return "required"
    default = value.get("default")
    return "" if isinstance(default, dict) or default in (None, []) else f"`{json.dumps(default)}`"


def recipe_page() -> str:
    """Writes the page of recipes: the keys, and every parameter with the methods that have it."""
    schema = recipe_schema()
    top = [[f"`{key}`", value.get("description", "")] for key, value in schema["properties"].items()]
    parameters = [
        [f"`{name}`", value["description"]] for name, value in schema["properties"]["parameters"]["properties"].items()
    ]
    return (
        "# Recipes\n\nA superset of mergekit's configurations; `evomerge check FILE` finds what is wrong with one.\n\n"
        f"## Keys\n\n{_table(['key', 'meaning'], top)}\n\n## Parameters\n\n"
        f"{schema['properties']['parameters']['description']}\n\n{_table(['parameter', 'meaning'], parameters)}\n"
    )


def methods_page() -> str:
    """Writes the page of merge methods, stages and algorithms."""
    parts = ["# Methods and algorithms\n"]
    for method in METHODS.values():
        names = ", ".join(f"`{alias}`" for alias in method.aliases)
        parts.append(
            f"## {method.name}\n\n{method.summary}{f' Also called {names}.' if names else ''}\n\n{method.paper}\n"
        )
        parts.append(_parameters(method.parameters))
    for stage in STAGES.values():
        parts.append(f"## After a merge: {stage.name}\n\n{stage.summary}\n\n{_parameters(stage.parameters)}")
    rows = [
        [f"`{name}`", _first_sentence(entry.propose), ", ".join(f"`{k}: {v}`" for k, v in entry.options.items())]
        for name, entry in ALGORITHMS.items()
    ]
    parts.append(f"## Search algorithms\n\n{_table(['algorithm', 'what it does', 'options'], rows)}\n")
    return "\n".join(parts)


def _parameters(parameters: Sequence[Any]) -> str:
    rows = [
        [
            f"`{p.name}`",
            "required" if p.required else "" if p.default is None else f"`{p.default}`",
            "each source" if p.per_source else "all",
            f"{p.gene[0]:g} to {p.gene[1]:g}" if p.gene else "",
            p.help,
        ]
        for p in parameters
    ]
    return f"{_table(['parameter', 'default', 'one for', 'searched', 'meaning'], rows)}\n" if rows else ""


def _first_sentence(function: Any) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def commands_page() -> str:
    """Writes the page of the command line."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line\n"]
    for name, command in group.commands.items():
        rows = [[_spelling(parameter), getattr(parameter, "help", "") or ""] for parameter in command.params]
        parts.append(f"## evomerge {name}\n\n{command.help or ''}\n\n{_table(['argument', 'meaning'], rows)}\n")
    return "\n".join(parts)


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(str(cell).split()) for cell in cells)} |"

    escaped = [[cell.replace("\\|", "|").replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, escaped)])


PAGES = {"search": search_page, "recipe": recipe_page, "methods": methods_page, "commands": commands_page}


def main() -> None:
    """Writes every page into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (out / f"{name}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
