"""Looks at models before a search: whether they fit, how far apart they are, and a search.yaml to start from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoints
from evomerge.checkpoints.dtypes import FLOATS
from evomerge.checkpoints.matching.compatible import check_compatible, mixed_architectures, not_finite
from evomerge.checkpoints.matching.configs import disagreements
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.checkpoints.reference import resolve_reference
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.engine.to_disk import refuse_inputs
from evomerge.errors import BadInput, CheckpointError
from evomerge.methods.registry import METHODS
from evomerge.planning.operation import Input
from evomerge.planning.vocabulary.align import align_for_search
from evomerge.problem.problem import tensor_group_filters
from evomerge.report.model_card import licences
from evomerge.report.tables import table
from evomerge.run.preflight import parse_search
from evomerge.space.genes import REST
from evomerge.system.files import expand_home, write_atomic
from evomerge.system.yaml import read_yaml, write_yaml

_LOOK_AT = 50_000_000  # elements of each model: enough for three digits, and seconds for any model
_CLEARLY = 0.5  # the largest cosine between changes from an ancestor is so much smaller than from any other model
_EVERYWHERE = ("linear", "task_arithmetic", "ties", "dare_ties")
_TOKENIZER = "; tokenizer: whose tokens and chat template merges have (union, base, NAME)"
_TASKS = ("arc_easy", "hellaswag")
_TENSOR_GROUPS = ("attention", "mlp")


@dataclass(frozen=True)
class Geometry:
    """How models lie to each other, over a sample of their tensors.

    Attributes:
        norms: Length of each model's weights, by reference.
        distances: Length of the difference of two, by both references, in either order.
        share: Fraction of the elements that were looked at.
    """

    norms: Mapping[str, float]
    distances: Mapping[tuple[str, str], float]
    share: float

    def cosine(self, base: str, left: str, right: str) -> float:
        """Computes the cosine of the angle between two deltas from their triangle; 0 where one of them is 0."""
        a, b, c = (self.distances[pair] for pair in ((base, left), (base, right), (left, right)))
        return (a * a + b * b - c * c) / (2 * a * b) if a * b > 0 else 0.0


def init_search(
    references: Sequence[str], out: Path, *, base: str | None = None, tasks: Sequence[str] = (), overwrite: bool = False
) -> str:
    """Looks at models and writes a search.yaml for them.

    Args:
        references: The models; the ancestor may be among them.
        out: The file to write.
        base: The ancestor; None to find out whether one of the models is it.
        tasks: What to search on; the file's first line asks for them where there are none.
        overwrite: Replace a file that is there.

    Returns:
        What was found, as text.

    Raises:
        BadInput: With everything that keeps the models from being merged, or a file that is there.
    """
    out = expand_home(out)
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: is there already: choose another name with --output, or --overwrite it")
    given = [*([base] if base else []), *references]
    stored = open_checkpoints(resolve_reference(reference, Path.cwd()) for reference in given)
    if len(stored) < 2:
        raise BadInput(f"init: give at least two models, the base included, got {len(stored)}")
    geometry = measure(reconcile(stored).checkpoints)
    origin = ancestor(geometry) if base is None else next(iter(stored))
    tokenizer = tokenizer_source(stored, origin)
    opened = _checked(stored, origin, tokenizer)
    text = search_yaml(opened, origin, out, tasks, tokenizer)
    parse_search(read_yaml(text, str(out), BadInput), where=str(out), beside=out.resolve().parent)
    refuse_inputs(out, stored)
    write_atomic(out, text)
    return "\n".join(
        [report(opened, origin, geometry, guessed=base is None), f"wrote {out}; next: evomerge check {out}"]
    )


def _checked(stored: Mapping[str, Checkpoint], base: str | None, tokenizer: str | None) -> Mapping[str, Checkpoint]:
    """The models as a search will have them; raises CheckpointError with every reason why they cannot be merged."""
    problems = [problem for model in stored.values() for problem in not_finite(model)]
    opened = align_for_search(base, [model for model in stored if model != base], stored, tokenizer).checkpoints
    problems += check_compatible(None, opened)
    if problems:
        raise CheckpointError(problems)
    return opened


def tokenizer_source(opened: Mapping[str, Checkpoint], base: str | None) -> str | None:
    """Chooses whose tokens merges have: union, base, or a model; None where one vocabulary and template serve all.

    A base without a chat template would take that of its instruct models away, and their stop tokens with it.
    """
    reference = base or next(iter(opened))
    tables = {model: checkpoint.layout.embedding for model, checkpoint in opened.items()}
    rows = {opened[model].tensors[table].shape[0] for model, table in tables.items() if table is not None}
    spoken = [model for model, checkpoint in opened.items() if checkpoint.has_chat_template]
    silent = bool(spoken) and not opened[reference].has_chat_template
    if (len(rows) < 2 and not silent) or not all(checkpoint.tokenizer_files for checkpoint in opened.values()):
        return None
    tokens = {model: set(checkpoint.load_tokenizer().tokens) for model, checkpoint in opened.items()}
    every = set().union(*tokens.values())
    complete = [model for model in (spoken if silent else [reference]) if tokens[model] == every]
    if not complete:
        return "union"
    return "base" if complete[0] == reference else complete[0]


def measure(opened: Mapping[str, Checkpoint]) -> Geometry:
    """Distances between models, over tensors drawn evenly from the list of all of them."""
    first = next(iter(opened.values()))
    names = [name for name, info in first.tensors.items() if info.dtype in FLOATS and _in_all(name, opened)]
    total = sum(first.tensors[name].numel for name in names)
    chosen = names[:: max(1, math.ceil(total / _LOOK_AT))] if names else []
    store = StatisticsStore(opened)

    def inputs(model: str) -> list[Input]:
        return [Input(model, name, opened[model].fingerprint) for name in chosen]

    norms = {model: math.sqrt(math.fsum(store.dot(None, one, one) for one in inputs(model))) for model in opened}
    distances: dict[tuple[str, str], float] = {}
    for left, right in combinations(opened, 2):
        squares = [store.dot(a, b, b) for a, b in zip(inputs(left), inputs(right), strict=True)]
        distances[left, right] = distances[right, left] = math.sqrt(math.fsum(squares))
    looked_at = sum(first.tensors[name].numel for name in chosen)
    return Geometry(norms, distances, looked_at / total if total else 1.0)


def _in_all(name: str, opened: Mapping[str, Checkpoint]) -> bool:
    """Says whether every model has a tensor in one shape: embeddings of other vocabularies are not compared."""
    return len({model.tensors[name].shape if name in model.tensors else None for model in opened.values()}) == 1


def ancestor(geometry: Geometry) -> str | None:
    """Finds the model that the others were fine-tuned from; None where none is clearly it.

    Changes from a common start are about independent. Seen from one of the fine-tunes they are not: the way back to the
    start is a part of the way to every other.
    """
    models = list(geometry.norms)
    if len(models) < 3:
        return None
    largest = {
        model: max(geometry.cosine(model, *pair) for pair in combinations([m for m in models if m != model], 2))
        for model in models
    }
    first, second = sorted(models, key=lambda model: largest[model])[:2]
    return first if largest[first] < _CLEARLY * largest[second] else None


def report(opened: Mapping[str, Checkpoint], base: str | None, geometry: Geometry, *, guessed: bool) -> str:
    """Describes the models and how they lie to each other."""
    sources = [model for model in opened if model != base]
    rows = [_row(model, checkpoint, base, geometry) for model, checkpoint in opened.items()]
    header = ["model", "architecture", "layers", "vocabulary", "dtype", "licence", "from the base"]
    lines = [table(header if base else header[:-1], rows), ""]
    if mixed := mixed_architectures(opened):
        lines.append(f"warning: {mixed}, although their tensors fit")
    reference = opened[base] if base is not None else next(iter(opened.values()))
    others = [model for model in opened.values() if model is not reference]
    lines += [f"warning: {text}" for model in others if (text := disagreements(reference, model))]
    if base is not None and guessed:
        lines.append(f"base: {base}, from which the others differ independently (--base says otherwise)")
    elif base is None:
        lines.append("base: no model is clearly the ancestor of the others; name it with --base if there is one")
    if base is not None and len(sources) > 1:
        names = _source_names(sources)
        pairs = combinations(names.items(), 2)
        cosines = [[one, other, f"{geometry.cosine(base, a, b):+.3f}"] for (one, a), (other, b) in pairs]
        lines += ["", table(["what this one learned", "and that one", "cosine"], cosines)]
        lines += [
            "a cosine says how alike two changes are, not how well they merge; below 0 they undo each other",
            "`evomerge check SEARCH.yaml --sources` says on your tasks what each source is worth, and who agrees",
        ]
    if geometry.share < 1:
        lines.append(f"measured on {geometry.share:.0%} of the weights")
    return "\n".join([*lines, ""])


def _row(name: str, model: Checkpoint, base: str | None, geometry: Geometry) -> list[str]:
    kinds = model.config.get("architectures")
    embedding = model.layout.embedding
    dtypes = [info.dtype for info in model.tensors.values()]
    row = [
        name,
        str(kinds[0]) if isinstance(kinds, list) and kinds else "not stated",
        str(model.layout.layer_count) if model.layout.main else "-",
        str(model.tensors[embedding].shape[0]) if embedding else "-",
        max(sorted(set(dtypes)), key=dtypes.count),
        licences({name: model})[name] or "not stated",
    ]
    if base is not None:
        moved = "the base" if name == base else f"{geometry.distances[base, name] / geometry.norms[base]:.2%}"
        row.append(moved)
    return row


def search_yaml(
    opened: Mapping[str, Checkpoint], base: str | None, out: Path, tasks: Sequence[str], tokenizer: str | None = None
) -> str:
    """Writes the text of a search.yaml for these models, with a word on what to choose."""
    sources = _source_names([model for model in opened if model != base])
    where = out.resolve().parent
    models: dict[str, Any] = {"base": _written(base, where)} if base else {}
    models["sources"] = {name: _written(model, where) for name, model in sources.items()}
    if tokenizer is not None:
        models["tokenizer"] = {model: name for name, model in sources.items()}.get(tokenizer, tokenizer)
    layers = next(iter(opened.values())).layout.layer_count if next(iter(opened.values())).layout.main else 1
    methods = [name for name in _EVERYWHERE if base or not METHODS[name].base_needed({})]
    space: dict[str, Any] = {"methods": methods, "layer_groups": max(1, min(6, layers))}
    filters = tensor_group_filters(next(iter(opened.values())), ())
    if groups := [name for name in _TENSOR_GROUPS if filters.get(name)]:
        space["tensor_groups"] = groups
    finer = [name for name in filters if name not in (*_TENSOR_GROUPS, REST)]
    parts: list[dict[str, Any]] = [
        {"name": out.name.removesuffix(".yaml").removesuffix(".yml")},
        {"models": models},
        {"space": space},
        {
            "evaluation": {
                "tasks": list(tasks) or list(_TASKS),
                "splits": {"search": 100, "select": 200, "test": 400},
            }
        },
        {"search": {"algorithm": "ga", "candidates": 200, "seed": 0}},
    ]
    remarks = {
        "models": ("the common ancestor, and what to merge" if base else "no base: methods on deltas need one")
        + (_TOKENIZER if tokenizer else ""),
        "space": "`evomerge methods` lists the methods; layer_groups: genes for each part of the layers\n"
        "# (6, [4, 12], per_layer), or {control_points: 4} for genes that run smoothly over the depth"
        + (f"\n# tensor_groups that these models have, too: {', '.join(finer)}" if finer else ""),
        "evaluation": "lm-eval tasks by name, or your own with include_path: choose what the merge should be good at",
        "search": "warm_start: runs/NAME, or a recipe's YAML, begins with what is known to be good",
    }
    blocks = []
    for part in parts:
        (key,) = part
        remark = f"# {remarks[key]}\n" if key in remarks else ""
        blocks.append(remark + write_yaml(part))
    head = f"# evomerge check {out.name} && evomerge run {out.name}\n"
    return head + "\n".join(blocks)


def _source_names(models: Sequence[str]) -> dict[str, str]:
    """A name for each model: the last part of its reference, numbered where two have the same."""
    names: dict[str, str] = {}
    for model in models:
        last = model.rstrip("/").replace("+", "/").replace(":", "/").rsplit("/", 1)[-1].removesuffix(".safetensors")
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_") or "model"
        plain = "source" if plain == "base" else plain
        name = next(n for n in [plain, *(f"{plain}-{k}" for k in range(2, len(models) + 2))] if n not in names)
        names[name] = model
    return names


def _written(reference: str, folder: Path) -> str:
    """A reference as the file has it: from its own folder where the model lies below that."""
    path = Path(reference)
    return str(path.relative_to(folder)) if path.is_absolute() and path.is_relative_to(folder) else reference
