"""JSON Schema of a search.yaml, for editors and for the reference: the sections, every key described."""

from __future__ import annotations

import copy
from typing import Any

from evomerge.methods.registry import METHODS, STAGES
from evomerge.spec.schema import SearchSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def search_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a search.yaml: every key with its description, type, range and default."""
    schema = SearchSpec.model_json_schema(by_alias=True)
    sections = {"SearchSpec": schema, **schema["$defs"]}
    for section in sections.values():
        for value in section["properties"].values():
            value.pop("title", None)
    named = {"type": "string", "description": "A task by its name or file."}
    for section in (name for name in ("Task", "Measure") if name in schema["$defs"]):
        whole = copy.deepcopy(schema["$defs"][section])
        whole.pop("required", None)  # a scorer has a name of its own
        schema["$defs"][section] = {"anyOf": [named, whole], "description": whole.get("description", "")}
    names = sorted({name for method in METHODS.values() for name in (method.name, *method.aliases)})
    space = schema["$defs"]["Space"]["properties"]
    space["methods"]["items"] = {"enum": names}
    space["after"]["items"] = {"enum": sorted(STAGES)}
    return {"$schema": DIALECT, **schema, "title": "search.yaml"}
