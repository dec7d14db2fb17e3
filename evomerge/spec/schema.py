"""A search.yaml, read and checked: models, space, evaluation, search, run. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from evomerge.errors import SpecError, suggest
from evomerge.evaluation.backends.registry import BackendName
from evomerge.recipe import resolve_reference
from evomerge.system.paths import resolve_path
from evomerge.system.yaml import read_yaml

MOST_OBJECTIVES = 6
"""With more, hardly a candidate dominates another, and the volume of a front takes seconds."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Part):
    """A narrowed gene range; a bound that is left out stays as the methods declare it."""

    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class Models(_Part):
    """The base model and the named sources, as references."""

    base: str | None = None
    sources: dict[str, str] = Field(min_length=1)

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: dict[str, str]) -> dict[str, str]:
        for name in sources:
            if not name.replace("_", "").replace("-", "").isalnum() or name == "base":
                raise ValueError(f"source name '{name}': letters, digits, - and _ only, and not 'base'")
        return sources


class Frankenmerge(_Part):
    """Limits of the layer patterns."""

    min_layers: int | None = Field(None, ge=1)
    max_layers: int | None = Field(None, ge=1)
    scale: bool = False


ControlPoints = Annotated[
    dict[Literal["control_points"], Annotated[int, Field(ge=2)]], Field(min_length=1, max_length=1)
]


class Space(_Part):
    """Which genes exist."""

    methods: list[str] = Field(["linear", "task_arithmetic", "ties", "dare_ties"], min_length=1)
    method_scope: Literal["run", "layer_group"] = "run"
    layer_groups: Annotated[int, Field(ge=1)] | list[int] | Literal["per_layer"] | ControlPoints = 6
    tensor_groups: list[Literal["attention", "mlp", "rest"]] | None = None
    genes: dict[str, Range] = {}
    frankenmerge: Frankenmerge = Frankenmerge()

    @field_validator("layer_groups", mode="before")
    @classmethod
    def _control_points(cls, groups: Any) -> Any:
        if isinstance(groups, dict):
            count = groups.get("control_points")
            if set(groups) != {"control_points"} or not isinstance(count, int) or count < 2:
                raise ValueError("a mapping says {control_points: a number from 2}")
        return groups


Part = Annotated[float, Field(gt=0)]
Size = Literal["layers", "parameters"]


class Splits(_Part):
    """How many items steer, choose among finalists, and are read once: fractions, or numbers of items above 1."""

    search: Part = 0.25
    select: Part = 0.25
    test: Part = 0.5

    @model_validator(mode="after")
    def _fit(self) -> Splits:
        sizes = {"search": self.search, "select": self.select, "test": self.test}
        fractions = [size for size in sizes.values() if size <= 1]
        if sum(fractions) > 1 + 1e-9:
            raise ValueError(f"the fractions add up to {sum(fractions):g}, which is more than 1")
        for name, size in sizes.items():
            if size > 1 and size != int(size):
                raise ValueError(f"{name}: {size:g} is neither a fraction nor a whole number of items")
        return self


class Task(_Part):
    """One benchmark that steers."""

    task: str
    metric: str | None = None
    weight: float = Field(1.0, gt=0)
    splits: Splits | None = None
    num_fewshot: int | None = Field(None, ge=0)


class Evaluation(_Part):
    """How candidates are scored."""

    include_path: str | list[str] | None = None
    tasks: list[Task] = Field(min_length=1)
    scale: Literal["relative", "raw"] = "relative"
    splits: Splits = Splits()
    guard: list[str] = []
    fitness: Literal["metric", "smooth"] | None = None  # None: what suits the space
    informative: float | None = Field(None, gt=0, lt=1)
    racing: bool = False
    cache: bool = True
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_tokens: int | None = Field(None, ge=16)  # what suits the device
    reuse_prefixes: bool = True
    max_length: int | None = Field(None, ge=8)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None  # lm-eval's default: where a chat template is applied
    system_instruction: str | None = None
    backend: BackendName = "native"

    @field_validator("tasks", mode="before")
    @classmethod
    def _short_form(cls, tasks: Any) -> Any:
        if not isinstance(tasks, list):
            return tasks
        return [{"task": t} if isinstance(t, str) else t for t in tasks]

    @property
    def include_paths(self) -> list[str]:
        """The task folders, as a list."""
        return [self.include_path] if isinstance(self.include_path, str) else list(self.include_path or [])


class Stop(_Part):
    """What ends a search before its budget does."""

    hours: float | None = Field(None, gt=0)
    stale_generations: int | None = Field(None, ge=1)
    fitness: float | None = None


class Search(_Part):
    """How the space is searched."""

    algorithm: str = "ga"
    mode: Literal["generational", "asynchronous"] = "generational"
    options: dict[str, Any] = {}
    population: int | None = Field(None, ge=2)  # None: what suits the algorithm
    candidates: int = Field(100, ge=1)
    objectives: Literal["mean", "pareto"] = "mean"
    also_minimize: list[Size] = []
    seed: int = Field(0, ge=0)
    baseline: Literal["random"] | None = None
    stop: Stop = Stop()
    finalists: int = Field(8, ge=1)
    warm_start: str | list[str] | None = None

    @property
    def warm_starts(self) -> list[str]:
        """The runs and recipes to start from, as a list."""
        return [self.warm_start] if isinstance(self.warm_start, str) else list(self.warm_start or [])


class Run(_Part):
    """Where the run lives."""

    dir: str | None = None
    executor: Literal["local"] = "local"
    workers: int = Field(1, ge=1)  # processes that score candidates; 1: this one
    storage: str | None = None
    keep: int = Field(1, ge=0)


class SearchSpec(_Part):
    """Everything a search.yaml says."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    models: Models
    space: Space = Space()
    evaluation: Evaluation
    search: Search = Search()
    run: Run = Run()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/{self.name}")

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives where there are several: the tasks (or groups) in order, then sizes."""
        if self.search.objectives == "mean":
            return ()
        return (*(task.task for task in self.evaluation.tasks), *self.search.also_minimize)


def parse_spec(data: Mapping[str, Any], *, where: str = "search.yaml", beside: Path | None = None) -> SearchSpec:
    """Checks a search specification and resolves its paths.

    Args:
        data: The YAML document.
        where: Name of the file, for messages.
        beside: Folder of the file; relative model paths and task folders are looked for there, in the folders above
            it, and in the working directory.

    Raises:
        SpecError: With every problem found.
    """
    try:
        spec = SearchSpec.model_validate(dict(data))
    except ValidationError as error:
        raise SpecError([f"{where}: {text}" for text in _explained(error.errors())]) from None
    spec, problems = _resolved(spec, beside)
    problems += _unknown_names(spec)
    if problems:
        raise SpecError([f"{where}: {problem}" for problem in problems])
    return _settled(spec)


def load_spec(path: Path) -> SearchSpec:
    """Reads a search.yaml.

    Raises:
        SpecError: When the file cannot be read, is no mapping, or says something wrong.
    """
    try:
        data = read_yaml(path.read_text(encoding="utf-8"), str(path), SpecError)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a mapping with name, models and evaluation, got {type(data).__name__}")
    return parse_spec(data, where=str(path), beside=path.resolve().parent)


def _resolved(spec: SearchSpec, beside: Path | None) -> tuple[SearchSpec, list[str]]:
    """The spec with absolute paths; and what does not exist."""
    models = Models(
        base=None if spec.models.base is None else resolve_reference(spec.models.base, beside),
        sources={name: resolve_reference(ref, beside) for name, ref in spec.models.sources.items()},
    )
    problems, include = [], []
    for text in spec.evaluation.include_paths:
        found = resolve_path(text, beside)
        if found is None or not found.is_dir():
            problems.append(f"evaluation.include_path: no folder {text} beside the file, above it or in {Path.cwd()}")
        else:
            include.append(str(found))
    evaluation = spec.evaluation.model_copy(update={"include_path": include or None})
    # One that is missing is no problem to a run that has begun; `evomerge.run.warm_start` tells of it to any other.
    warm = [str(resolve_path(text, beside) or text) for text in spec.search.warm_starts]
    search = spec.search.model_copy(update={"warm_start": warm or None})
    return spec.model_copy(update={"models": models, "evaluation": evaluation, "search": search}), problems


def _settled(spec: SearchSpec) -> SearchSpec:
    """With the fitness that suits the space, where the file does not say.

    The probability of the right choice follows confidence as well as knowledge. Averages of models keep the first much
    as it was; stacks of copied layers do not, and a search among them finds the sure ones instead of the right ones.
    """
    from evomerge.methods.registry import get_method

    if spec.evaluation.fitness is not None:
        return spec
    copied = all(get_method(name).copies_layers for name in spec.space.methods)
    evaluation = spec.evaluation.model_copy(update={"fitness": "metric" if copied else "smooth"})
    return spec.model_copy(update={"evaluation": evaluation})


def _unknown_names(spec: SearchSpec) -> list[str]:
    from evomerge.algorithms.registry import ALGORITHMS
    from evomerge.methods.registry import METHODS

    problems = []
    known = {*METHODS, *(alias for m in METHODS.values() for alias in m.aliases)}
    for name in spec.space.methods:
        if name not in known:
            problems.append(f"space.methods: no method '{name}'{suggest(name, known)}")
    if spec.search.algorithm not in ALGORITHMS:
        problems.append(
            f"search.algorithm: '{spec.search.algorithm}' is not one of {', '.join(sorted(ALGORITHMS))}"
            f"{suggest(spec.search.algorithm, ALGORITHMS)}"
        )
    else:
        problems += ALGORITHMS[spec.search.algorithm].problems(spec.search.options)
        problems += _objective_problems(spec)
        if spec.search.mode == "asynchronous" and not ALGORITHMS[spec.search.algorithm].asynchronous:
            able = ", ".join(sorted(name for name, algorithm in ALGORITHMS.items() if algorithm.asynchronous))
            problems.append(
                f"search.mode: {spec.search.algorithm} learns from whole generations and cannot be asynchronous; "
                f"these can: {able}"
            )
    if spec.search.baseline == spec.search.algorithm:
        problems.append(f"search.baseline: {spec.search.baseline} is the algorithm itself; leave one of the two out")
    names = [task.task for task in spec.evaluation.tasks]
    problems += [f"evaluation.tasks: '{n}' is listed twice" for n in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"evaluation.guard: '{n}' also steers; a guard must not" for n in spec.evaluation.guard if n in names]
    device = spec.evaluation.device
    if spec.evaluation.backend == "vllm" and not device.startswith("cuda"):
        problems.append(f"evaluation.device: backend vllm shares the candidates' GPU; cuda is needed, got {device!r}")
    if spec.models.base is None and any(METHODS[m].needs_base for m in spec.space.methods if m in METHODS):
        wanting = [m for m in spec.space.methods if m in METHODS and METHODS[m].needs_base]
        problems.append(f"models.base: missing, and {', '.join(wanting)} need a base model")
    return problems


def _objective_problems(spec: SearchSpec) -> list[str]:
    from evomerge.algorithms.registry import ALGORITHMS
    from evomerge.methods.registry import METHODS

    wanted, search = spec.search.objectives, spec.search
    fit = {name: a.several if wanted == "pareto" else a.one for name, a in ALGORITHMS.items()}
    problems = []
    if not fit[search.algorithm]:
        able = ", ".join(sorted(name for name, can in fit.items() if can))
        problems.append(f"search.objectives: {search.algorithm} cannot search for {wanted}; these can: {able}")
    sizes = search.also_minimize
    if sizes and wanted == "mean":
        problems.append("search.also_minimize: only with `objectives: pareto`")
    twice = sorted({name for name in sizes if sizes.count(name) > 1})
    problems += [f"search.also_minimize: '{name}' is listed twice" for name in twice]
    if sizes and not any(METHODS[m].copies_layers for m in spec.space.methods if m in METHODS):
        problems.append("search.also_minimize: without frankenmerge in space.methods every merge has the same size")
    if wanted == "pareto" and not 2 <= len(spec.objectives) <= MOST_OBJECTIVES:
        problems.append(
            f"search.objectives: a front is of 2 to {MOST_OBJECTIVES} objectives, a task each and what is also "
            f"minimized; got {len(spec.objectives)}"
        )
    return problems


def _explained(errors: Sequence[Any]) -> list[str]:
    """pydantic's errors in our words: one for each key, whatever number of forms its value may have."""
    found: dict[str, list[Any]] = {}
    for error in errors:
        found.setdefault(_key(error["loc"]), []).append(error)
    return [f"{key}: {_explain(key, group)}" for key, group in found.items()]


def _explain(key: str, errors: Sequence[Any]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key{suggest(key.rpartition('.')[2], _fields_at(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return "missing"
    messages = dict.fromkeys(_reason(error) for error in errors)
    return f"{'; or: '.join(messages)} (got {first['input']!r})"


def _reason(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _key(path: tuple[int | str, ...]) -> str:
    """A path as people write it: `evaluation.tasks.0.metric`, without pydantic's names for the forms of a value."""
    parts: list[str] = []
    model: Any = SearchSpec
    for part in path:
        if model is None and not isinstance(part, int):
            break  # below a plain value: the name of one of the types it may have
        parts.append(str(part))
        if not isinstance(part, int):
            model = _inside(model, part)
    return ".".join(parts)


def _inside(model: Any, name: str) -> Any:
    """What is below a key: a part of the specification, the name-to-part mapping that holds one, or None."""
    if not (isinstance(model, type) and issubclass(model, _Part)):
        return get_args(model)[1]  # a mapping: any name leads to its values
    field = model.model_fields.get(name)
    if field is None:
        return None
    if get_origin(field.annotation) is dict:
        return field.annotation
    inner = [field.annotation, *get_args(field.annotation)]
    return next((t for t in inner if isinstance(t, type) and issubclass(t, _Part)), None)


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the part found by following `path` from SearchSpec."""
    model: Any = SearchSpec
    for part in path:
        if isinstance(part, str) and model is not None:
            model = _inside(model, part)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, _Part) else []
