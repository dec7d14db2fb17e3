"""The sections of a search.yaml: models, space, evaluation, search, run; frozen. Imports no torch."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from evomerge.errors import BadInput
from evomerge.methods.registry import METHODS, STAGES
from evomerge.system.memory import parse_size
from evomerge.system.secrets import has_secret, is_secret_name, masked

DIALECT = "https://json-schema.org/draft/2020-12/schema"

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

    low: Bounded | None = Field(None, description="Smallest value.")
    high: Bounded | None = Field(None, description="Largest value.")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class Models(Section):
    """The base model and the named sources, as references; whose tokens the merged vocabulary has.

    `shuffled` has the sources' differences from the base shuffled within every tensor: a search of nothing but noise.
    `winners` are sources that earlier rounds of a search have made: what recipes call them, and their folder.
    """

    base: str | None = Field(
        None,
        description="The model that the sources were tuned from: a folder, a Hub id (ORG/NAME@REVISION), "
        "base+adapter, a .safetensors file, zoo:NAME. Task vectors are differences from it; without one "
        "only methods that need none.",
    )
    sources: dict[str, str] = Field(
        min_length=1, description="The models that are merged: a name of your own for each, and its reference."
    )
    activations: str | None = Field(
        None, description="A file of the base's mean inputs, for methods and stages that ask for them."
    )
    tokenizer: str | None = Field(
        None,
        description="Where vocabularies differ, whose tokens the merge has: union, base, or a source's name. Left out "
        "where the models have one vocabulary.",
    )
    shuffled: bool = Field(
        False, description="Shuffle the sources' differences from the base within every tensor: a search of mere noise."
    )
    winners: dict[str, str] = Field(
        {}, description="Written by a search in rounds: the folders of sources that its earlier rounds made."
    )

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

    min_layers: int | None = Field(
        None, ge=1, le=MOST, description="Fewest layers of a merge; left out: as many as the models have."
    )
    max_layers: int | None = Field(
        None, ge=1, le=MOST, description="Most layers of a merge; left out: as many as the models have."
    )
    scale: bool = Field(False, description="Search how loud each copied layer is, too.")


ControlPoints = Annotated[
    dict[Literal["control_points"], Annotated[int, Field(ge=2, le=MOST)]], Field(min_length=1, max_length=1)
]


TensorGroup = Literal["attention", "ssm", "mlp", "experts", "router", "shared_experts", "norm", "rest"]


class Space(Section):
    """Which genes exist."""

    methods: list[str] = Field(
        ["linear", "task_arithmetic", "ties", "dare_ties"],
        min_length=1,
        description="Merge methods to choose from; `evomerge methods` lists them.",
    )
    after: list[str] = Field([], description="Stages that follow every merge, in this order, such as svc.")
    choose: Annotated[int, Field(ge=1, le=MOST)] | None = Field(
        None,
        description="How many of the sources a candidate merges: which ones is searched, too. Left out: all of them.",
    )
    method_scope: Literal["run", "layer_group"] = Field(
        "run", description="Whether a candidate has one method, or one for each layer group."
    )
    # None: six groups, or as many as the models have layers
    layer_groups: Annotated[int, Field(ge=1, le=MOST)] | list[int] | Literal["per_layer"] | ControlPoints | None = (
        Field(
            None,
            description="Genes along the depth: how many groups of layers, the first layers of groups, per_layer, or "
            "{control_points: N} with values in between interpolated. Left out: six, or as many as there "
            "are layers.",
        )
    )
    tensor_groups: list[TensorGroup] | None = Field(
        None, description="Groups of a layer's tensors that have genes of their own."
    )
    genes: dict[str, Range] = Field(
        {}, description="Narrower ranges, by the parameter's name; one that is not searched otherwise becomes so."
    )
    frankenmerge: Frankenmerge = Field(
        Frankenmerge(), description="Limits of layer patterns, where frankenmerge is among the methods."
    )

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

    search: Part = Field(0.25, description="Items that steer: a fraction, or a number of items above 1.")
    select: Part = Field(0.25, description="Items that choose the winner among the finalists, and steer nothing.")
    test: Part = Field(0.5, description="Items that are read once, for the winner and what it is compared with.")

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

    endpoint: str = Field(description="URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")
    model: str = Field(description="The judge's name there.")
    prompt: str | None = Field(
        None,
        description="A file of Jinja, or the Jinja itself, that asks for a mark; left out: a short one of our own.",
    )
    ask: str | None = Field(
        None, description="Jinja: what the merge is asked; left out: an item's prompt, or question."
    )
    scale: list[Bounded] = Field([1.0, 10.0], min_length=2, max_length=2, description="[lowest, highest] mark.")
    pairwise: str | None = Field(
        None, description="The model whose answers the merge's are compared with: base, or a source."
    )
    max_new_tokens: int = Field(256, ge=1, le=MOST, description="Longest answer of the merge.")
    stop: list[str] = Field([], description="Texts that end an answer of the merge.")
    # of the variable: its value is written nowhere
    key: str = Field("OPENAI_API_KEY", description="The variable of the environment that has the server's key.")
    temperature: float = Field(0.0, ge=0, le=2, description="Of the judge; 0 gives the same marks again.")
    max_reply_tokens: int = Field(512, ge=1, le=MOST, description="Longest reply of the judge.")
    concurrency: int = Field(16, ge=1, le=1024, description="Questions to the judge at once.")
    retries: int = Field(6, ge=0, le=100, description="How often a question is asked again where the server fails.")
    timeout: float = Field(60.0, gt=0, le=86400, description="Seconds to wait for a reply.")
    max_calls: int | None = Field(None, ge=1, le=10**9, description="Most questions of the whole run.")
    max_cost: float | None = Field(
        None, gt=0, le=1e9, description="Most that the whole run may cost, in the unit of price."
    )
    price: list[Annotated[float, Field(ge=0, le=1e9)]] | None = Field(
        None, min_length=2, max_length=2, description="[of a million tokens of prompts, of replies]."
    )

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

    task: str = Field(
        description="The task's name in lm-eval, or the path of its YAML file; of a scorer, what it is called."
    )
    python: str | None = Field(None, description="A scorer of your own: FILE.py:NAME or package.module:NAME.")
    judge: Judge | None = Field(None, description="A model behind a server that gives marks to what a merge writes.")
    agreement: str | None = Field(
        None, description="Texts of the sources, .jsonl or .json, on which the merge should expect what they do."
    )
    data: str | None = Field(None, description="The items of a scorer: a .jsonl or .json file.")
    options: dict[str, Any] = Field(
        {}, description="What a Python scorer is called with beside the model and the items."
    )

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

    metric: str | None = Field(
        None, description="The metric that counts, by any name that lm-eval prints; left out: the task's first."
    )
    # bounded, so that sums and quotients of weights are finite
    weight: float = Field(1.0, ge=1e-9, le=1e9, description="How much the task counts in the mean.")
    splits: Splits | None = Field(None, description="Other sizes of the splits, for this task.")
    num_fewshot: int | None = Field(
        None, ge=0, le=MOST, description="Examples before each question; left out: what the task says."
    )


class Limits(Section):
    """The least or the most that is allowed: a number, or relative to what one of the models has."""

    at_least: Bound | None = Field(
        None, description="The least that is allowed: a number, or a model's value such as `base - 0.01`."
    )
    at_most: Bound | None = Field(
        None, description="The most that is allowed: a number, or a model's value such as `base * 1.02`."
    )

    @model_validator(mode="after")
    def _one(self) -> Limits:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("say either at_least or at_most")
        return self


class Constraint(Section):
    """What may not get worse, or not grow: a task's metric, the tokens written an item, or a size."""

    task: str | None = Field(None, description="A task whose metric is limited.")
    metric: str | None = Field(None, description="Its metric; left out: the task's first.")
    splits: Splits | None = Field(None, description="Sizes of its splits.")
    num_fewshot: int | None = Field(None, ge=0, le=MOST, description="Examples before each of its questions.")
    at_least: Bound | None = Field(
        None, description="The least that is allowed: a number, or a model's value such as `base - 0.01`."
    )
    at_most: Bound | None = Field(
        None, description="The most that is allowed: a number, or a model's value such as `base * 1.02`."
    )
    tokens: Limits | None = Field(None, description="Limits on the tokens written an item.")
    layers: Limits | None = Field(None, description="Limits on the number of layers.")
    parameters: Limits | None = Field(None, description="Limits on the number of parameters.")

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

    from_: str = Field(alias="from", description="A source's name, or base.")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)


class Evaluation(Section):
    """How candidates are scored."""

    include_path: str | list[str] | None = Field(
        None, description="Folders with your own lm-eval task files; they win over shipped tasks of the same name."
    )
    tasks: list[Task] = Field(
        min_length=1, description="What the merge should be good at: lm-eval's tasks, groups and tags, or YAML files."
    )
    scale: Literal["relative", "raw"] = Field(
        "relative",
        description="How tasks of different units are weighed against each other: relative divides each score by that "
        "of the best source on the same items, raw takes it as it is.",
    )
    splits: Splits = Field(
        Splits(), description="How the items of each task are divided: disjoint, drawn by the seed, never drawn again."
    )
    constraints: list[Constraint] = Field(
        [], description="What may not get worse, or not grow: a task's metric, tokens written, layers, parameters."
    )
    guard: list[str | Measure] = Field(
        [], description="Tasks that never steer: they show what a merge broke elsewhere."
    )
    fitness: Literal["metric", "smooth"] | None = Field(
        None,
        description="What candidates are compared by: metric, the one that is reported; smooth, the probability of "
        "the right choice where the task has it. Left out: smooth, but for spaces that only copy layers.",
    )
    informative: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Steer on this share of the search items only: those on which models differ, weighted so that the "
        "estimate stays unbiased.",
    )
    racing: bool = Field(
        False, description="Score candidates block by block, and stop those that will not be among the best."
    )
    cache: bool = Field(
        True,
        description="Keep scores in the user's cache folder, so that the next run on these models and items has them.",
    )
    unsafe_code: bool = Field(
        False,
        description="Tasks such as humaneval and mbpp may run programs that models write, each shut in by itself.",
    )
    device: str = Field("cpu", description="Where models run: cpu, cuda, cuda:1, mps.")
    # auto: the faster of float32 and bfloat16 where the run begins, which then keeps it
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What models compute in when they are scored; auto: the faster of float32 and bfloat16."
    )
    batch_tokens: int | None = Field(
        None, ge=16, le=2**31, description="Tokens in a batch, padding counted; left out: what suits the device."
    )
    max_length: int | None = Field(
        None, ge=8, le=2**31, description="Longest input in tokens; left out: what the model's config.json says."
    )
    apply_chat_template: bool = Field(False, description="Render prompts as conversations.")
    fewshot_as_multiturn: bool | None = Field(
        None, description="Examples as turns. Left out, as in lm-eval: where a chat template is applied."
    )
    system_instruction: str | None = Field(None, description="What every prompt begins with.")
    chat_template: str | FromModel | None = Field(
        None, description="A file, or {from: SOURCE} for that of a model; else the base's own."
    )
    chat_template_args: dict[str, Any] = Field(
        {}, description="What the template is rendered with, such as {enable_thinking: false}."
    )
    think_end_token: str | int | None = Field(
        None, description="What ends a model's thinking; only what follows counts."
    )
    bootstrap_iters: int = Field(
        200, ge=0, le=10**6, description="Samples for the errors of metrics of a whole corpus, such as BLEU."
    )
    # the names of evaluation.backends.registry
    backend: Literal["native", "hf", "vllm"] = Field(
        "native",
        description="Who computes: native shares prefixes and stops early, hf is lm-eval's HFLM, vllm is vLLM.",
    )
    vllm: dict[str, Any] = Field(
        {}, description="Arguments of vLLM's engine, such as {quantization: fp8, max_model_len: 2048}."
    )

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

    hours: float | None = Field(None, gt=0, le=1e6, description="Time of scoring, over all sessions of the run.")
    items: int | None = Field(
        None, ge=1, le=10**12, description="Item evaluations of all candidates and Jacobians together."
    )
    stale_generations: int | None = Field(
        None, ge=1, le=MOST_CANDIDATES, description="Generations in a row without a better candidate."
    )
    fitness: float | None = Field(None, description="A fitness that is good enough.")


class Search(Section):
    """How the space is searched."""

    algorithm: str = Field(
        "ga", description="ga, random, tpe, gp, cmaes, catcma, nsga2, nsga3, map_elites, or an installed plug-in's."
    )
    mode: Literal["generational", "asynchronous"] = Field(
        "generational",
        description="Whether a generation is waited for, or candidates are proposed one by one as workers get free.",
    )
    options: dict[str, Any] = Field({}, description="Settings of the algorithm.")
    population: int | None = Field(
        None, ge=2, le=MOST, description="Candidates in a generation; left out: what suits the algorithm."
    )
    candidates: int = Field(
        100, ge=1, le=MOST_CANDIDATES, description="The budget: candidates to score, failed and stopped ones counted."
    )
    rounds: int = Field(
        1,
        ge=1,
        le=1000,
        description="Parts of the budget; the winners of one are sources of the next, beside the others.",
    )
    objectives: Literal["mean", "pareto"] = Field(
        "mean", description="Whether the tasks' mean is searched for, or the Pareto front of the tasks."
    )
    also_minimize: list[Size] = Field([], description="Sizes that are objectives too, with objectives: pareto.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of the splits, the algorithm and the methods that draw.")
    baseline: Literal["random"] | None = Field(
        None, description="Also search at random with as many item evaluations, to compare with."
    )
    controls: list[Literal["shuffled", "lora"]] = Field(
        [],
        description="Searches to compare with: shuffled, of models whose differences are noise; lora, training on the "
        "same items instead.",
    )
    stop: Stop = Field(Stop(), description="What ends the search before the budget does.")
    finalists: int = Field(8, ge=1, le=MOST, description="How many of the best are scored on the select items.")
    warm_start: str | list[str] | None = Field(None, description="Runs or recipes whose best are in generation 0.")

    @property
    def warm_starts(self) -> list[str]:
        """The runs and recipes to start from, as a list."""
        return [self.warm_start] if isinstance(self.warm_start, str) else list(self.warm_start or [])


def _bytes(size: Any) -> Any:
    if not isinstance(size, str):
        return size
    try:
        return parse_size(size, "a size")
    except BadInput as error:
        raise ValueError(str(error)) from None


Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(ge=0, le=2**50),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}),
]


class Run(Section):
    """Where the run lives."""

    dir: str | None = Field(None, description="The run's folder; left out: runs/NAME.")
    executor: Literal["local", "ray"] = Field(
        "local", description="Who scores candidates: local, processes of this machine; ray, a cluster."
    )
    workers: int = Field(
        1, ge=1, le=MOST_WORKERS, description="Processes that score candidates; 1 is this one, but for Ray."
    )
    ray_address: str | None = Field(
        None, description="HOST:PORT of a Ray cluster, or auto; left out: a Ray of the run's own."
    )
    ray_resources: dict[str, Annotated[float, Field(gt=0, le=1e15)]] | None = Field(
        None, description="What each worker takes, such as {CPU: 2} or {GPU: 1}; default: what it needs."
    )
    device_memory: Bytes | None = Field(
        None,
        description="Memory of the device that the sources may take, in bytes or such as 20GB, where candidates are "
        "merged on one; left out: what is free, less the model, its activations and a margin.",
    )
    storage: str | None = Field(
        None, description="A database for the record, such as postgresql://...; left out: a file in the run's folder."
    )
    # the names of trackers.registry
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="Experiment trackers that follow the search, each installed by the extra of its name."
    )
    keep: int = Field(1, ge=0, le=MOST, description="How many of the best are kept as checkpoints, in the run's best/.")


class SearchSpec(Section):
    """Everything a search.yaml says."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the search, and of its folder under runs/."
    )
    models: Models = Field(description="What is merged.")
    space: Space = Field(Space(), description="Which merges are searched.")
    evaluation: Evaluation = Field(description="How candidates are scored, on which items.")
    search: Search = Field(Search(), description="How the space is searched, for how long.")
    run: Run = Field(Run(), description="Where the run lives, and who scores.")

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


def search_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a search.yaml: every key with its description, type, range and default."""
    schema = SearchSpec.model_json_schema(by_alias=True)
    sections = {"SearchSpec": schema, **schema["$defs"]}
    for section in sections.values():
        for value in section["properties"].values():
            value.pop("title", None)
    named = {"type": "string", "description": "A task by its name or file."}
    for section in (name for name in ("Task", "Measure") if name in schema["$defs"]):
        whole = copy.deepcopy(schema["$defs"][section])
        whole.pop("required", None)  # a scorer has a name of its own
        schema["$defs"][section] = {"anyOf": [named, whole], "description": whole.get("description", "")}
    names = sorted({name for method in METHODS.values() for name in (method.name, *method.aliases)})
    space = schema["$defs"]["Space"]["properties"]
    space["methods"]["items"] = {"enum": names}
    space["after"]["items"] = {"enum": sorted(STAGES)}
    return {"$schema": DIALECT, **schema, "title": "search.yaml"}
