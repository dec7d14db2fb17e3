"""JSON Schema of a search.yaml, for editors and for the reference: the sections, every key described."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.methods.registry import METHODS, STAGES
from evomerge.spec.schema import SearchSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"

DESCRIPTIONS: Mapping[str, Mapping[str, str]] = {
    "SearchSpec": {
        "name": "Name of the search, and of its folder under runs/.",
        "models": "What is merged.",
        "space": "Which merges are searched.",
        "evaluation": "How candidates are scored, on which items.",
        "search": "How the space is searched, for how long.",
        "run": "Where the run lives, and who scores.",
    },
    "Models": {
        "base": "The model that the sources were tuned from: a folder, a Hub id (ORG/NAME@REVISION), base+adapter, a "
        ".safetensors file, zoo:NAME. Task vectors are differences from it; without one only methods that need none.",
        "sources": "The models that are merged: a name of your own for each, and its reference.",
        "tokenizer": "Where vocabularies differ, whose tokens the merge has: union, base, or a source's name. Left out "
        "where the models have one vocabulary.",
        "activations": "A file of the base's mean inputs, for methods and stages that ask for them.",
        "shuffled": "Shuffle the sources' differences from the base within every tensor: a search of mere noise.",
    },
    "Space": {
        "methods": "Merge methods to choose from; `evomerge methods` lists them.",
        "choose": "How many of the sources a candidate merges: which ones is searched, too. Left out: all of them.",
        "after": "Stages that follow every merge, in this order, such as svc.",
        "method_scope": "Whether a candidate has one method, or one for each layer group.",
        "layer_groups": "Genes along the depth: how many groups of layers, the first layers of groups, per_layer, or "
        "{control_points: N} with values in between interpolated. Left out: six, or as many as there are layers.",
        "tensor_groups": "Groups of a layer's tensors that have genes of their own.",
        "genes": "Narrower ranges, by the parameter's name; one that is not searched otherwise becomes so.",
        "frankenmerge": "Limits of layer patterns, where frankenmerge is among the methods.",
    },
    "Range": {"low": "Smallest value.", "high": "Largest value."},
    "Frankenmerge": {
        "min_layers": "Fewest layers of a merge; left out: as many as the models have.",
        "max_layers": "Most layers of a merge; left out: as many as the models have.",
        "scale": "Search how loud each copied layer is, too.",
    },
    "Evaluation": {
        "include_path": "Folders with your own lm-eval task files; they win over shipped tasks of the same name.",
        "tasks": "What the merge should be good at: lm-eval's tasks, groups and tags, or YAML files.",
        "scale": "How tasks of different units are weighed against each other: relative divides each score by that of "
        "the best source on the same items, raw takes it as it is.",
        "splits": "How the items of each task are divided: disjoint, drawn by the seed, never drawn again.",
        "constraints": "What may not get worse, or not grow: a task's metric, tokens written, layers, parameters.",
        "guard": "Tasks that never steer: they show what a merge broke elsewhere.",
        "fitness": "What candidates are compared by: metric, the one that is reported; smooth, the probability of the "
        "right choice where the task has it. Left out: smooth, but for spaces that only copy layers.",
        "informative": "Steer on this share of the search items only: those on which models differ, weighted so that "
        "the estimate stays unbiased.",
        "racing": "Score candidates block by block, and stop those that will not be among the best.",
        "cache": "Keep scores in the user's cache folder, so that the next run on these models and items has them.",
        "device": "Where models run: cpu, cuda, cuda:1, mps.",
        "dtype": "What models compute in when they are scored; auto: the faster of float32 and bfloat16.",
        "batch_tokens": "Tokens in a batch, padding counted; left out: what suits the device.",
        "max_length": "Longest input in tokens; left out: what the model's config.json says.",
        "apply_chat_template": "Render prompts as conversations.",
        "fewshot_as_multiturn": "Examples as turns. Left out, as in lm-eval: where a chat template is applied.",
        "system_instruction": "What every prompt begins with.",
        "chat_template": "A file, or {from: SOURCE} for that of a model; else the base's own.",
        "chat_template_args": "What the template is rendered with, such as {enable_thinking: false}.",
        "think_end_token": "What ends a model's thinking; only what follows counts.",
        "bootstrap_iters": "Samples for the errors of metrics of a whole corpus, such as BLEU.",
        "backend": "Who computes: native shares prefixes and stops early, hf is lm-eval's HFLM, vllm needs a GPU.",
    },
    "Measure": {
        "task": "The task's name in lm-eval, or the path of its YAML file; of a scorer, what it is called.",
        "python": "A scorer of your own: FILE.py:NAME or package.module:NAME.",
        "data": "The items of a scorer: a .jsonl or .json file.",
        "judge": "A model behind a server that gives marks to what a merge writes.",
        "agreement": "Texts of the sources, .jsonl or .json, on which the merge should expect what they do.",
        "options": "What a Python scorer is called with beside the model and the items.",
    },
    "Task": {
        "metric": "The metric that counts, by any name that lm-eval prints; left out: the task's first.",
        "weight": "How much the task counts in the mean.",
        "splits": "Other sizes of the splits, for this task.",
        "num_fewshot": "Examples before each question; left out: what the task says.",
    },
    "Judge": {
        "endpoint": "URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.",
        "model": "The judge's name there.",
        "prompt": "A file of Jinja, or the Jinja itself, that asks for a mark; left out: a short one of our own.",
        "ask": "Jinja: what the merge is asked; left out: an item's prompt, or question.",
        "scale": "[lowest, highest] mark.",
        "pairwise": "The model whose answers the merge's are compared with: base, or a source.",
        "max_new_tokens": "Longest answer of the merge.",
        "stop": "Texts that end an answer of the merge.",
        "key": "The variable of the environment that has the server's key.",
        "temperature": "Of the judge; 0 gives the same marks again.",
        "max_reply_tokens": "Longest reply of the judge.",
        "concurrency": "Questions to the judge at once.",
        "retries": "How often a question is asked again where the server fails.",
        "timeout": "Seconds to wait for a reply.",
        "max_calls": "Most questions of the whole run.",
        "max_cost": "Most that the whole run may cost, in the unit of price.",
        "price": "[of a million tokens of prompts, of replies].",
    },
    "Constraint": {
        "task": "A task whose metric is limited.",
        "metric": "Its metric; left out: the task's first.",
        "splits": "Sizes of its splits.",
        "num_fewshot": "Examples before each of its questions.",
        "at_least": "The least that is allowed: a number, or a model's value such as `base - 0.01`.",
        "at_most": "The most that is allowed: a number, or a model's value such as `base * 1.02`.",
        "tokens": "Limits on the tokens written an item.",
        "layers": "Limits on the number of layers.",
        "parameters": "Limits on the number of parameters.",
    },
    "Limits": {
        "at_least": "The least that is allowed: a number, or a model's value such as `base - 0.01`.",
        "at_most": "The most that is allowed: a number, or a model's value such as `base * 1.02`.",
    },
    "FromModel": {"from": "A source's name, or base."},
    "Splits": {
        "search": "Items that steer: a fraction, or a number of items above 1.",
        "select": "Items that choose the winner among the finalists, and steer nothing.",
        "test": "Items that are read once, for the winner and what it is compared with.",
    },
    "Search": {
        "algorithm": "ga, random, tpe, gp, cmaes, catcma, nsga2, nsga3, map_elites, or an installed plug-in's.",
        "mode": "Whether a generation is waited for, or candidates are proposed one by one as workers get free.",
        "options": "Settings of the algorithm.",
        "population": "Candidates in a generation; left out: what suits the algorithm.",
        "candidates": "The budget: candidates to score, failed and stopped ones counted.",
        "objectives": "Whether the tasks' mean is searched for, or the Pareto front of the tasks.",
        "also_minimize": "Sizes that are objectives too, with objectives: pareto.",
        "seed": "Of the splits, the algorithm and the methods that draw.",
        "baseline": "Also search at random with as many item evaluations, to compare with.",
        "controls": "Searches to compare with: shuffled, of models whose differences are noise; lora, training on the "
        "same items instead.",
        "stop": "What ends the search before the budget does.",
        "finalists": "How many of the best are scored on the select items.",
        "warm_start": "Runs or recipes whose best are in generation 0.",
    },
    "Stop": {
        "hours": "Time of scoring, over all sessions of the run.",
        "stale_generations": "Generations in a row without a better candidate.",
        "fitness": "A fitness that is good enough.",
    },
    "Run": {
        "dir": "The run's folder; left out: runs/NAME.",
        "executor": "Who scores candidates: local, processes of this machine; ray, a cluster.",
        "workers": "Processes that score candidates; 1 is this one, but for Ray.",
        "ray_address": "HOST:PORT of a Ray cluster, or auto; left out: a Ray of the run's own.",
        "ray_resources": "What each worker takes, such as {CPU: 2} or {GPU: 1}; default: what it needs.",
        "storage": "A database for the record, such as postgresql://...; left out: a file in the run's folder.",
        "track": "Experiment trackers that follow the search, each installed by the extra of its name.",
        "keep": "How many of the best are kept as checkpoints, in the run's best/.",
    },
}
"""What each key is, by section: for editors and for the reference, where a sentence is wanted and not a comment."""


def search_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a search.yaml: every key with its description, type, range and default."""
    schema = SearchSpec.model_json_schema(by_alias=True)
    sections = {"SearchSpec": schema, **schema["$defs"]}
    for name, section in sections.items():
        for key, value in section["properties"].items():
            value.pop("title", None)
            value["description"] = describe(name, key)
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


def describe(section: str, key: str) -> str:
    """Returns the description of a key; a task has what any measure has."""
    own = DESCRIPTIONS.get(section, {})
    return own.get(key) or DESCRIPTIONS["Measure"].get(key, "")


def undescribed() -> Iterator[str]:
    """Yields the keys that have no description."""
    schema = SearchSpec.model_json_schema(by_alias=True)
    for name, section in {"SearchSpec": schema, **schema["$defs"]}.items():
        yield from (f"{name}.{key}" for key in section["properties"] if not describe(name, key))
