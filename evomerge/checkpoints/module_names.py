"""One name for each tensor, however a file names it: what transformers calls it in memory, or what fits by its place.

Files differ in what they put before a name (the model's own prefix, a tower's, a wrapper's of the training loop) and in
what older versions called a parameter. transformers' own renamings come first; where they say nothing, a prefix that
turns the names of one model into those of another is found by comparison.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.config_values import transformers_config
from evomerge.checkpoints.header import TensorSpec
from evomerge.errors import CandidateError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OLD_NORM = re.compile(r"(?i)(norm\w*)\.(gamma|beta)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")

_STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])  # experts first, then the rows of each

Shape = tuple[int, ...]


def model_class(config: Mapping[str, object]) -> Any:
    """Finds the class that config.json names, else the causal language model of its type.

    Raises:
        CandidateError: transformers has none.
    """
    import transformers

    named = config.get("architectures")
    for name in named if isinstance(named, list) else []:
        candidate = getattr(transformers, str(name), None)
        if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel):
            return candidate
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = type(transformers.AutoConfig.for_model(str(config["model_type"])))
    if kind not in mapping:
        raise CandidateError(f"the merged config.json names no model class: architectures is {named!r}")
    return mapping[kind]


def head_name(config: Mapping[str, object]) -> str:
    """Gives the name of the head of a model that ties it, as transformers has it; lm_head.weight where that says none.

    Args:
        config: Its config.json.
    """
    model: Any = _skeleton(_key(config))
    head = None if model is None else model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()} if head is not None else {}
    return f"{names[head]}.weight" if head in names else "lm_head.weight"


def matched_names(
    stored: Mapping[str, TensorSpec], reference: Mapping[str, TensorSpec], config: Mapping[str, object]
) -> dict[str, str]:
    """Finds what a model's tensors are called in another model, where the two name them otherwise.

    Args:
        stored: The tensors of the one.
        reference: Those of the other, or of an adapter's base.
        config: config.json of the other.

    Returns:
        Name -> the other's name, for tensors that have one that is not their own.
    """
    left = _by_place(name for name in stored if name not in reference)
    there = {without_number(name) for name in stored if name in reference}
    free = {place: names for place, names in _by_place(reference).items() if place not in there}
    if not left or not free:
        return {}
    places = _same_when_clean(left, free)
    rest, open_ = _unmatched(left, free, places)
    if rest and open_:
        places |= _same_in_memory(rest, open_, config, len(reference))
        rest, open_ = _unmatched(left, free, places)
    if rest and open_:
        places |= _moved(_shapes(rest, stored), _shapes(open_, reference))
    return {
        name: name_there
        for place, names in left.items()
        if place in places
        for name in names
        if (name_there := _numbered(places[place], name)) is not None
    }


def stacked_experts(
    names: Iterable[str], config: Mapping[str, object]
) -> tuple[dict[str, list[list[str]]], Callable[[str], str]]:
    """Finds which tensors of single experts transformers makes one of when it loads a model.

    Args:
        names: The tensors of a model that stores its experts one by one.
        config: config.json of a model of the kind.

    Returns:
        (the stacked tensor as it is called in memory -> for each part of its rows, the experts' tensors in order,
        what a stored tensor is called in memory). Nothing where transformers does not know the model.
    """
    names = list(names)
    model = _skeleton(_key(config), len(names))
    if model is None:
        return {}, str
    renamings, converters = _conversions(model)

    def rename(name: str) -> str:
        name = _clean(name)
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    stacking = [c for c in converters if [type(op).__name__ for op in c.operations] in _STACKING]
    groups: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        for converter in stacking:
            whole, pattern = converter.rename_source_key(rename(name))
            if pattern is not None:
                groups[whole][converter.source_patterns.index(pattern)].append(name)
                break
    stacks = {whole: [sorted(parts[k], key=_expert) for k in sorted(parts)] for whole, parts in groups.items()}
    return stacks, rename


def _expert(name: str) -> int:
    """The innermost number of a name."""
    return max((int(part) for part in name.split(".")[-3:] if part.isdecimal()), default=-1)


Places = dict[str, list[str]]
"""Names with their outermost number left open ("model.layers.*.mlp.up_proj.weight") -> the names themselves."""


def _by_place(names: Iterable[str]) -> Places:
    places: Places = defaultdict(list)
    for name in names:
        places[without_number(name)].append(name)
    return dict(places)


def without_number(name: str) -> str:
    """Leaves the outermost number of a name open: one text for a tensor of every layer."""
    return _NUMBER.sub("*", name, count=1)


def _numbered(place: str, name: str) -> str | None:
    """Puts a name's outermost number into a place; None where one of the two has none."""
    number = _NUMBER.search(name)
    if ("*" in place) != (number is not None):
        return None
    return place.replace("*", number[0], 1) if number else place


def _unmatched(left: Places, free: Places, matched: Mapping[str, str]) -> tuple[Places, Places]:
    rest = {place: names for place, names in left.items() if place not in matched}
    return rest, {place: names for place, names in free.items() if place not in matched.values()}


def _clean(name: str) -> str:
    """Takes wrappers out of a name, and what norms were called before they were called weight and bias."""
    plain = _WRAPPERS.sub("", name)
    return _OLD_NORM.sub(lambda m: f"{m[1]}.{'weight' if m[2].lower() == 'gamma' else 'bias'}", plain)


def _joined(left: Places, free: Places, rename: Callable[[str], str]) -> dict[str, str]:
    """Pairs places that one renaming gives the same name; a name that two of a side get pairs nothing."""
    sides = []
    for places in (left, free):
        renamed: dict[str, set[str]] = defaultdict(set)
        for place, names in places.items():
            for name in names:
                renamed[without_number(rename(name))].add(place)
        sides.append({name: next(iter(every)) for name, every in renamed.items() if len(every) == 1})
    one, other = sides
    return {place: other[name] for name, place in one.items() if name in other}


def _same_when_clean(left: Places, free: Places) -> dict[str, str]:
    return _joined(left, free, _clean)


def _same_in_memory(left: Places, free: Places, config: Mapping[str, object], count: int) -> dict[str, str]:
    """Pairs what the model that a config describes reads into one and the same parameter."""
    model = _skeleton(_key(config), count)
    if model is None:
        return {}
    rename = _renaming(model)
    return _joined(left, free, lambda name: rename(_clean(name)))


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers calls a stored tensor when it loads a model, experts one by one as they are stored."""
    renamings, converters = _conversions(model)
    there = {without_number(name) for name in model.state_dict()}
    prefix = model.base_model_prefix

    def rename(name: str) -> str:
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        whole = name
        for converter in converters:
            whole, pattern = converter.rename_source_key(name)
            if pattern is not None:
                break
        if prefix and without_number(whole) not in there:
            if without_number(f"{prefix}.{whole}") in there:
                return f"{prefix}.{name}"
            if without_number(whole.removeprefix(f"{prefix}.")) in there:
                return name.removeprefix(f"{prefix}.")
        return name

    return rename


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """transformers' (renamings, conversions of several tensors into one); none before its version 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return [], []
    every = get_model_conversion_mapping(model)
    renamings = [one for one in every if isinstance(one, WeightRenaming)]
    return renamings, [one for one in every if not isinstance(one, WeightRenaming)]


def _key(config: Mapping[str, object]) -> str:
    return json.dumps({k: v for k, v in config.items() if k != "quantization_config"}, sort_keys=True, default=str)


@lru_cache(maxsize=4)
def _skeleton(config: str, tensors: int | None = None) -> nn.Module | None:
    """The model that a config.json describes, without weights; None where transformers knows none.

    Args:
        config: The file's content.
        tensors: How many the file holds: a config that promises more layers is not believed.
    """
    import torch

    content = json.loads(config)
    depths = [value for part in (content, *content.values()) if isinstance(part, dict) for value in _depths(part)]
    if tensors is not None and max(depths, default=0) > tensors:
        return None
    try:
        with torch.device("meta"):
            model: nn.Module = model_class(content)._from_config(transformers_config(content))
    except Exception as error:  # whatever a class raises on a config that it was not made for
        log.debug("no model can be built from the config: %s", error)
        return None
    return model


def _depths(part: Mapping[str, Any]) -> list[int]:
    return [value for key, value in part.items() if "layer" in key and isinstance(value, int)]


def _shapes(places: Places, tensors: Mapping[str, TensorSpec]) -> dict[str, Shape]:
    """The shape at each place but for its first size, by which vocabularies may differ."""
    return {place: (len(shape := tensors[names[0]].shape), *shape[1:]) for place, names in places.items()}


def _moved(left: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str]:
    """Pairs places whose names differ in their first parts alone, by the change of prefix that fits most of them.

    A change counts where it fits every numbered place that it is about, and no other change fits as many.
    """
    pairs: dict[str, str] = {}
    left, free = dict(left), dict(free)
    while left and free:
        best = _best_change(left, free)
        if best is None:
            break
        for place, other in best.items():
            del left[place], free[other]
        pairs |= best
    return pairs


def _best_change(left: Mapping[str, Shape], free: Mapping[str, Shape]) -> dict[str, str] | None:
    by_suffix: dict[str, set[str]] = defaultdict(set)
    for place in free:
        for prefix, suffix in _cuts(place):
            by_suffix[suffix].add(prefix)
    changes = {
        (prefix, other) for place in left for prefix, suffix in _cuts(place) for other in by_suffix.get(suffix, ())
    }
    ranked: list[tuple[tuple[int, int, int], dict[str, str]]] = []
    for prefix, other in sorted(changes):
        moved = {place: other + place[len(prefix) :] for place in left if place.startswith(prefix)}
        fitting = {place: there for place, there in moved.items() if free.get(there) == left[place]}
        if all("*" not in place or place in fitting for place in moved) and fitting:
            alike = len(set(prefix.split(".")) & set(other.split(".")))
            ranked.append(((len(fitting), alike, -len(prefix)), fitting))
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0] and ranked[0][1] != ranked[1][1]):
        return None
    return ranked[0][1]


def _cuts(place: str) -> Iterable[tuple[str, str]]:
    """("", whole name), ("model.", rest of it) and so on, as long as two parts are left."""
    parts = place.split(".")
    for i in range(len(parts) - 1):
        head = ".".join(parts[:i])
        yield (f"{head}." if head else ""), ".".join(parts[i:])
