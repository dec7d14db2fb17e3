"""Reading typed values out of plain YAML data, collecting every problem instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evomerge.errors import ErrorCollector, describe, is_number, show, suggest

LARGEST = 1e30
"""The largest magnitude of a number in a recipe: weights are added, and float32 ends at 3.4e38."""


def join(path: str, key: str) -> str:
    """Returns the path of a key inside the mapping at `path`."""
    return f"{path}.{key}" if path else key


def mapping_at(
    errors: ErrorCollector, path: str, value: Any, allowed: Iterable[str], parameters: Iterable[str] | None = None
) -> dict[str, Any]:
    """Returns the mapping at a path without its empty entries; reports anything else, and keys that are not known.

    Args:
        errors: Takes the problems.
        path: Where the value stands.
        value: What should be a mapping.
        allowed: The keys that it may have.
        parameters: Where given, a key that neither resembles a known one nor is one of these is passed over with a
            warning, as mergekit does: people keep anchors and remarks there, in characters that can be read.
    """
    if not isinstance(value, Mapping):
        errors.error(path, f"expected a mapping, got {describe(value)}")
        return {}
    names = tuple(allowed)
    for key in value:
        if key in names:
            continue
        at, near = join(path, str(key)), suggest(str(key), names)
        if parameters is not None and not near and str(key) not in parameters and str(key).isprintable():
            errors.warn(at, "is passed over, as in mergekit: it is no key of a recipe")
        else:
            errors.error(at, f"unknown key{near or ': known are ' + ', '.join(names)}")
    return {key: entry for key, entry in value.items() if key in names and entry is not None}


def list_at(errors: ErrorCollector, path: str, value: Any) -> list[Any]:
    """Returns the list at a path, which has to have entries."""
    if not isinstance(value, list | tuple):
        errors.error(path, f"expected a list, got {describe(value)}")
        return []
    if not value:
        errors.error(path, "is empty: give at least one entry")
    return list(value)


def text_at(errors: ErrorCollector, path: str, value: Any) -> str | None:
    """Returns the text at a path, which must not be empty."""
    if not isinstance(value, str):
        errors.error(path, f"expected text, got {describe(value)}")
        return None
    if not value.strip():
        errors.error(path, "is empty text")
        return None
    return value


def number_at(errors: ErrorCollector, path: str, value: Any) -> float | int | None:
    """Returns the number at a path: finite, and so are sums and products of a few of them."""
    if not is_number(value):
        hint = ": remove the quotes" if isinstance(value, str) and _is_numeric(value) else ""
        errors.error(path, f"expected a number, got {describe(value)}{hint}")
        return None
    if not abs(value) <= LARGEST:
        errors.error(path, f"expected a finite number, got {show(value)}; {LARGEST:g} is the largest")
        return None
    number: float | int = value
    return number


def integer_at(errors: ErrorCollector, path: str, value: Any, low: int) -> int | None:
    """Returns the whole number at a path, at least `low`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        errors.error(path, f"expected a whole number, got {describe(value)}")
        return None
    if value < low:
        errors.error(path, f"must be at least {low}, got {value}")
        return None
    if value >= 2**63:
        errors.error(path, f"must be less than 2**63, got {show(value)}")
        return None
    return value


def choice_at(errors: ErrorCollector, path: str, value: Any, choices: tuple[str, ...]) -> str | None:
    """Returns the word at a path, one of a few."""
    if not isinstance(value, str):
        errors.error(path, f"expected one of {', '.join(choices)}, got {describe(value)}")
        return None
    if value not in choices:
        hint = suggest(value, choices)
        errors.error(path, f"expected one of {', '.join(choices)}, got '{value}'{hint}")
        return None
    return value


def _is_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def reference_at(errors: ErrorCollector, path: str, value: Any) -> str | None:
    """Returns a model reference: text, or mergekit's long form with ``model``, ``lora``, ``path`` and ``revision``."""
    if isinstance(value, str):
        return text_at(errors, path, value)
    if not isinstance(value, Mapping):
        errors.error(path, f"expected a model as text (folder, Hub id, base+adapter, zoo:NAME), got {describe(value)}")
        return None
    if "path" in value:
        return _path_at(errors, path, value)
    fields = mapping_at(errors, path, value, ("model", "lora", "override_architecture"))
    if "override_architecture" in fields:
        errors.error(join(path, "override_architecture"), "is not supported: layers are found by tensor names")
    if "model" not in fields:
        errors.error(join(path, "model"), "is missing")
        return None
    model = _path_at(errors, join(path, "model"), fields["model"])
    if "lora" not in fields or model is None:
        return model
    adapter = _path_at(errors, join(path, "lora"), fields["lora"])
    return None if adapter is None else f"{model}+{adapter}"


def _path_at(errors: ErrorCollector, path: str, value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return text_at(errors, path, value)
    fields = mapping_at(errors, path, value, ("path", "revision"))
    if "path" not in fields:
        errors.error(join(path, "path"), "is missing")
        return None
    name = text_at(errors, join(path, "path"), fields["path"])
    revision = text_at(errors, join(path, "revision"), fields["revision"]) if "revision" in fields else None
    return name if name is None or revision is None else f"{name}@{revision}"
