"""Model cards: Hub metadata, what was merged how, and whether what was written scores what the search measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.reference import is_hub_id
from evomerge.errors import BadInput
from evomerge.recipe import Recipe, expand_frankenmerge
from evomerge.report.lineage import ancestry
from evomerge.report.tables import table
from evomerge.study.candidate import Candidate
from evomerge.system.files import resolve_path
from evomerge.system.text import code, code_block, markdown, one_line, plain, without_html
from evomerge.system.yaml import read_yaml

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_MOST_FRONT_MATTER = 200_000  # bytes; the longest real ones have a quarter of that
_MOST_LICENCES, _LONGEST_LICENCE = 5, 80
_LONGEST_WARNING = 2000
_TOLERANCE = 1e-6  # below which two scores are the same


def licences(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str | None]:
    """Reads the licence that each model's own card states, by reference; None where none is stated."""
    stated: dict[str, str | None] = {}
    for reference, checkpoint in checkpoints.items():
        stated[reference] = None
        card = checkpoint.folder / "README.md" if checkpoint.folder else None
        if card is not None and card.is_file():
            stated[reference] = _licence(card)
    return stated


def _licence(card: Path) -> str | None:
    """The licence in a card's front matter; None where there is none that can be read, which is not ours to mend."""
    try:
        with card.open("rb") as file:
            text = file.read(_MOST_FRONT_MATTER).decode("utf-8", errors="replace").replace("\r\n", "\n")
        match = _FRONT_MATTER.match(text)
        content = read_yaml(match[1], str(card), BadInput) if match else None
    except (OSError, BadInput):
        return None
    licence = content.get("license") if isinstance(content, dict) else None
    if isinstance(licence, list) and all(isinstance(one, str) for one in licence):
        licence = ", ".join(licence[:_MOST_LICENCES])
    return one_line(licence, _LONGEST_LICENCE) or None if isinstance(licence, str) else None


def licence_verdict(stated: Mapping[str, str | None]) -> tuple[str | None, str | None]:
    """Compares licences.

    Returns:
        The licence that all models agree on or None, and a warning or None.
    """
    distinct = set(stated.values())
    if len(distinct) == 1 and None not in distinct:
        return distinct.pop(), None
    lines = ", ".join(f"{_public_name(model)}: {licence or 'not stated'}" for model, licence in stated.items())
    return None, f"the models' licences do not agree ({lines}); check what the merged model may be used for"


def front_matter(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], tags: tuple[str, ...] = ()) -> str:
    """Writes the YAML block that the Hub reads: its own models among the sources, the licence when all agree."""
    licence, _ = licence_verdict(licences(_external(recipe, checkpoints)))
    bases = list(dict.fromkeys(part for model in recipe.external_models() for part in _of_the_hub(model)))
    metadata: dict[str, Any] = {
        **({"base_model": bases, "base_model_relation": "merge"} if bases else {}),
        "library_name": "transformers",
        "tags": ["evomerge", "merge", recipe.merge_method, *tags],
    }
    if licence:
        metadata["license"] = without_html(licence)
    return "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---\n"


def merge_card(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], body: str = "", *, identify: bool = True) -> str:
    """Writes a model card.

    Args:
        recipe: What was merged.
        checkpoints: The models, for licences and fingerprints.
        body: Markdown between the heading and the recipe: scores, lineage, samples.
        identify: Name the models' contents by their hashes, for which each is read whole the first time ever.
    """
    _, warning = licence_verdict(licences(_external(recipe, checkpoints)))
    sources = [
        f"- {code(_public_name(model))}"
        + (f", content `{checkpoints[model].fingerprint[:16]}`" if identify else "")
        + (" (base)" if any(model == document.base_model for document in recipe.documents) else "")
        for model in recipe.external_models()
    ]
    parts = [
        front_matter(recipe, checkpoints),
        f"# Merged with EvoMerge: {recipe.merge_method}\n",
        f"> **Licence:** {markdown(warning, _LONGEST_WARNING)}\n" if warning else "",
        body,
        "## Sources\n\n" + "\n".join(sources) + "\n",
        _layers_section(recipe, checkpoints),
        f"## Recipe\n\n{code_block(recipe.to_yaml(), 'yaml')}\n",
    ]
    return plain("\n".join(part for part in parts if part))


def adapter_card(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], base: str, body: str) -> str:
    """Writes the card of an adapter that says a merge.

    Args:
        recipe: What was merged.
        checkpoints: The models, for licences.
        base: What it is an adapter of.
        body: Markdown behind the heading.
    """
    licence, warning = licence_verdict(licences(_external(recipe, checkpoints)))
    metadata: dict[str, Any] = {
        **({"base_model": bases[0], "base_model_relation": "adapter"} if (bases := _of_the_hub(base)) else {}),
        "library_name": "peft",
        "tags": ["evomerge", "merge", "lora", recipe.merge_method],
        **({"license": without_html(licence)} if licence else {}),
    }
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---\n",
        f"# Merged with EvoMerge: {recipe.merge_method}, as an adapter of {code(_public_name(base))}\n",
        f"> **Licence:** {markdown(warning, _LONGEST_WARNING)}\n" if warning else "",
        body,
        f"## Recipe\n\n{code_block(recipe.to_yaml(), 'yaml')}\n",
    ]
    return plain("\n".join(part for part in parts if part))


@dataclass(frozen=True)
class Rescored:
    """Whether the written checkpoint scores what the search measured.

    Attributes:
        split: The items that were scored.
        measured: Task -> metric -> value in the run.
        now: The same, read from the written checkpoint.
    """

    split: str
    measured: Mapping[str, Mapping[str, float]]
    now: Mapping[str, Mapping[str, float]]

    @property
    def largest(self) -> float:
        """The largest difference of any metric."""
        pairs = [(self.now[t][m], value) for t, row in self.measured.items() for m, value in row.items()]
        return max((abs(a - b) for a, b in pairs), default=0.0)

    def sentence(self) -> str:
        """Says the agreement in words."""
        if self.largest <= _TOLERANCE:
            return f"Read back and scored again on the {self.split} items: the same numbers as in the search."
        return (
            f"Read back and scored again on the {self.split} items: the numbers DIFFER from the search's, "
            f"by up to {self.largest:.4f}."
        )


def scores_section(rescored: Rescored, dtype: str) -> str:
    """Writes the section of a card with the scores in the search beside those of the checkpoint."""
    rows = [
        [markdown(task), markdown(metric), f"{value:.4f}", f"{rescored.now[task][metric]:.4f}"]
        for task, row in rescored.measured.items()
        for metric, value in row.items()
    ]
    return (
        f"## Scores on the {rescored.split} items\n\nZero-shot unless a task says otherwise, {dtype}, "
        f"items as in lm-eval.\n\n{table(['task', 'metric', 'in the search', 'this checkpoint'], rows)}"
        f"\n\n{rescored.sentence()}\n"
    )


def again_section(commands: Sequence[str], items: str) -> str:
    """Writes the section of a card that says how lm-eval gives the same scores.

    Args:
        commands: Its command lines, OUT for the folder of the checkpoint; none where one cannot say it.
        items: The file with the numbers of the items.
    """
    said = f"`{items}` has the numbers of these items by task, as `lm_eval --samples` takes them"
    if not commands:
        return f"{said}.\n"
    return f"{said}; with this folder as OUT, where the tasks' data is found:\n\n{code_block(chr(10).join(commands))}\n"


def lineage_section(history: Sequence[Candidate], number: int) -> str:
    """Writes the section of a card with a candidate's ancestry."""
    return f"## Lineage\n\n{code_block(ancestry(history, number))}\n"


def samples_section(samples: Sequence[tuple[str, str, str]], source: str) -> str:
    """Writes the section of a card with generated samples.

    Args:
        samples: (prompt, the merged model's continuation, a source's).
        source: The source's name.
    """
    quoted = [
        f"Prompt:\n\n{_quote(prompt)}\n\nThis model:\n\n{_quote(own)}\n\n{source}:\n\n{_quote(other)}\n"
        for prompt, own, other in samples
    ]
    heading = "## Samples\n\nGreedy continuations, so that one can see whether the model still speaks.\n\n"
    return heading + "\n---\n\n".join(quoted)


def _quote(text: str) -> str:
    return "\n".join("    " + line for line in (text.strip() or "(nothing)").splitlines())


def _external(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models that were there before; what a step made of them has no licence of its own."""
    return {model: checkpoints[model] for model in recipe.external_models()}


def _layers_section(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str:
    """The section that says which layers a pattern took from which model; "" where the recipe itself says it."""
    layout = checkpoints[recipe.models()[0]].layout
    if layout.main is None or recipe.slices or len(recipe.sources) < 2:
        return ""
    written = expand_frankenmerge(recipe, layout.layer_count)
    if written is recipe:
        return ""
    rows = [(part.sources[0].model, *(part.sources[0].layer_range or (0, 0))) for part in written.slices]
    lines = [f"- {first} to {stop - 1}: {code(_public_name(model))}" for model, first, stop in rows]
    return "## Layers\n\n" + "\n".join(lines) + "\n"


def _of_the_hub(reference: str) -> list[str]:
    """The Hub ids in a reference: what lies in a local folder means nothing elsewhere, whatever it is called."""
    parts = [part.strip() for part in reference.split("+")]
    return [part.partition("@")[0] for part in parts if is_hub_id(part) and resolve_path(part, None) is None]


def _public_name(reference: str) -> str:
    """A Hub id as it is; of a local path only the last folder, which is all that means something elsewhere."""
    if reference.startswith(("/", ".", "~")) or "\\" in reference:
        return reference.rstrip("/").rsplit("/", 1)[-1]
    return reference
