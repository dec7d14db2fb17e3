"""Reading a ``parameters:`` mapping, checked against what the methods in use declare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evomerge.errors import ErrorCollector, describe, suggest
from evomerge.methods.contract import Method, Parameter
from evomerge.methods.registry import STAGES
from evomerge.recipe.settings import Conditional, Gradient, Parameters, Scalar, Setting
from evomerge.recipe.validation import choice_at, integer_at, join, number_at, text_at

# What a recipe may set beside a method's own parameters. `int8_mask` (mergekit's way to save memory) changes nothing
# here; `embed_slerp` merges embeddings and head by SLERP under a tokenizer source.
EMBED_SLERP = "embed_slerp"
EVERYWHERE = (Parameter("int8_mask", default=False, kind="bool"), Parameter(EMBED_SLERP, default=False, kind="bool"))
RESIDUAL_SCALE = Parameter("residual_scale", default=1.0)
LAYOUT_NAMES = ("pattern", "seed")  # of methods that copy layers: about the order of layers, not about any tensor


def parameters_at(
    errors: ErrorCollector,
    path: str,
    value: Any,
    used: Sequence[Method],
    every: Iterable[Method],
    of_source: bool = False,
) -> Parameters:
    """Reads one level's parameters.

    Args:
        errors: Takes the problems and warnings.
        path: Where the mapping stands.
        value: The mapping as YAML has it, or None.
        used: The methods that read this level; empty when the method is unknown (an error of its own).
        every: All methods: a parameter that only another one knows is a warning.
        of_source: The level is a source's: a parameter that is one for the tensor has no effect there, a warning.
    """
    if value is None:
        return Parameters()
    if not isinstance(value, Mapping):
        errors.error(path, f"expected a mapping of parameter names to values, got {describe(value)}")
        return Parameters()
    result: dict[str, Setting] = {}
    for key, entry in value.items():
        name = "on" if key is True else str(key)  # other YAML readers take the word `on` for a truth value
        setting = _entry(errors, join(path, name), name, entry, used, tuple(every), of_source)
        if setting is not None:
            result[name] = setting
    return Parameters(result)


def _entry(
    errors: ErrorCollector,
    path: str,
    name: str,
    entry: Any,
    used: Sequence[Method],
    every: tuple[Method, ...],
    of_source: bool,
) -> Setting | None:
    if name in LAYOUT_NAMES and any(method.copies_layers for method in used):
        if path != f"parameters.{name}":
            errors.error(path, f"is one for the recipe: put it under 'parameters:' at the top as '{name}: {entry}'")
        return text_at(errors, path, entry) if name == "pattern" else integer_at(errors, path, entry, 0)
    declarations = _declarations(name, used)
    if not declarations and not _of_another_method(errors, path, name, used, every):
        return None
    if of_source and declarations and not any(parameter.per_source for parameter in declarations):
        errors.warn(
            path, f"has no effect: '{name}' is one for all sources, so it belongs under 'parameters:' further up"
        )
    if remarks := {p.remark for p in declarations if p.remark and (of_source or not (p.per_source and p.only_ratios))}:
        errors.warn(path, "; ".join(sorted(remarks)))
    settings = [setting_at(errors, path, entry, rule) for rule in declarations] or [
        setting_at(errors, path, entry, None)
    ]
    return settings[0]


def _declarations(name: str, used: Sequence[Method]) -> list[Parameter]:
    """One declaration for each different rule that methods have for a parameter."""
    return list(
        {(p.kind, p.choices, p.low, p.high): p for method in used for p in declared(method) if p.name == name}.values()
    )


def declared(method: Method) -> tuple[Parameter, ...]:
    """Returns the parameters that a recipe may set for a tensor under a method."""
    own = tuple(p for p in method.parameters if p.name not in LAYOUT_NAMES)
    names = {p.name for p in own}
    extra = (*EVERYWHERE, RESIDUAL_SCALE) if method.copies_layers else EVERYWHERE
    return own + tuple(p for p in extra if p.name not in names)


def _of_another_method(
    errors: ErrorCollector, path: str, name: str, used: Sequence[Method], every: tuple[Method, ...]
) -> bool:
    others = [m.name for m in every if m.parameter(name) or (name in LAYOUT_NAMES and m.copies_layers)]
    if others:
        if used and name == "seed":
            errors.warn(path, "has no effect here: 'seed' stands at the top of a recipe")
        elif used:
            verb = "method" if len(used) == 1 else "methods"
            errors.warn(path, f"has no effect: {verb} {_names(used)} does not know it ({', '.join(others)} would)")
        return True
    stage = next((stage.name for stage in STAGES.values() if any(p.name == name for p in stage.parameters)), None)
    if stage is not None:
        errors.error(path, f"is of the stage '{stage}', which the recipe does not have: write 'after: [{stage}]'")
        return False
    names = sorted({p.name for method in used or every for p in declared(method)})
    anywhere = sorted({p.name for method in every for p in declared(method)})
    hint = suggest(name, names) or suggest(name, anywhere)
    listing = f": {_names(used)} knows {', '.join(names)}" if used and not hint else ""
    errors.error(path, f"no method knows this parameter{hint}{listing}")
    return False


def _names(used: Sequence[Method]) -> str:
    return ", ".join(dict.fromkeys(method.name for method in used))


def setting_at(errors: ErrorCollector, path: str, value: Any, parameter: Parameter | None) -> Setting | None:
    """Reads a scalar, a gradient or conditionals; `parameter` None checks the shape alone."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        entries = [_conditional_at(errors, f"{path}[{i}]", entry, parameter) for i, entry in enumerate(value)]
        return tuple(entry for entry in entries if entry is not None)
    return _value_at(errors, path, value, parameter)


def _conditional_at(errors: ErrorCollector, path: str, entry: Any, parameter: Parameter | None) -> Conditional | None:
    if not isinstance(entry, Mapping):
        errors.error(path, f"expected a mapping with 'value' and 'filter' like its neighbours, got {describe(entry)}")
        return None
    unknown = [str(key) for key in entry if key not in ("filter", "value")]
    for key in unknown:
        hint = suggest(key, ("filter", "value"))
        errors.error(join(path, key), f"unknown key{hint or ': a conditional has filter and value'}")
    if entry.get("value") is None:
        errors.error(path, "a conditional needs a 'value'")
        return None
    pattern = entry.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        errors.error(join(path, "filter"), f"expected a part of tensor names as text, got {describe(pattern)}")
        return None
    value = _value_at(errors, join(path, "value"), entry["value"], parameter)
    return None if value is None else Conditional(value, pattern)


def _value_at(errors: ErrorCollector, path: str, value: Any, parameter: Parameter | None) -> Scalar | Gradient | None:
    if not isinstance(value, list | tuple):
        return _scalar_at(errors, path, value, parameter)
    if not value:
        errors.error(path, "is an empty list: a gradient needs at least one value")
        return None
    if parameter is not None and parameter.kind == "int":
        errors.error(path, "is a whole number and takes no gradient")
        return None
    entries = [_scalar_at(errors, f"{path}[{i}]", entry, parameter) for i, entry in enumerate(value)]
    return tuple(entry for entry in entries if entry is not None) or None


def _scalar_at(errors: ErrorCollector, path: str, value: Any, parameter: Parameter | None) -> Scalar | None:
    if parameter is None:
        if isinstance(value, bool | str):
            return value
        return number_at(errors, path, value)
    if parameter.kind == "text":
        return text_at(errors, path, value)
    if parameter.kind == "choice":
        return choice_at(errors, path, value, parameter.choices)
    if parameter.kind == "bool":
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        errors.error(path, f"expected true or false, got {describe(value)}")
        return None
    if parameter.kind == "int":
        number: float | int | None = _whole(errors, path, value)
    else:
        number = number_at(errors, path, value)
    return None if number is None else _within(errors, path, number, parameter)


def _whole(errors: ErrorCollector, path: str, value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    errors.error(path, f"expected a whole number, got {describe(value)}")
    return None


def _within(errors: ErrorCollector, path: str, number: float | int, parameter: Parameter) -> float | int | None:
    low, high = parameter.low, parameter.high
    if (low is None or number >= low) and (high is None or number <= high):
        return number
    if low is not None and high is not None:
        rule = f"between {low:g} and {high:g}"
    else:
        rule = f"at least {low:g}" if low is not None else f"at most {high:g}"
    errors.error(path, f"must be {rule}, got {number}")
    return None
