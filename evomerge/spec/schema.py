"""The sections of a search.yaml: models, space, evaluation, search, run; frozen. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from evomerge.system.secrets import has_secret, is_secret_name, masked

MOST_OBJECTIVES = 6
"""With more, hardly a candidate dominates another, and the volume of a front takes seconds."""

MOST, MOST_CANDIDATES, MOST_WORKERS = 100_000, 10**7, 1024
"""Upper bounds of what is counted, far above what anybody runs: a slip of the keyboard is told as what it is."""


class Section(BaseModel):
    """A part of a search.yaml: frozen, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Bounded = Annotated[float, Field(ge=-1e9, le=1e9)]


class Range(Section):
    """A narrowed gene range; a bound that is left out stays as the methods declare it."""

    low: Bounded | None = None
    high: Bounded | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class Models(Section):
    """The base model and the named sources, as references; whose tokens the merged vocabulary has.

    `shuffled` has the sources' differences from the base shuffled within every tensor: a search of nothing but noise.
    """

    base: str | None = None
    sources: dict[str, str] = Field(min_length=1)
    activations: str | None = None  # a file of the base's mean inputs, for the stages that ask for them
    tokenizer: str | None = None  # union, base or a source's name; None: the models have one vocabulary
    shuffled: bool = False

    @model_validator(mode="after")
    def _has_base(self) -> Models:
        if self.shuffled and self.base is None:
            raise ValueError("shuffled: what is shuffled are differences from a base, and none is named")
        return self

    @property
    def tokenizer_source(self) -> str | None:
        """The same as a recipe says it: union, base, or a reference."""
        return None if self.tokenizer is None else self.sources.get(self.tokenizer, self.tokenizer)

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: dict[str, str]) -> dict[str, str]:
        for name in sources:
            if not name.replace("_", "").replace("-", "").isalnum() or name == "base":
                raise ValueError(f"source name '{name}': letters, digits, - and _ only, and not 'base'")
        return sources


class Frankenmerge(Section):
    """Limits of the layer patterns."""

    min_layers: int | None = Field(None, ge=1, le=MOST)
    max_layers: int | None = Field(None, ge=1, le=MOST)
    scale: bool = False


ControlPoints = Annotated[
    dict[Literal["control_points"], Annotated[int, Field(ge=2, le=MOST)]], Field(min_length=1, max_length=1)
]


TensorGroup = Literal["attention", "ssm", "mlp", "experts", "router", "shared_experts", "norm", "rest"]


class Space(Section):
    """Which genes exist."""

    methods: list[str] = Field(["linear", "task_arithmetic", "ties", "dare_ties"], min_length=1)
    after: list[str] = []
    choose: Annotated[int, Field(ge=1, le=MOST)] | None = None  # of the sources; None: all
    method_scope: Literal["run", "layer_group"] = "run"
    # None: six groups, or as many as the models have layers
    layer_groups: Annotated[int, Field(ge=1, le=MOST)] | list[int] | Literal["per_layer"] | ControlPoints | None = None
    tensor_groups: list[TensorGroup] | None = None
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


Part = Annotated[float, Field(gt=0, le=1e9)]
Size = Literal["tokens", "layers", "parameters"]

LIMIT = r"([A-Za-z0-9_-]+)(?:\s+([-+*])\s+([0-9.]+(?:[eE][-+]?[0-9]+)?))?"
"""A limit that is relative to a model: its name, or that with a number added, taken away or multiplied."""


def _limit(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(LIMIT, value.strip()):
        raise ValueError("a number, or a model's value such as `base`, `base - 0.01`, `base * 0.98`, spaces included")
    return value


Bound = Annotated[Bounded | str, BeforeValidator(_limit)]


class Splits(Section):
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


class Judge(Section):
    """A model behind an OpenAI-compatible server that gives marks to what a merge writes."""

    endpoint: str
    model: str
    prompt: str | None = None  # a file of Jinja, or the Jinja itself; else a short one of our own
    ask: str | None = None  # Jinja: what the merge is asked; else an item's prompt, or question
    scale: list[Bounded] = Field([1.0, 10.0], min_length=2, max_length=2)
    pairwise: str | None = None  # the model whose answers the merge's are compared with: base, or a source
    max_new_tokens: int = Field(256, ge=1, le=MOST)
    stop: list[str] = []
    key: str = "OPENAI_API_KEY"  # the variable of the environment that has it
    temperature: float = Field(0.0, ge=0, le=2)
    max_reply_tokens: int = Field(512, ge=1, le=MOST)
    concurrency: int = Field(16, ge=1, le=1024)
    retries: int = Field(6, ge=0, le=100)
    timeout: float = Field(60.0, gt=0, le=86400)
    max_calls: int | None = Field(None, ge=1, le=10**9)
    max_cost: float | None = Field(None, gt=0, le=1e9)
    price: list[Annotated[float, Field(ge=0, le=1e9)]] | None = Field(None, min_length=2, max_length=2)

    @property
    def prompt_is_file(self) -> bool:
        """Whether the prompt is a file's name, and not Jinja."""
        return self.prompt is not None and "{{" not in self.prompt and "\n" not in self.prompt

    @model_validator(mode="after")
    def _sound(self) -> Judge:
        if not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: {masked(self.endpoint)!r} is no URL, such as http://127.0.0.1:8000/v1")
        if has_secret(self.endpoint):
            raise ValueError("endpoint: without a key, which comes from the environment only")
        if not is_secret_name(self.key):
            raise ValueError("key: a variable whose name ends in API_KEY, TOKEN or SECRET, so that its value is masked")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: low ({self.scale[0]:g}) is not below high ({self.scale[1]:g})")
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost: needs price: [of a million tokens of prompts, and of replies]")
        return self


class Measure(Section):
    """What gives numbers for items: an lm-eval task by its name, or a scorer and what it is called."""

    task: str
    python: str | None = None  # file.py:name or package.module:name
    judge: Judge | None = None
    agreement: str | None = None  # texts of the sources: .jsonl or .json, {"source": name, "text": ...}
    data: str | None = None  # the items of a scorer: .jsonl or .json
    options: dict[str, Any] = {}  # what a Python scorer is called with beside the model and the items

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"task": given}
        if isinstance(given, dict) and "task" not in given and isinstance(given.get("python"), str):
            file, _, name = given["python"].rpartition(":")
            stem = Path(file).stem if file.endswith(".py") else file.rpartition(".")[2]
            return {"task": f"{stem}.{name}" if stem and name != "score" else stem or name, **given}
        kinds = [kind for kind in ("judge", "agreement") if isinstance(given, dict) and kind in given]
        return {"task": kinds[0], **given} if kinds and "task" not in given else given

    @model_validator(mode="after")
    def _of_one_kind(self) -> Measure:
        if sum(kind is not None for kind in (self.python, self.judge, self.agreement)) > 1:
            raise ValueError("python, judge or agreement, not several")
        if self.python is None and self.judge is None and self.data is not None:
            raise ValueError("data is a scorer's: {python: file.py:name, data: items.jsonl}")
        if self.python is None and self.options:
            raise ValueError("options are a Python scorer's: {python: file.py:name, options: {...}}")
        if self.judge is not None and self.data is None:
            raise ValueError("a judge needs items: {judge: ..., data: questions.jsonl}")
        return self

    @property
    def is_scorer(self) -> bool:
        """Whether it is anything but an lm-eval task."""
        return any(kind is not None for kind in (self.python, self.judge, self.agreement))


class Task(Measure):
    """One benchmark that steers."""

    metric: str | None = None
    weight: float = Field(1.0, ge=1e-9, le=1e9)  # whose sums and quotients are finite
    splits: Splits | None = None
    num_fewshot: int | None = Field(None, ge=0, le=MOST)


class Limits(Section):
    """The least or the most that is allowed: a number, or relative to what one of the models has."""

    at_least: Bound | None = None
    at_most: Bound | None = None

    @model_validator(mode="after")
    def _one(self) -> Limits:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("say either at_least or at_most")
        return self


class Constraint(Section):
    """What may not get worse, or not grow: a task's metric, the tokens written an item, or a size."""

    task: str | None = None
    metric: str | None = None
    splits: Splits | None = None
    num_fewshot: int | None = Field(None, ge=0, le=MOST)
    at_least: Bound | None = None
    at_most: Bound | None = None
    tokens: Limits | None = None
    layers: Limits | None = None
    parameters: Limits | None = None

    @model_validator(mode="after")
    def _one(self) -> Constraint:
        if [self.task, self.tokens, self.layers, self.parameters].count(None) != 3:
            raise ValueError("each entry limits one thing: task, tokens, layers or parameters")
        of_task = (self.metric, self.splits, self.num_fewshot, self.at_least, self.at_most)
        if self.task is None and of_task.count(None) != len(of_task):
            raise ValueError("metric, splits, num_fewshot and limits of their own go with a task")
        if self.task is not None and (self.at_least is None) == (self.at_most is None):
            raise ValueError("say either at_least or at_most")
        return self

    @property
    def limits(self) -> Limits:
        """The limit, wherever it stands."""
        given = self.tokens or self.layers or self.parameters
        return given or Limits(at_least=self.at_least, at_most=self.at_most)


class FromModel(Section):
    """Something that one of the models has."""

    from_: str = Field(alias="from")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)


class Evaluation(Section):
    """How candidates are scored."""

    include_path: str | list[str] | None = None
    tasks: list[Task] = Field(min_length=1)
    scale: Literal["relative", "raw"] = "relative"
    splits: Splits = Splits()
    constraints: list[Constraint] = []
    guard: list[str | Measure] = []
    fitness: Literal["metric", "smooth"] | None = None  # None: what suits the space
    informative: float | None = Field(None, gt=0, lt=1)
    racing: bool = False
    cache: bool = True
    device: str = "cpu"
    # auto: the faster of float32 and bfloat16 where the run begins, which then keeps it
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_tokens: int | None = Field(None, ge=16, le=2**31)  # what suits the device
    max_length: int | None = Field(None, ge=8, le=2**31)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None  # lm-eval's default: where a chat template is applied
    system_instruction: str | None = None
    chat_template: str | FromModel | None = None  # a file, or the model that has it; else the reference's own
    chat_template_args: dict[str, Any] = {}
    think_end_token: str | int | None = None
    bootstrap_iters: int = Field(200, ge=0, le=10**6)  # samples for errors of metrics of the corpus, as in lm_eval
    backend: Literal["native", "hf", "vllm"] = "native"  # the names of evaluation.backends.registry

    @property
    def guards(self) -> list[Measure]:
        """What only guards, each as what it is."""
        return [Measure(task=part) if isinstance(part, str) else part for part in self.guard]

    @property
    def steering(self) -> list[Task]:
        """The tasks that are scored on the items that steer: those that count, and others that are limited."""
        tasks = {task.task: task for task in self.tasks}
        guards = {guard.task: guard.model_dump() for guard in self.guards}
        for one in self.constraints:
            if one.task is not None and one.task not in tasks:
                measure = {**guards.get(one.task, {"task": one.task}), "splits": one.splits}
                tasks[one.task] = Task(**measure, num_fewshot=one.num_fewshot)
        return list(tasks.values())

    @property
    def include_paths(self) -> list[str]:
        """The task folders, as a list."""
        return [self.include_path] if isinstance(self.include_path, str) else list(self.include_path or [])


class Stop(Section):
    """What ends a search before its budget does."""

    hours: float | None = Field(None, gt=0, le=1e6)
    stale_generations: int | None = Field(None, ge=1, le=MOST_CANDIDATES)
    fitness: float | None = None


class Search(Section):
    """How the space is searched."""

    algorithm: str = "ga"
    mode: Literal["generational", "asynchronous"] = "generational"
    options: dict[str, Any] = {}
    population: int | None = Field(None, ge=2, le=MOST)  # None: what suits the algorithm
    candidates: int = Field(100, ge=1, le=MOST_CANDIDATES)
    objectives: Literal["mean", "pareto"] = "mean"
    also_minimize: list[Size] = []
    seed: int = Field(0, ge=0, lt=2**63)
    baseline: Literal["random"] | None = None
    controls: list[Literal["shuffled", "lora"]] = []
    stop: Stop = Stop()
    finalists: int = Field(8, ge=1, le=MOST)
    warm_start: str | list[str] | None = None

    @property
    def warm_starts(self) -> list[str]:
        """The runs and recipes to start from, as a list."""
        return [self.warm_start] if isinstance(self.warm_start, str) else list(self.warm_start or [])


class Run(Section):
    """Where the run lives."""

    dir: str | None = None
    executor: Literal["local", "ray"] = "local"
    workers: int = Field(1, ge=1, le=MOST_WORKERS)  # processes that score candidates; 1: this one, but for Ray
    ray_address: str | None = None  # HOST:PORT of a cluster, or auto; None: a Ray of the run's own
    ray_resources: dict[str, Annotated[float, Field(gt=0, le=1e15)]] | None = None  # of an actor; None: what it needs
    storage: str | None = None
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []  # the names of trackers.registry
    keep: int = Field(1, ge=0, le=MOST)


class SearchSpec(Section):
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
