"""Reads a search.yaml: paths, defaults, the shipped files, and what is wrong in words. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from evomerge.checkpoints.reference import resolve_reference
from evomerge.errors import SpecError, suggest
from evomerge.methods.registry import METHODS, get_method
from evomerge.spec.schema import MOST_OBJECTIVES, FromModel, Measure, SearchSpec, Section
from evomerge.system.files import read_text, resolve_path
from evomerge.system.secrets import masked
from evomerge.system.yaml import MOST_YAML, read_yaml

AnyMeasure = TypeVar("AnyMeasure", bound=Measure)

Check = Callable[[SearchSpec], Sequence[str]]
"""Further problems of a specification, known to whoever reads it."""


def parse_spec(
    data: Mapping[str, Any], *, where: str = "search.yaml", beside: Path | None = None, checks: Sequence[Check] = ()
) -> SearchSpec:
    """Checks a search specification and resolves its paths.

    Args:
        data: The YAML document.
        where: Name of the file, for messages.
        beside: Folder of the file; relative model paths and task folders are looked for there, in the folders above
            it, and in the working directory.
        checks: Further checks, whose problems are told with the others.

    Raises:
        SpecError: With every problem found.
    """
    try:
        spec = SearchSpec.model_validate(dict(data))
    except ValidationError as error:
        raise SpecError([f"{where}: {text}" for text in _explained(error.errors())]) from None
    spec, problems = _resolved(spec, beside)
    problems += _problems(spec)
    problems += [problem for check in checks for problem in check(spec)]
    if problems:
        raise SpecError([f"{where}: {problem}" for problem in problems])
    return _with_fitness(spec)


def load_spec(path: Path, *, checks: Sequence[Check] = ()) -> SearchSpec:
    """Reads a search.yaml.

    Raises:
        SpecError: When the file cannot be read, is no mapping, or says something wrong.
    """
    data = read_yaml(read_text(path, SpecError, limit=MOST_YAML), str(path), SpecError)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a mapping with name, models and evaluation, got {type(data).__name__}")
    return parse_spec(data, where=str(path), beside=path.resolve().parent, checks=checks)


def _resolved(spec: SearchSpec, beside: Path | None) -> tuple[SearchSpec, list[str]]:
    """The spec with absolute paths; and what does not exist."""
    models = spec.models.model_copy(
        update={
            "base": None if spec.models.base is None else resolve_reference(spec.models.base, beside),
            "sources": {name: resolve_reference(ref, beside) for name, ref in spec.models.sources.items()},
        }
    )
    problems: list[str] = []
    include: list[str] = []
    if (seen := models.activations) is not None:
        models = models.model_copy(update={"activations": _file(seen, "models.activations", beside, problems)})
    for text in spec.evaluation.include_paths:
        folder = resolve_path(text, beside)
        if folder is None or not folder.is_dir():
            problems.append(f"evaluation.include_path: no folder {text} beside the file, above it or in {Path.cwd()}")
        else:
            include.append(str(folder))
    evaluation = spec.evaluation.model_copy(
        update={
            "include_path": include or None,
            "tasks": _located(spec.evaluation.tasks, "evaluation.tasks", beside, problems),
            "guard": [
                part if part.is_scorer else part.task
                for part in _located(spec.evaluation.guards, "evaluation.guard", beside, problems)
            ],
            "constraints": [
                one.model_copy(update={"task": one.task and _task_path(one.task, beside)})
                for one in spec.evaluation.constraints
            ],
        }
    )
    if isinstance(given := spec.evaluation.chat_template, str):
        template = resolve_path(given, beside)
        if template is None or not template.is_file():
            problems.append(f"evaluation.chat_template: no file {given}; a model's is {{from: NAME}}")
        else:
            evaluation = evaluation.model_copy(update={"chat_template": str(template)})
    # One that is missing is no problem to a run that has begun; `evomerge.run.warm_start` tells of it to any other.
    warm = [str(resolve_path(text, beside) or text) for text in spec.search.warm_starts]
    search = spec.search.model_copy(update={"warm_start": warm or None})
    return spec.model_copy(update={"models": models, "evaluation": evaluation, "search": search}), problems


def _located(parts: Sequence[AnyMeasure], key: str, beside: Path | None, problems: list[str]) -> list[AnyMeasure]:
    """Tasks and scorers with absolute paths; adds what does not exist."""
    located = []
    for k, part in enumerate(parts):
        update: dict[str, Any] = {} if part.is_scorer else {"task": _task_path(part.task, beside)}
        if part.python is not None:
            file, colon, name = part.python.rpartition(":")
            if not file or not name:
                problems.append(f"{key}.{k}.python: {part.python!r} is not FILE.py:NAME or PACKAGE.MODULE:NAME")
            elif file.endswith(".py"):
                update["python"] = f"{_file(file, f'{key}.{k}.python', beside, problems)}{colon}{name}"
        if part.agreement is not None:
            update["agreement"] = _file(part.agreement, f"{key}.{k}.agreement", beside, problems)
        if part.data is not None:
            update["data"] = _file(part.data, f"{key}.{k}.data", beside, problems)
        if part.judge is not None and part.judge.prompt_is_file:
            prompt = _file(str(part.judge.prompt), f"{key}.{k}.judge.prompt", beside, problems)
            update["judge"] = part.judge.model_copy(update={"prompt": prompt})
        located.append(part.model_copy(update=update))
    return located


def _task_path(name: str, beside: Path | None) -> str:
    """A task's name; where it is that of a YAML file, its absolute path."""
    return str(resolve_path(name, beside) or name) if name.endswith((".yaml", ".yml")) else name


def _file(text: str, key: str, beside: Path | None, problems: list[str]) -> str:
    """A file's absolute path; adds that there is none."""
    path = resolve_path(text, beside)
    if path is None or not path.is_file():
        problems.append(f"{key}: no file {text} beside the file, above it or in {Path.cwd()}")
    return str(path or text)


def _with_fitness(spec: SearchSpec) -> SearchSpec:
    """Fills in the fitness that suits the space, where the file does not say.

    The probability of the right choice follows confidence as well as knowledge. Averages of models keep the first much
    as it was; stacks of copied layers do not, and a search among them finds the sure ones instead of the right ones.
    """
    if spec.evaluation.fitness is not None:
        return spec
    copied = all(get_method(name).copies_layers for name in spec.space.methods)
    evaluation = spec.evaluation.model_copy(update={"fitness": "metric" if copied else "smooth"})
    return spec.model_copy(update={"evaluation": evaluation})


def _problems(spec: SearchSpec) -> list[str]:
    """What is wrong between the keys, each of which is right by itself."""
    problems = []
    names = {*METHODS, *(alias for m in METHODS.values() for alias in m.aliases)}
    for name in spec.space.methods:
        if name not in names:
            problems.append(f"space.methods: no method '{name}'{suggest(name, names)}")
    tokenizers = ("union", "base", *spec.models.sources)
    if spec.models.tokenizer not in (None, *tokenizers):
        hint = suggest(str(spec.models.tokenizer), tokenizers) or f": choose one of {', '.join(tokenizers)}"
        problems.append(f"models.tokenizer: no source is called '{spec.models.tokenizer}'{hint}")
    tasks, guards = ([part.task for part in parts] for parts in (spec.evaluation.tasks, spec.evaluation.guards))
    problems += [f"evaluation.tasks: '{n}' is listed twice" for n in sorted({n for n in tasks if tasks.count(n) > 1})]
    problems += [f"evaluation.guard: '{n}' is one of evaluation.tasks: a guard is not" for n in guards if n in tasks]
    models = [*(["base"] if spec.models.base else []), *spec.models.sources]
    for part in (*spec.evaluation.tasks, *spec.evaluation.guards):
        if part.agreement is not None and spec.evaluation.backend != "native":
            problems.append(
                f"evaluation.backend: task '{part.task}' measures agreement, which backend native alone can"
            )
        if part.judge is not None and part.judge.pairwise not in (None, *models):
            hint = suggest(str(part.judge.pairwise), models) or f"; there are {', '.join(models)}"
            problems.append(f"evaluation: task '{part.task}': judge.pairwise: no model '{part.judge.pairwise}'{hint}")
    problems += _constraint_problems(spec)
    template = spec.evaluation.chat_template
    if isinstance(template, FromModel) and template.from_ not in (models := [*spec.models.sources, "base"]):
        problems.append(f"evaluation.chat_template: no model {template.from_!r}{suggest(template.from_, models)}")
    elif template is not None and not spec.evaluation.apply_chat_template:
        problems.append("evaluation.chat_template: only with `apply_chat_template: true`")
    problems += _vllm_problems(spec)
    methods = [METHODS[m] for m in spec.space.methods if m in METHODS]
    if spec.models.base is None and any(method.needs_base for method in methods):
        needing = [method.name for method in methods if method.needs_base]
        problems.append(f"models.base: missing, and {', '.join(needing)} need a base model")
    return problems + _objective_problems(spec) + _round_problems(spec)


def _round_problems(spec: SearchSpec) -> list[str]:
    rounds = spec.search.rounds
    if rounds == 1:
        return []
    problems = []
    if rounds > spec.search.candidates:
        problems.append(f"search.rounds: {rounds} of {spec.search.candidates} candidates: each needs one at least")
    if spec.models.tokenizer is not None:
        problems.append("search.rounds: not with models.tokenizer: winners would have another vocabulary than sources")
    names = [name for name in spec.models.sources if re.fullmatch(r"candidate-\d+", name)]
    problems += [f"models.sources: '{name}' is what search.rounds calls a winner" for name in names]
    return problems


_ENGINE_KEYS = {
    "model": "the candidate",
    "pretrained": "the candidate",
    "tokenizer": "the reference model's",
    "dtype": "evaluation.dtype",
    "load_format": "of no use to a model that is in memory",
    "max_length": "evaluation.max_length, or max_model_len here",
    "think_end_token": "evaluation.think_end_token",
    "tensor_parallel_size": "1: candidates are handed over within one process",
    "pipeline_parallel_size": "1: candidates are handed over within one process",
    "data_parallel_size": "1: run.workers score several candidates at a time",
}
"""Arguments of vLLM that are not the user's to give, and what they are."""


def _vllm_problems(spec: SearchSpec) -> list[str]:
    evaluation = spec.evaluation
    if evaluation.backend != "vllm":
        return ["evaluation.vllm: only with `backend: vllm`"] if evaluation.vllm else []
    problems = [f"evaluation.vllm.{key}: is {_ENGINE_KEYS[key]}" for key in evaluation.vllm if key in _ENGINE_KEYS]
    if evaluation.device.split(":")[0] not in ("cpu", "cuda"):
        problems.append(f"evaluation.device: backend vllm runs on cpu or cuda, got {evaluation.device!r}")
    return problems


def _constraint_problems(spec: SearchSpec) -> list[str]:
    problems = []
    models = [*spec.models.sources, *(["base"] if spec.models.base is not None else [])]
    steering = {task.task for task in spec.evaluation.tasks}
    for k, constraint in enumerate(spec.evaluation.constraints):
        key, limits = f"evaluation.constraints.{k}", constraint.limits
        bound = limits.at_least if limits.at_most is None else limits.at_most
        model = bound.split()[0] if isinstance(bound, str) else None
        if model is not None and model not in models:
            problems.append(f"{key}: no model is called '{model}'{suggest(model, models)}; one of {', '.join(models)}")
        if constraint.task in steering and (constraint.splits or constraint.num_fewshot is not None):
            problems.append(f"{key}: '{constraint.task}' steers; its splits and num_fewshot are those under tasks")
    return problems


def _objective_problems(spec: SearchSpec) -> list[str]:
    sizes, several = spec.search.also_minimize, spec.search.objectives == "pareto"
    problems = []
    if sizes and not several:
        problems.append("search.also_minimize: only with `objectives: pareto`")
    twice = sorted({name for name in sizes if sizes.count(name) > 1})
    problems += [f"search.also_minimize: '{name}' is listed twice" for name in twice]
    if {"layers", "parameters"} & {*sizes} and not any(
        METHODS[m].copies_layers for m in spec.space.methods if m in METHODS
    ):
        problems.append("search.also_minimize: without frankenmerge in space.methods every merge has the same size")
    if several and not 2 <= len(spec.objectives) <= MOST_OBJECTIVES:
        problems.append(
            f"search.objectives: a front is of 2 to {MOST_OBJECTIVES} objectives, a task each and what is also "
            f"minimized; got {len(spec.objectives)}"
        )
    return problems


def _explained(errors: Sequence[Any]) -> list[str]:
    """pydantic's errors in our words: one for each key, whatever number of forms its value may have."""
    by_key: dict[str, list[Any]] = {}
    for error in errors:
        by_key.setdefault(_key(error["loc"]), []).append(error)
    return [f"{key}: {_explain(key, group)}" for key, group in by_key.items()]


def _explain(key: str, errors: Sequence[Any]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key{suggest(key.rpartition('.')[2], _fields_at(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return "missing"
    messages = dict.fromkeys(_reason(error) for error in errors)
    return masked(f"{'; or: '.join(messages)} (got {first['input']!r})")


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
    if not (isinstance(model, type) and issubclass(model, Section)):
        return get_args(model)[1]  # a mapping: any name leads to its values
    field = model.model_fields.get(name)
    if field is None:
        return None
    if get_origin(field.annotation) is dict:
        return field.annotation
    inner = [field.annotation, *get_args(field.annotation)]
    return next((t for t in inner if isinstance(t, type) and issubclass(t, Section)), None)


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the part found by following `path` from SearchSpec."""
    model: Any = SearchSpec
    for part in path:
        if isinstance(part, str) and model is not None:
            model = _inside(model, part)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, Section) else []


def shipped_folder() -> Path:
    """Returns the folder that holds `search_spaces` and `eval`."""
    packaged = Path(__file__).parent.parent / "_data"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent


def find_search(text: str) -> Path:
    """Returns a search.yaml by its path, or a shipped one by its name ("quickstart").

    Raises:
        SpecError: When there is neither.
    """
    path = Path(text)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in (shipped_folder() / "search_spaces").glob("*.yaml")}
    if path.name == text and path.stem in shipped:
        return shipped[path.stem]
    if path.exists():  # a folder or a pipe: who reads it says what is wrong with that
        return path
    names = ", ".join(sorted(shipped))
    raise SpecError(f"{text}: no such file{suggest(text, shipped)}; by name there are {names}")
