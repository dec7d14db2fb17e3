"""Model cards: Hub metadata, what was merged how, and whether what was written scores what the search measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.reference import is_hub_id
from evomerge.errors import BadInput
from evomerge.evaluation.scores import Score
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
_LONGEST_RECIPE = 40  # lines that a card shows without being asked to
_LONGEST_SAMPLE = 160
_TOLERANCE = 1e-6  # below which two scores are the same
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # of a licence, as the Hub writes them


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


@dataclass(frozen=True)
class ReportedScores:
    """What a merge scores by the metrics that are reported, one of each task.

    Attributes:
        model: What the Hub calls the model beside them.
        split: The items that were scored.
        rows: (task, metric, score).
    """

    model: str
    split: str
    rows: tuple[tuple[str, str, Score], ...]


def _front_matter(
    recipe: Recipe, bases: Sequence[str], relation: str, library: str, tags: Sequence[str], licence: str | None
) -> dict[str, Any]:
    """What the Hub reads of any card: its own models among the sources, the licence when all agree."""
    return {
        **({"base_model": list(bases), "base_model_relation": relation} if bases else {}),
        "library_name": library,
        "tags": ["evomerge", "merge", *tags, recipe.merge_method],
        **(_licence_keys(licence) if licence else {}),
    }


def _licence_keys(licence: str) -> dict[str, Any]:
    """A licence as the Hub takes it: one of its identifiers, several of them, or another with its name."""
    identifiers = licence.split(", ")
    if all(_IDENTIFIER.fullmatch(one) for one in identifiers):
        return {"license": identifiers[0] if len(identifiers) == 1 else identifiers}
    return {"license": "other", "license_name": without_html(licence)}


def _model_index(reported: ReportedScores) -> list[dict[str, Any]]:
    """The scores as the Hub shows them beside a model; it has no place for an interval but the metric's name."""
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": task, "type": task, "split": reported.split},
            "metrics": [{"type": metric, "name": f"{metric}{_interval_text(score)}", "value": round(score.value, 6)}],
        }
        for task, metric, score in reported.rows
        if math.isfinite(score.value)
    ]
    return [{"name": reported.model, "results": results}] if results else []


def _interval_text(score: Score) -> str:
    if score.interval is None:
        return f" ({score.n} items)"
    return f", 95% interval {score.interval[0]:.4f} to {score.interval[1]:.4f} ({score.n} items)"


def _with_front(metadata: Mapping[str, Any], parts: Sequence[str]) -> str:
    front = "---\n" + yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True) + "---\n"
    return plain("\n".join([front, *(part for part in parts if part)]))


def _warning(warning: str | None) -> str:
    return f"> **Licence:** {markdown(warning, _LONGEST_WARNING)}\n" if warning else ""


def _recipe_section(recipe: Recipe) -> str:
    text = recipe.to_yaml()
    lines = text.count("\n")
    block = code_block(text, "yaml")
    if lines > _LONGEST_RECIPE:
        block = f"<details><summary>{lines} lines, also in recipe.yaml</summary>\n\n{block}\n\n</details>"
    return f"## Recipe\n\n{block}\n"


def merge_card(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    body: str = "",
    *,
    identify: bool = True,
    reported: ReportedScores | None = None,
) -> str:
    """Writes a model card.

    Args:
        recipe: What was merged.
        checkpoints: The models, for licences and fingerprints.
        body: Markdown between the heading and the recipe: scores, lineage, samples.
        identify: Name the models' contents by their hashes, for which each is read whole the first time ever.
        reported: The scores that the Hub shows beside the model.
    """
    licence, warning = licence_verdict(licences(_external(recipe, checkpoints)))
    bases = list(dict.fromkeys(part for model in recipe.external_models() for part in _of_the_hub(model)))
    metadata = _front_matter(recipe, bases, "merge", "transformers", (), licence)
    if reported is not None and (index := _model_index(reported)):
        metadata["model-index"] = index
    sources = [
        f"- {code(_public_name(model))}"
        + (f", content `{checkpoints[model].fingerprint[:16]}`" if identify else "")
        + (" (base)" if any(model == document.base_model for document in recipe.documents) else "")
        for model in recipe.external_models()
    ]
    parts = [
        f"# Merged with EvoMerge: {recipe.merge_method}\n",
        _warning(warning),
        body,
        "## Sources\n\n" + "\n".join(sources) + "\n",
        _layers_section(recipe, checkpoints),
        _recipe_section(recipe),
    ]
    return _with_front(metadata, parts)


def adapter_card(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], base: str, body: str) -> str:
    """Writes the card of an adapter that says a merge.

    Args:
        recipe: What was merged.
        checkpoints: The models, for licences.
        base: What it is an adapter of.
        body: Markdown behind the heading.
    """
    licence, warning = licence_verdict(licences(_external(recipe, checkpoints)))
    parts = [
        f"# Merged with EvoMerge: {recipe.merge_method}, as an adapter of {code(_public_name(base))}\n",
        _warning(warning),
        body,
        _recipe_section(recipe),
    ]
    return _with_front(_front_matter(recipe, _of_the_hub(base)[:1], "adapter", "peft", ("lora",), licence), parts)


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


def scores_section(reported: ReportedScores, rescored: Rescored, dtype: str) -> str:
    """Writes the section of a card with the scores, and whether they are those of the search."""
    rows = []
    for task, metric, score in reported.rows:
        interval = "" if score.interval is None else f"{score.interval[0]:.4f} to {score.interval[1]:.4f}"
        rows.append([markdown(task), markdown(metric), f"{score.value:.4f}", interval, str(score.n)])
    return (
        f"## Scores on the {reported.split} items\n\nZero-shot unless a task says otherwise, {dtype}, "
        f"items as in lm-eval; `scores.json` has every metric.\n\n"
        f"{table(['task', 'metric', 'score', '95% interval', 'items'], rows)}\n\n{rescored.sentence()}\n"
    )


def again_section(commands: Sequence[str], items: str) -> str:
    """Writes the section of a card that says how the weights and their scores are made again.

    Args:
        commands: The command lines of lm-eval, OUT for the folder of the checkpoint; none where it cannot say it.
        items: The file with the numbers of the items.
    """
    lines = ["evomerge merge recipe.yaml OUT", *commands]
    return (
        f"## How to reproduce it\n\n{code_block(chr(10).join(lines))}\n\nThe weights are the same to the last bit. "
        f"`{items}` has the numbers of the items by task, as `lm_eval --samples` takes them"
        f"{'; run it where the tasks find their data' if commands else ''}.\n"
    )


def lineage_section(history: Sequence[Candidate], number: int) -> str:
    """Writes the section of a card with a candidate's ancestry."""
    tree = ancestry(history, number)
    summary = "From generation 0 to this one"
    return f"## Lineage\n\n<details><summary>{summary}</summary>\n\n{code_block(tree)}\n\n</details>\n"


def samples_section(samples: Sequence[tuple[str, str, str]], source: str) -> str:
    """Writes the section of a card with generated samples.

    Args:
        samples: (prompt, the merged model's continuation, a source's).
        source: The source's name.
    """
    if not samples:
        return ""
    rows = [[markdown(text.strip() or "(nothing)", _LONGEST_SAMPLE) for text in sample] for sample in samples]
    heading = "## Samples\n\nGreedy continuations, so that one can see whether the model still speaks.\n\n"
    return heading + table(["prompt", "this model", markdown(source)], rows) + "\n"


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
