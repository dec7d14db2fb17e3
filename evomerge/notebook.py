"""For people in a notebook: every method of the registry as a call that returns a loaded model, and runs to look at."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from evomerge.errors import BadInput, RecipeError, suggest

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go
    from transformers import PreTrainedModel

    from evomerge.checkpoints.checkpoint import Checkpoint
    from evomerge.methods.contract import Method, Parameter
    from evomerge.planning.plan import Plan
    from evomerge.report.drawing import Picture
    from evomerge.report.result import RunResult
    from evomerge.report.run_data import RunData
    from evomerge.study.candidate import Candidate

    Model: TypeAlias = str | Path | PreTrainedModel


def merge_models(
    method: str,
    *,
    models: Sequence[Model],
    base: Model | None = None,
    dtype: str | None = None,
    tokenizer_source: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    allow_crimes: bool = False,
    **parameters: Any,
) -> PreTrainedModel:
    """Merges models and returns the result, loaded.

    Args:
        method: A method's name, such as "ties"; `evomerge methods` lists them with their parameters.
        models: What to merge: folders, Hub ids, `base+adapter`, or models that are loaded already.
        base: The common ancestor, for methods that need one; for SLERP by `t`, the model at t = 0.
        dtype: Of the result; None for the models' own.
        tokenizer_source: Whose tokenizer the result has: "base", "union" or a model. None: the base's, or without a
            base the union, where vocabularies differ in size (tokens are then matched by their text); else the first
            model's.
        seed: For methods that draw random numbers.
        device: Where the result lives.
        allow_pickle: Also read pickle checkpoints.
        allow_crimes: Also merge models of different architectures whose tensors fit by name and shape.
        parameters: The method's. One for each model is given as a list, in the plural if you like (weights, densities,
            drop_rates), one for all as a value; `lambda_` is lambda. What is left out is the paper's.

    Returns:
        The model, in evaluation mode, in memory of its own: the files it was made from may go. `save_pretrained`
        writes it; its `tokenizer` attribute is the tokenizer, or None where the models have none.

    Raises:
        BadInput: A parameter or a model that cannot be used.
        CandidateError: transformers knows no model of this config.
    """
    from evomerge.checkpoints.checkpoint import open_checkpoints
    from evomerge.planning.plan import align_and_plan
    from evomerge.recipe import parse_recipe
    from evomerge.run.merge import refuse_crimes

    if isinstance(models, str | Path) or not models:
        raise BadInput("merge_models: models: give a list of at least one model")
    with ExitStack() as stack:
        references = [_reference(stack, model) for model in models]
        origin = None if base is None else _reference(stack, base)
        body = recipe_body(method, references, origin, parameters, seed)
        opened = open_checkpoints(
            dict.fromkeys([*([origin] if origin else []), *references]), allow_pickle=allow_pickle
        )
        if not allow_crimes:
            refuse_crimes(opened)
        source = tokenizer_source or _shared_vocabulary(opened, origin)
        recipe = parse_recipe(
            {**body, "out_dtype": dtype, "tokenizer_source": source, "seed": seed}, where=f"merge_models({method!r})"
        )
        plan, aligned, odd = align_and_plan(recipe, opened, identify=False)
        for text in (*recipe.warnings, *odd):
            warnings.warn(text, stacklevel=2)
        return _loaded(plan, aligned, device)


def ties_merge_llama(
    base_model_path: Model,
    ft_model_paths: Sequence[Model],
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Merges fine-tunes of a base by TIES in float32: `merge_models("ties", ...)` under the names of other helpers."""
    return merge_models(
        "ties",
        base=base_model_path,
        models=ft_model_paths,
        dtype="float32",
        device=device,
        **_not_none(weights=weights, densities=densities),
    )


def dare_merge_llama(
    base_model_path: Model,
    ft_model_paths: Sequence[Model],
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    device: str = "cpu",
    use_fp16: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Merges fine-tunes of one base by DARE, the weighted deltas added up: `merge_models("dare_linear", ...)`.

    The result is float32, or float16 with `use_fp16`; the arithmetic is float32 in both cases.
    """
    return merge_models(
        "dare_linear",
        base=base_model_path,
        models=ft_model_paths,
        dtype="float16" if use_fp16 else "float32",
        device=device,
        seed=seed,
        **_not_none(weights=weights, densities=densities),
    )


def _not_none(**parameters: Any) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def recipe_body(
    name: str, models: Sequence[str], base: str | None, parameters: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Writes the recipe of a call as its YAML would have it: keyword arguments, completed with the papers' values.

    Raises:
        RecipeError: With every keyword that the method does not know, and every list of the wrong length.
    """
    from evomerge.methods.registry import get_method

    method = get_method(name)
    by_word = {word: parameter for parameter in method.parameters for word in _words(parameter)}
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in models]
    problems, seen = [], set()
    for word, value in parameters.items():
        parameter = by_word.get(word)
        if parameter is None:
            problems.append(f"merge_models: {method.name} has no parameter '{word}'{suggest(word, by_word)}")
            continue
        if parameter.name in seen:
            problems.append(f"merge_models: {parameter.name} is given twice, as '{word}' too")
        seen.add(parameter.name)
        if not (parameter.per_source and isinstance(value, list | tuple)):
            shared[parameter.name] = value
        elif len(value) != len(models):
            problems.append(f"merge_models: {word}: {len(value)} values for {len(models)} models: give one for each")
        else:
            for entry, one in zip(own, value, strict=True):
                entry |= {} if one is None else {parameter.name: one}
    if problems:
        raise RecipeError(problems)
    shared = _paper_values(method, seen, base, len(models)) | shared
    if seed and method.parameter("seed") and "pattern" not in seen:
        shared.setdefault("seed", seed)
    entries = [{"model": model, "parameters": entry} for model, entry in zip(models, own, strict=True)]
    return {"merge_method": method.name, "base_model": base, "models": entries, "parameters": shared}


def _words(parameter: Parameter) -> list[str]:
    """What a keyword argument for a parameter may be called."""
    plural = f"{parameter.name[:-1]}ies" if parameter.name.endswith("y") else f"{parameter.name}s"
    return [parameter.name, f"{parameter.name}_", *([plural] if parameter.per_source else [])]


def _paper_values(method: Method, given: set[str], base: str | None, count: int) -> dict[str, Any]:
    """Looks up the papers' values of what a call leaves out.

    Not of what another parameter took the place of: beside a drop rate, a density would be a second trim. Nor where the
    value makes a base necessary that there is not, or leaves nothing to interpolate between.
    """
    replaced = {p.instead_of for p in method.parameters if p.name in given} | (
        {"density"} if "drop_rate" in given else set()
    )
    values = {}
    for parameter in method.parameters:
        if parameter.paper is None or parameter.name in given | replaced:
            continue
        needs = method.base_needed({parameter.name: parameter.paper}) and not method.base_needed({})
        if not needs or (base is not None and count > 1):
            values[parameter.name] = parameter.paper
    return values


def _reference(stack: ExitStack, model: Model) -> str:
    """A model's reference; one that is loaded already is written to a temporary folder first, and read by map."""
    if isinstance(model, str | Path):
        from evomerge.checkpoints.reference import resolve_reference

        return resolve_reference(str(model), Path.cwd())
    if not hasattr(model, "save_pretrained"):
        raise BadInput(f"merge_models: expected a path, a reference or a loaded model, got {type(model).__name__}")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evomerge-"))) / _name(model)
    model.save_pretrained(folder)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif Path(model.name_or_path).is_dir():
        from evomerge.checkpoints.checkpoint import open_checkpoint

        for path in open_checkpoint(model.name_or_path).tokenizer_files:
            shutil.copyfile(path, folder / path.name)
    return str(folder)


def _name(model: PreTrainedModel) -> str:
    """What messages call a loaded model."""
    return Path(model.name_or_path).name or type(model).__name__


def _shared_vocabulary(opened: Mapping[str, Checkpoint], base: str | None) -> str | None:
    """The tokenizer source of models whose embeddings differ in length; None where they do not."""
    rows = {model.tensors[model.layout.embedding].shape[0] for model in opened.values() if model.layout.embedding}
    if len(rows) < 2:
        return None
    return "union" if base is None else "base"


def _loaded(plan: Plan, checkpoints: Mapping[str, Checkpoint], device: str) -> PreTrainedModel:
    """Loads the plan's result as transformers would have from a folder."""
    from transformers import AutoTokenizer, GenerationConfig

    from evomerge.engine.companions import write_companions
    from evomerge.engine.resident import Resident

    model: Any
    model, _ = Resident(checkpoints, device=device, private=True).write(plan)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.tokenizer = None
    with tempfile.TemporaryDirectory(prefix="evomerge-") as name:
        folder = Path(name)
        write_companions(plan, checkpoints[plan.reference], folder)
        if (folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if (folder / "tokenizer_config.json").is_file():
            model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model


def open_run(folder: str | Path) -> OpenRun:
    """Opens a run to look at it, finished or not: `evomerge.open_run("runs/quickstart")`.

    Raises:
        RunError: When there is no run, or a file of it is damaged.
    """
    return OpenRun(folder)


class OpenRun:
    """A run as it was when it was opened, or last refreshed. Shown by a notebook, it is its verdict and scores.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.refresh()

    def refresh(self) -> None:
        """Reads the run again, which may have gone on."""
        from evomerge.run.report import read_run

        self._data: RunData = read_run(self._folder)

    @property
    def result(self) -> RunResult | None:
        """What the finished run found; None while it has not ended."""
        return self._data.result

    @property
    def winner(self) -> Candidate | None:
        """The winner, or the best so far; None while nothing is scored."""
        return next((c for c in self._data.history if c.number == self._data.winner), None)

    def candidates(self) -> pandas.DataFrame:
        """Returns a row for each candidate: what is recorded of it, its scores as TASK/METRIC, its genes."""
        import pandas

        from evomerge.report.candidates import candidate_rows

        rows = candidate_rows(self._data.history, self._data.objectives)
        return pandas.DataFrame(rows).set_index("candidate") if rows else pandas.DataFrame()

    def plot_history(self) -> go.Figure:
        """Draws fitness by candidate with the best so far."""
        from evomerge.report import figures

        return _drawn(figures.history(self._data))

    def plot_recipe(self, candidate: int | None = None) -> go.Figure:
        """Draws what goes into a candidate, the winner by default."""
        from evomerge.report import figures

        return _drawn(figures.recipe(self._data, candidate))

    def plot_lineage(self, candidate: int | None = None) -> go.Figure:
        """Draws the family of a candidate, the winner by default."""
        from evomerge.report import figures

        return _drawn(figures.lineage(self._data, candidate))

    def __repr__(self) -> str:
        from evomerge.report.tables import status_text

        return status_text(self._data.status)

    def _repr_html_(self) -> str:
        from evomerge.report.html import summary

        return summary(self._data)


def _drawn(picture: Picture | None) -> go.Figure:
    if picture is None:
        raise BadInput("there is nothing to draw: no such candidate, or none with a score yet")
    return picture.figure.update_layout(title=picture.title, margin_t=60)
