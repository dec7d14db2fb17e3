"""Looks at what can be wrong before anything is spent: names, models that read no text, chat models without a stop.

Weights that are not finite are refused when the models are opened, and a merged candidate whose logits are not finite
fails at its first batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.algorithms.registry import problems_of
from evomerge.errors import CheckpointError
from evomerge.recipe.parse import single_model
from evomerge.spec.load import load_spec, parse_spec
from evomerge.spec.schema import SearchSpec

if TYPE_CHECKING:
    from evomerge.checkpoints.checkpoint import Checkpoint
    from evomerge.problem.problem import Workbench

_TEXTS = 2  # of each task
_TOKENS = 64  # of each text
_SLACK = 1.0  # nats that a model may be worse than guessing before it is said


def algorithm_problems(spec: SearchSpec) -> list[str]:
    """Says why the algorithm that a specification names cannot do its search."""
    search = spec.search
    problems = problems_of(
        search.algorithm,
        search.options,
        several=search.objectives == "pareto",
        asynchronous=search.mode == "asynchronous",
    )
    if search.baseline == search.algorithm:
        problems.append(f"search.baseline: {search.baseline} is the algorithm itself; leave one of the two out")
    return problems


def load_search(path: Path) -> SearchSpec:
    """Reads a search.yaml and checks all of it that needs no model.

    Raises:
        SpecError: With every problem.
    """
    return load_spec(path, checks=[algorithm_problems])


def parse_search(data: Mapping[str, Any], *, where: str = "search.yaml", beside: Path | None = None) -> SearchSpec:
    """Checks a search specification as `load_search` does.

    Raises:
        SpecError: With every problem.
    """
    return parse_spec(data, where=where, beside=beside, checks=[algorithm_problems])


def look_before(bench: Workbench) -> list[str]:
    """Every gate.

    Returns:
        Warnings.

    Raises:
        CheckpointError: A model's logits are not finite.
    """
    models = bench.spec.models
    references = {**({"base": models.base} if models.base else {}), **models.sources}
    opened = {name: bench.checkpoints[reference] for name, reference in references.items()}
    return stop_tokens(opened, bench.reference_model) + smoke(bench, references)


def smoke(bench: Workbench, references: Mapping[str, str]) -> list[str]:
    """Reads a few lines of the tasks with each model.

    Args:
        bench: Models and tasks.
        references: Name to reference of the models to look at.

    Returns:
        What to say of models that predict worse than guessing.

    Raises:
        CheckpointError: Those whose logits are not finite.
    """
    rows = [bench.evaluator.encoder.tok_encode(text)[:_TOKENS] for text in sample_texts(bench)]
    rows = [row for row in rows if len(row) > 1]
    warnings, broken = [], []
    for name, reference in references.items():
        model, _ = bench.resident.write(bench.plan(single_model(reference)))
        loss, guessing = text_loss(model, rows)
        if not math.isfinite(loss):
            broken.append(
                f"{name}: its logits are not finite on {len(rows)} lines of the tasks, though its weights are; "
                f"evaluation.dtype is {bench.spec.evaluation.dtype}"
            )
        elif loss > guessing + _SLACK:
            warnings.append(
                f"{name}: {loss:.1f} nats a token on {len(rows)} lines of the tasks, where guessing costs "
                f"{guessing:.1f}: a broken model, or another tokenizer than it was trained with?"
            )
    if broken:
        raise CheckpointError(broken)
    return warnings


def sample_texts(bench: Workbench) -> list[str]:
    """The first few texts of each task, prompt and answer together."""
    texts = []
    for task in bench.tasks:
        for instances in bench.evaluator.requests(task).by_item[:_TEXTS]:
            texts.append("".join(part for part in instances[0].args if isinstance(part, str)))
    return texts


def text_loss(model: Any, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Nats a token that a model needs for some token sequences, and what guessing evenly costs: log(vocabulary).

    Zero sequences cost zero nats.
    """
    import torch

    device = next(model.parameters()).device
    total, count, guessing = 0.0, 0, 0.0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            guessing = math.log(logits.shape[-1])
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(row) - 1
    return (total / count if count else 0.0), guessing


def stop_tokens(models: Mapping[str, Checkpoint], reference: Checkpoint) -> list[str]:
    """What to say of chat models whose answers end with a token at which generation does not stop.

    Args:
        models: Name to model.
        reference: The model whose tokenizer and generation_config.json a merge gets.
    """
    warnings = []
    for name, model in models.items():
        if model.folder is None or not _has_chat_template(model):
            continue
        end = end_of_turn(model.load_tokenizer().loaded)
        if end is None:
            continue
        token, number = end
        if number not in _stops(model):
            warnings.append(
                f"{name}: its chat template ends a turn with {token!r} ({number}), but generation stops at "
                f"{_listed(_stops(model))}: set eos_token_id in its generation_config.json"
            )
        elif number not in _stops(reference):
            warnings.append(
                f"{name}: ends a turn with {token!r} ({number}), but a merge gets the generation_config.json of "
                f"{reference.reference}, which stops at {_listed(_stops(reference))}"
            )
    return warnings


def end_of_turn(tokenizer: Any) -> tuple[str, int] | None:
    """The special token that a chat template writes after an answer; None where it writes none."""
    import jinja2

    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except jinja2.exceptions.TemplateError:  # a template may want other roles
        return None
    special = {*tokenizer.all_special_ids, *(k for k, t in tokenizer.added_tokens_decoder.items() if t.special)}
    after = tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False)
    found = next((k for k in after if k in special), None)
    return None if found is None else (str(tokenizer.convert_ids_to_tokens(found)), found)


def _has_chat_template(model: Checkpoint) -> bool:
    """From the files' names and one small JSON file; loading a tokenizer takes much longer."""
    from evomerge.checkpoints.weight_files import read_json_object

    folder = model.folder
    if folder is None:
        return False
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return bool(read_json_object(folder / "tokenizer_config.json").get("chat_template"))


def _stops(model: Checkpoint) -> set[int]:
    """The tokens at which generation stops, as transformers finds them."""
    ends = model.generation_config.get("eos_token_id", model.config.get("eos_token_id"))
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}


def _listed(tokens: set[int]) -> str:
    return ", ".join(map(str, sorted(tokens))) or "no token"
