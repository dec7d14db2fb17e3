"""Trains the models of the zoo that are missing and writes them as Hugging Face checkpoints, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import OutputError
from evomerge.zoo.progress import training_progress
from evomerge.zoo.sizes import Size, Training

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
{lineage}---

# zoo:{name}

{what} It is of the tiny zoo that EvoMerge trains on first use, on texts it makes up itself, so that a merge can
evolve where there is no network. It is good for nothing else.
"""

_PARTIAL = ".partial-"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Waits until no other process trains into `root`, and keeps others waiting meanwhile."""
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel when the process dies
        yield


def build(root: Path, size: Size, name: str) -> None:
    """Makes `root/name` exist, and the base it comes from.

    Args:
        root: Where the models are kept.
        size: The family that `name` belongs to.
        name: The model, with the family's prefix.

    Raises:
        OutputError: The folder cannot be written.
    """
    base = size.names[0]
    try:
        with _locked(root):
            for leftover in root.glob(f"{_PARTIAL}*"):  # of a process that was killed
                shutil.rmtree(leftover)
            if not (root / base).is_dir():
                _train_into(root, size, base, size.base, parent=None)
            if not (root / name).is_dir():
                course = size.experts[name.removeprefix(size.prefix)]
                _train_into(root, size, name, course, parent=root / base)
    except OSError as error:
        raise OutputError(
            f"{root}: zoo:{name} cannot be kept there: {error.strerror}; set EVOMERGE_CACHE to a folder that can be "
            "written"
        ) from error


def _train_into(root: Path, size: Size, name: str, course: Sequence[Training], parent: Path | None) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import GenerationConfig

    from evomerge.zoo.training import new_weights, train, zoo_config, zoo_tokenizer

    tokenizer = zoo_tokenizer()
    config = zoo_config(size, tokenizer)
    if parent is None:
        weights = new_weights(config)
    else:
        weights = {key: weight.double() for key, weight in load_file(parent / "model.safetensors").items()}
    with training_progress(name, sum(training.steps for training in course)) as advance:
        for training in course:
            train(weights, config, training, tokenizer, advance)

    with _whole_folder(root / name) as folder:
        kept = {key: weight.detach().float() for key, weight in weights.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(size, name), encoding="utf-8")


def _card(size: Size, name: str) -> str:
    base = size.names[0]
    if name == base:
        return CARD.format(
            name=name, lineage="", what="A base that learnt every skill, then read much that gets them wrong."
        )
    skill = name.removeprefix(size.prefix)
    lineage = f"base_model: zoo:{base}\nbase_model_relation: finetune\n"
    return CARD.format(name=name, lineage=lineage, what=f"A fine-tune of zoo:{base} that is good at {skill}.")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `folder` at the end of the block, or goes when the block fails."""
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
