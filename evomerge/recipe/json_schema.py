"""JSON Schema of a recipe, for editors and for the reference: the keys, and the parameters that methods declare."""

from __future__ import annotations

from typing import Any

from evomerge.methods.contract import Parameter
from evomerge.methods.registry import METHODS, STAGES
from evomerge.recipe.reader import DTYPES

_REFERENCE = "a folder, a Hub id (ORG/NAME@REVISION), base+adapter, a .safetensors file, zoo:NAME"


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe: a superset of mergekit's configurations, every key with its description."""
    parameters = _parameters()
    text = {"type": "string"}
    reference = {"type": ["string", "object"]}  # mergekit writes it as a mapping, too
    model = {**reference, "description": f"The model: {_REFERENCE}."}
    method = {
        "enum": sorted({name for m in METHODS.values() for name in (m.name, *m.aliases)}),
        "description": "The merge method; `evomerge methods` says what each does.",
    }
    base = {**reference, "description": f"Where task vectors start: {_REFERENCE}."}
    source = _mapping({"model": model, "parameters": parameters}, ["model"])
    span = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0},
        "minItems": 2,
        "maxItems": 2,
        "description": "[first, last + 1] of the layers that are taken.",
    }
    part = _mapping({"model": model, "layer_range": span, "parameters": parameters}, ["model", "layer_range"])
    number = {"type": "number"}
    piece = _mapping(
        {
            "sources": {
                "type": "array",
                "items": part,
                "description": "The models' layers that it is made of.",
            },
            "base_model": base,
            "merge_method": method,
            "parameters": parameters,
            "residual_weight": {**number, "description": "Has no effect, as in mergekit."},
            "residual_scale": {
                "anyOf": [number, {"type": "array", "items": number}],
                "description": "Factor on what each layer of the slice adds to the residual stream.",
            },
        },
        ["sources"],
    )
    models = {"type": "array", "items": source, "description": "The models that are merged, whole."}
    slices = {"type": "array", "items": piece, "description": "Layers on top of each other, each merged by itself."}
    module = _mapping({"models": models, "slices": slices, "parameters": parameters})
    dtype = {"enum": [*DTYPES, *(f"torch.{name}" for name in DTYPES)]}
    some = {"anyOf": [text, {"type": "array", "items": text}]}
    properties = {
        "name": {**text, "description": "What later steps of the same file call this one."},
        "merge_method": method,
        "base_model": base,
        "models": models,
        "slices": slices,
        "modules": {
            "type": "object",
            "additionalProperties": module,
            "description": "Parts of a model with several stacks, each with models or slices of its own.",
        },
        "parameters": parameters,
        "input_model_parameters": {
            "type": "object",
            "additionalProperties": parameters,
            "description": "Parameters of a model wherever it is a source.",
        },
        "dtype": {
            **dtype,
            "description": "What is computed in; without out_dtype the output's type too.",
        },
        "out_dtype": {**dtype, "description": "What the output is stored in."},
        "tokenizer_source": {**text, "description": "Whose tokens the merge has: union, base, or a model."},
        "tokenizer": {"type": "object", "description": "The same with rules for single tokens, as in mergekit."},
        "chat_template": {**text, "description": "auto, a template's name, or Jinja."},
        "ignore": {**some, "description": "Tensors that are left out, by patterns of their names."},
        "take_from": {
            "type": "object",
            "additionalProperties": text,
            "description": "Tensors that are one model's: pattern of their names -> the model.",
        },
        "seed": {"type": "integer", "minimum": 0, "default": 0, "description": "Of the methods that draw."},
        "after": {
            "anyOf": [{"enum": sorted(STAGES)}, {"type": "array", "items": {"enum": sorted(STAGES)}}],
            "description": "Stages that follow the merge, in this order.",
        },
        "activations": {
            **reference,
            "description": "A file of mean inputs of the base, for the stages that ask: evomerge.mean_inputs makes it.",
        },
    }
    schema = _mapping(properties, ["merge_method"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "recipe.yaml", **schema}


def _mapping(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    more = {"required": required} if required else {}
    return {"type": "object", "additionalProperties": False, "properties": properties, **more}


def _parameters() -> dict[str, Any]:
    """The block of parameters: of every method and stage, with whose each is."""
    declared: dict[str, list[tuple[str, Parameter]]] = {}
    owners = [(m.name, m.parameters) for m in METHODS.values()] + [(s.name, s.parameters) for s in STAGES.values()]
    for name, parameters in owners:
        for parameter in parameters:
            declared.setdefault(parameter.name, []).append((name, parameter))
    properties = {name: _parameter(own) for name, own in sorted(declared.items())}
    properties["embed_slerp"] = {"type": "boolean", "description": "Merge the embeddings by SLERP."}
    return {
        **_mapping(properties),
        "description": "A number, a list of numbers (a gradient over the layers), or a list of {filter, value}.",
    }


def _parameter(declared: list[tuple[str, Parameter]]) -> dict[str, Any]:
    """One parameter's value in all its forms; methods that mean the same by it are named together."""
    meanings: dict[str, list[str]] = {}
    for owner, parameter in declared:
        meanings.setdefault(parameter.help, []).append(owner)
    first = declared[0][1]
    kinds = {"float": "number", "int": "integer", "bool": "boolean", "choice": "string", "text": "string"}
    types = sorted({kinds[parameter.kind] for _, parameter in declared})
    plain: dict[str, Any] = {"type": types if len(types) > 1 else types[0]}
    if all(parameter.choices for _, parameter in declared):
        plain = {"enum": sorted({choice for _, parameter in declared for choice in parameter.choices})}
    defaults = {parameter.default for _, parameter in declared}
    rule = _mapping({"filter": {"type": "string"}, "value": {"anyOf": [plain, {"type": "array", "items": plain}]}})
    return {
        "anyOf": [plain, {"type": "array", "items": {"anyOf": [plain, rule]}}],
        "description": " ".join(f"{', '.join(owners)}: {text}" for text, owners in meanings.items()),
        **({"default": first.default} if len(defaults) == 1 and first.default is not None else {}),
    }
