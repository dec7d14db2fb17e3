"""What lies beside the weights: config, tokenizer, and every small file of the model whose place the merge takes.

Nobody can list what the world's models need beside their weights (processors, poolings, code, further templates), so
all of it goes along, and what does not is named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint, generation_defaults
from evomerge.checkpoints.header import name_some
from evomerge.checkpoints.tokenizer import is_tokenizer_file, tokenizer_contents, write_contents
from evomerge.planning.plan import Plan

SMALL = 64_000_000  # bytes: the longest tokenizers have half of that
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|ot|npz|tflite|pb|mlmodel|pkl|pickle)(\.index\.json)?"
)
_REPLACED = re.compile(r"config\.json|README\.md|recipe\.yaml|scores\.json|mergekit_config\.ya?ml")
_OF_OTHER_WEIGHTS = re.compile(r"adapter_config\.json|(hf_)?quant(ize|ization)?_config\.json|quantize_config\.json")
# Of a training, of a repository: nothing that a model is read from.
_PASSED_OVER = re.compile(
    r"(.*/)?(\..*|__pycache__|checkpoint-\d+|runs|logs)/.*|(.*/)?\..*|trainer_state\.json|.*_results\.json|.*\.(lock|log)"
    r"|(.*/)?(training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|rng_state.*\.pth|events\.out\..*)"
)


def write_companions(plan: Plan, reference: Checkpoint, folder: Path) -> tuple[str, ...]:
    """Writes config, generation config, the tokenizer, and the reference model's other small files.

    Args:
        plan: The merge.
        reference: The model whose files the merged model takes.
        folder: Where to.

    Returns:
        What of that model's folder does not go along, in words.
    """
    if plan.config:
        _write_json(folder / "config.json", plan.config)
    written: Mapping[str, bytes] = {}
    if plan.tokenizer is not None:
        written = plan.tokenizer.files
    elif reference.tokenizer_folder is not None and reference.tokenizer_folder != reference.folder:  # an adapter's
        written = tokenizer_contents(reference.tokenizer_folder)
    write_contents(folder, written)
    own = reference.folder / "generation_config.json" if reference.folder else None
    if plan.tokenizer is not None:
        generation = plan.tokenizer.generation_config or generation_defaults(plan.config)
        if generation:
            _write_json(folder / "generation_config.json", generation)
    elif plan.config and not (own and own.is_file()):
        _write_json(folder / "generation_config.json", generation_defaults(plan.config))
    return _copy_others(reference, folder, new_tokenizer=bool(written))


def _copy_others(reference: Checkpoint, folder: Path, *, new_tokenizer: bool) -> tuple[str, ...]:
    if reference.folder is None or not plain_model_folder(reference):
        return ()
    left, replaced, unmerged = [], [], []
    models = _module_folders(reference.folder)
    others = _other_models(reference.folder) - models
    weights = {path.resolve() for path in reference.files}
    for name, path in sorted(_files(reference.folder)):
        top = name.split("/")[0]
        if _PASSED_OVER.fullmatch(name) or _REPLACED.fullmatch(name) or (folder / name).exists():
            continue
        if path.resolve() in weights or name.endswith(".index.json"):
            continue
        if new_tokenizer and is_tokenizer_file(name):
            replaced.append(name)
            continue
        is_weights, in_module = bool(_WEIGHTS.fullmatch(name)), top in models
        too_large = path.stat().st_size > SMALL
        if too_large or top in others or _OF_OTHER_WEIGHTS.fullmatch(name) or (is_weights and not in_module):
            left.append(f"{top}/" if top in others else name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        unmerged += [name] if is_weights else []
    return tuple(
        f"{text} {name_some(dict.fromkeys(names))}"
        for text, names in (
            (f"not taken along from {reference.reference}:", left),
            ("the tokenizer is another, so these are left out:", replaced),
            (f"copied from {reference.reference} and not merged:", unmerged),
        )
        if names
    )


def plain_model_folder(checkpoint: Checkpoint) -> bool:
    """Tells whether a model's folder is one for this model alone: a lone file may lie among anything."""
    return bool(checkpoint.config) or bool(checkpoint.tokenizer_files)


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every ordinary file below a folder, by its name from there. Links to folders are not followed."""
    for at, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(at) / name
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def _other_models(root: Path) -> set[str]:
    """Folders that hold weights: the same model in another form, or an earlier state of it."""
    return {name.split("/")[0] for name, _ in _files(root) if "/" in name and _WEIGHTS.fullmatch(name)}


def _module_folders(root: Path) -> set[str]:
    """Folders of the further modules of an embedding model (sentence-transformers), such as a pooling."""
    path = root / "modules.json"
    if not path.is_file():
        return set()
    try:
        modules: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return set()
    entries = modules if isinstance(modules, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, Mapping)]
    return {path.split("/")[0] for path in paths if isinstance(path, str) and path}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
