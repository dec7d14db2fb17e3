"""The same recipes through mergekit and through this engine, tensor by tensor.

    python bench/parity.py --mergekit /path/to/mergekit/bin/python [--models models]

mergekit lives in an environment of its own (`python -m venv mk && mk/bin/pip install torch mergekit`) and is called as
its users call it, once in a process for all recipes. Every recipe is run on tiny random models in float32, and with
`--models` on real ones (a folder with `base` and fine-tunes of it). It is computed in float32 by both, and written as
float32 (target: 1e-6 of the tensor's largest element) and as bfloat16 (target: one rounding step).

What differs by more is explained in the table: elements that are decided by a hair or that differ on purpose are
counted (`parity_reasons`) and left out of the largest difference; and where there is any difference in float32,
mergekit is run again with `dtype: float64`, against which this engine, whose inner products and votes are float64 in
any case, has to agree if the difference was mergekit's rounding. Stochastic methods cannot agree element by element:
their mean and variance over seeds are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.parity_reasons import ROUNDING, Reasons, reasons
from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.errors import EvoMergeError
from evomerge.methods.registry import METHODS
from evomerge.planning.plan import align_and_plan
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder

RESULTS = Path(__file__).parent / "results" / "parity.md"
SEEDS = 12
_EXPERT = re.compile(r"\.experts\.\d+\.")
DRIVER = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for line in sys.stdin:
    job = json.loads(line)
    options = MergeOptions(lazy_unpickle=True, quiet=True, random_seed=job["seed"], write_model_card=False)
    error = None
    try:
        run_merge(MergeConfiguration.model_validate(job["config"]), job["out"], options)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:200]
    print("answer " + json.dumps(error), flush=True)
"""

DELIBERATE = {
    "dare": "kept elements are divided by the density (the paper), not scaled to the delta's L1 norm",
    "della": "kept elements are divided by their own probability (the paper), not scaled to the delta's L1 norm",
    "model_stock": "deltas that point apart (mean cosine below 0) leave the base; mergekit extrapolates away from it",
    "arcee_fusion": "float64 importance and exact quartiles; mergekit's are float32, and sampled above 1M elements",
    "sce": "weighs the models by their squares however small; mergekit weighs them alike where these sum below 1e-6",
    "multislerp": "a tensor that no source changed stays the base's; mergekit refuses a mean direction of length 0",
    "negative weights": "normalised by the sum of absolute weights: ties cannot blow up when weights cancel",
    "cancel": "an average whose weights sum to 0 is refused",
    "karcher": "`weight` counts, with a warning; mergekit passes it over",
    "experts": "single experts are trimmed one by one; mergekit stacks those of a layer and trims them together",
    "integers": "integer buffers (indices) are copied; mergekit multiplies them and cuts the result off",
}


@dataclass(frozen=True)
class Case:
    """A recipe without its models' paths: `{base}`, `{a}`, `{b}`, `{c}` stand for them.

    Attributes:
        name: For the table.
        recipe: The recipe.
        stochastic: Draws random numbers.
        differs: Why the results may differ on purpose, or None.
    """

    name: str
    recipe: Mapping[str, Any]
    stochastic: bool = False
    differs: str | None = None


def models(method: str, own: list[dict[str, Any]], *, base: bool = True, **top: Any) -> dict[str, Any]:
    listed = [{"model": f"{{{name}}}", "parameters": values} for name, values in zip("abc", own, strict=False)]
    return {"merge_method": method, **({"base_model": "{base}"} if base else {}), "models": listed, **top}


W3 = [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.4}]
D3 = [w | {"density": d} for w, d in zip(W3, (0.5, 0.4, 0.7), strict=True)]


def cases(depth: int) -> Iterator[Case]:
    """Every shared method, with what recipes do to its parameters."""
    half = depth // 2
    yield Case("linear", models("linear", W3, base=False))
    yield Case("linear, not normalised", models("linear", W3, base=False, parameters={"normalize": False}))
    yield Case("task_arithmetic", models("task_arithmetic", W3))
    yield Case("task_arithmetic, lambda", models("task_arithmetic", W3, parameters={"lambda": 0.7}))
    yield Case("task_arithmetic, normalised", models("task_arithmetic", W3, parameters={"normalize": True}))
    gradient = [{"weight": [0.1, 0.9, 0.4]}, {"weight": [1.0, 0.0]}]
    yield Case("task_arithmetic, gradients", models("task_arithmetic", gradient))
    filters = [
        {"weight": [{"filter": "self_attn", "value": [0.2, 0.8]}, {"filter": "mlp", "value": 0.1}, {"value": 0.5}]},
        {"weight": [{"filter": "norm", "value": 1.0}, {"value": [0.6, 0.1, 0.3]}]},
    ]
    yield Case("task_arithmetic, filters", models("task_arithmetic", filters))
    yield Case("ties", models("ties", D3))
    yield Case("ties, not normalised", models("ties", D3, parameters={"normalize": False, "lambda": 1.3}))
    density = [
        {"weight": 1.0, "density": [1.0, 0.7, 0.1]},
        {"weight": 0.5, "density": [{"filter": "mlp", "value": 0.3}, {"value": 0.8}]},
    ]
    yield Case("ties, density gradient and filter", models("ties", density))
    yield Case("ties, int8_mask", models("ties", D3, parameters={"int8_mask": True}))
    yield Case(
        "ties, one weight negative",
        models("ties", [{"weight": 1.0, "density": 0.6}, {"weight": -0.4, "density": 0.6}]),
        differs=DELIBERATE["negative weights"],
    )
    yield Case("slerp", slerp({"t": 0.35}))
    curve = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    yield Case("slerp, gradients and filters", slerp({"t": curve}))
    yield Case(
        "slices",
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        {"model": "{a}", "layer_range": [0, half], "parameters": {"weight": 0.7}},
                        {"model": "{b}", "layer_range": [0, half], "parameters": {"weight": 0.3}},
                    ]
                },
                {
                    "sources": [
                        {"model": "{b}", "layer_range": [half, depth], "parameters": {"weight": 1}},
                        {"model": "{c}", "layer_range": [half, depth], "parameters": {"weight": 1}},
                    ]
                },
            ],
        },
    )
    yield Case(
        "slices of ties",
        {
            "merge_method": "ties",
            "base_model": "{base}",
            "parameters": {"weight": 0.5},
            "slices": [
                {
                    "sources": [
                        {"model": "{base}", "layer_range": [0, half]},
                        {"model": "{a}", "layer_range": [0, half], "parameters": {"density": 0.5}},
                        {"model": "{b}", "layer_range": [0, half], "parameters": {"density": [0.2, 0.9]}},
                    ]
                },
                {
                    "parameters": {"weight": 0.9},
                    "sources": [
                        {"model": "{base}", "layer_range": [half, depth]},
                        {"model": "{b}", "layer_range": [half, depth], "parameters": {"density": 0.5}},
                        {"model": "{c}", "layer_range": [half, depth], "parameters": {"density": 1, "weight": 0.2}},
                    ],
                },
            ],
        },
    )
    yield Case(
        "passthrough, stacked",
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "{a}", "layer_range": [0, half + 1]}]},
                {"sources": [{"model": "{b}", "layer_range": [half - 1, depth]}]},
            ],
        },
    )
    yield Case(
        "passthrough, scaled",
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "{a}", "layer_range": [0, half]}]},
                {
                    "sources": [
                        {
                            "model": "{b}",
                            "layer_range": [half, depth],
                            "parameters": {
                                "scale": [
                                    {"filter": "o_proj", "value": 0.5},
                                    {"filter": "down_proj", "value": 0.5},
                                    {"value": 1.0},
                                ]
                            },
                        }
                    ]
                },
            ],
        },
    )
    crumbs = [d | {"gamma": 0.02} for d in D3]
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        yield Case(method, models(method, crumbs))
    for method, own in (("ties", D3), ("breadcrumbs", crumbs), ("breadcrumbs_ties", crumbs)):
        yield Case(f"{method}, rescaled", models(method, own, parameters={"rescale": True}))
    few = [w | {"density": 1e-3} for w in W3]  # of a norm, less than one element
    yield Case("ties, density x n below 1", models("ties", few))
    yield Case("breadcrumbs, density x n below 1", models("breadcrumbs", few))
    cancel = [{"weight": 0.5}, {"weight": -0.5}]
    normalized = {"parameters": {"normalize": True}}
    yield Case("task_arithmetic, weights cancel", models("task_arithmetic", cancel, **normalized))
    yield Case("ties, weights cancel", models("ties", cancel, **normalized), differs=DELIBERATE["negative weights"])
    yield Case("linear, weights cancel", models("linear", cancel, base=False), differs=DELIBERATE["cancel"])
    for method in ("linear", "ties", "karcher"):
        own = [{}, {}, {}] if method == "karcher" else D3 if method == "ties" else W3
        yield Case(f"{method}, float64", models(method, own, base=method == "ties", dtype="float64"))
    for outside in (-0.4, 1.3):
        yield Case(f"slerp, t = {outside}", slerp({"t": outside}))
    yield Case("model_stock", models("model_stock", [{}, {}, {}]), differs=DELIBERATE["model_stock"])
    yield Case(
        "model_stock, filter-wise",
        models("model_stock", [{}, {}, {}], parameters={"filter_wise": True}),
        differs=DELIBERATE["model_stock"],
    )
    yield Case("sce", models("sce", [{}, {}, {}], parameters={"select_topk": 0.6}), differs=DELIBERATE["sce"])
    yield Case("sce, all", models("sce", [{}, {}, {}]), differs=DELIBERATE["sce"])
    yield Case("ram", models("ram", [{}, {}, {}], parameters={"epsilon": 0.01}))
    plus = {"epsilon": 0.01, "r": 0.5, "alpha": 1.0}
    yield Case("ramplus_tl", models("ramplus_tl", [{}, {}, {}], parameters=plus))
    yield Case("nuslerp", models("nuslerp", W3[:2], base=False))
    yield Case("nuslerp, on deltas", models("nuslerp", W3[:2]))
    yield Case(
        "nuslerp, row-wise",
        models("nuslerp", W3[:2], base=False, parameters={"nuslerp_row_wise": True, "nuslerp_flatten": False}),
    )
    yield Case("multislerp", models("multislerp", W3, base=False))
    yield Case("multislerp, on deltas", models("multislerp", W3), differs=DELIBERATE["multislerp"])
    yield Case("karcher", models("karcher", [{}, {}, {}], base=False))
    yield Case("karcher, weights", models("karcher", W3, base=False), differs=DELIBERATE["karcher"])
    yield Case("nearswap", models("nearswap", [{}], parameters={"t": 0.01}))
    yield Case("arcee_fusion", models("arcee_fusion", [{}]), differs=DELIBERATE["arcee_fusion"])
    yield Case("dare_linear", models("dare_linear", D3), stochastic=True, differs=DELIBERATE["dare"])
    yield Case("dare_linear, not rescaled", models("dare_linear", D3, parameters={"rescale": False}), stochastic=True)
    yield Case("dare_ties", models("dare_ties", D3), stochastic=True, differs=DELIBERATE["dare"])
    for method in ("della", "della_linear"):
        own = [d | {"epsilon": 0.1} for d in D3]
        yield Case(method, models(method, own), stochastic=True, differs=DELIBERATE["della"])


def stored_otherwise() -> Iterator[Case]:
    """Models whose files differ in more than their numbers."""
    yield Case("slerp, a tensor of zeros", slerp({"t": 0.35}, "{zeros}"))
    yield Case("slerp, t = 1.3, a tensor of zeros", slerp({"t": 1.3}, "{zeros}"))
    for name in ("gpt2", "mixtral"):
        words = {"gpt2": "without `transformer.`", "mixtral": "with experts in one tensor"}[name]
        yield Case(f"linear, {name} {words} and otherwise", {"merge_method": "linear", "models": [*both(name)]})
        yield Case(f"linear, {name} otherwise and {words}", {"merge_method": "linear", "models": [*both(name)][::-1]})
        for base in (f"{{{name}}}", f"{{{name}_a}}"):
            recipe = {"merge_method": "ties", "base_model": base, "models": [*both(name)]}
            part = "the base" if base == f"{{{name}}}" else "a source"
            purpose = DELIBERATE["experts"] if name == "mixtral" else None
            yield Case(f"ties, {name} {words} is {part}", recipe, differs=purpose)
    single = [{"model": f"{{mixtral_{end}}}", "parameters": {"weight": 0.5, "density": 0.5}} for end in "ab"]
    recipe = {"merge_method": "ties", "base_model": "{mixtral_a}", "models": single}
    yield Case("ties, mixtral with experts one by one", recipe, differs=DELIBERATE["experts"])
    scaled = [{"model": "{donut}", "parameters": {"scale": 0.5}}]
    recipe = {"merge_method": "passthrough", "models": scaled}
    yield Case("passthrough, scaled integer buffers", recipe, differs=DELIBERATE["integers"])


def both(name: str) -> list[dict[str, Any]]:
    own = {"weight": 0.5, "density": 0.5}
    return [{"model": f"{{{name}{end}}}", "parameters": own} for end in ("", "_a")]


def slerp(parameters: dict[str, Any], other: str = "{a}") -> dict[str, Any]:
    return {
        "merge_method": "slerp",
        "base_model": "{base}",
        "models": [{"model": "{base}"}, {"model": other}],
        "parameters": parameters,
    }


def with_paths(value: Any, paths: Mapping[str, str]) -> Any:
    """The recipe with its models' paths filled in."""
    if isinstance(value, str):
        return paths.get(value, value)
    if isinstance(value, Mapping):
        return {with_paths(key, paths): with_paths(entry, paths) for key, entry in value.items()}
    return [with_paths(entry, paths) for entry in value] if isinstance(value, list) else value


@dataclass
class Differences:
    """How far two checkpoints are apart.

    Attributes:
        largest: Largest difference over the tensor's largest element, but for what has a reason.
        steps: Largest difference in units of the last place of bfloat16, but for what has a reason.
        where: The tensor with the largest difference.
        differing: Elements that differ by more than rounding, those with a reason left out.
        hair: Elements that differ and are decided by a hair.
        purpose: Elements that differ on purpose, and not by a hair.
        total: Elements.
        names: Tensors that only one of the two has.
    """

    largest: float = 0.0
    steps: float = 0.0
    where: str = ""
    differing: int = 0
    hair: int = 0
    purpose: int = 0
    total: int = 0
    names: list[str] = field(default_factory=list)


def compare(
    here: Checkpoint, mergekits: Checkpoint, rounded: bool, why: Callable[[str], Reasons | None] = lambda name: None
) -> Differences:
    """Compares tensor by tensor.

    Args:
        here, mergekits: The checkpoints.
        rounded: They were written as bfloat16: one step of it is no difference.
        why: Which elements of a tensor may differ.
    """
    differences = Differences()
    here, mergekits = reconcile({"here": here, "mergekit": mergekits}).checkpoints.values()  # one naming
    differences.names = sorted(set(here.tensors) ^ set(mergekits.tensors))
    for name in sorted(set(here.tensors) & set(mergekits.tensors)):
        left, right = here.tensor(name), mergekits.tensor(name)
        if left.shape != right.shape:
            differences.names.append(f"{name} {tuple(left.shape)} {tuple(right.shape)}")
            continue
        a, b = left.double().flatten(), right.double().flatten()
        apart = (a - b).abs()
        size = torch.maximum(a.abs(), b.abs())
        largest = max(float(size.max()), 1e-38)
        # An element near zero is what is left of larger ones that cancel: its own last place says nothing.
        step = torch.exp2(torch.floor(torch.log2(size.clamp(min=1e-38))) - 7).clamp(min=ROUNDING * largest)
        wrong = apart > (1.001 * step if rounded else ROUNDING * largest)
        differences.total += a.numel()
        if bool(wrong.any()) and (reason := why(name)) is not None:
            differences.hair += int((wrong & reason.hair).sum())
            differences.purpose += int((wrong & reason.purpose & ~reason.hair).sum())
            excused = wrong & (reason.hair | reason.purpose)
            apart, wrong = apart.masked_fill(excused, 0.0), wrong & ~excused
        differences.differing += int(wrong.sum())
        if float(apart.max()) / largest > differences.largest:
            differences.largest, differences.where = float(apart.max()) / largest, name
        differences.steps = max(differences.steps, float((apart / step).max()))
    return differences


def tiny(root: Path) -> dict[str, str]:
    """A random Llama of four layers and three noisy copies of it, float32."""
    from tests.models import write_tiny_llama

    paths = {"base": write_tiny_llama(root / "base", 0, hidden=64)}
    for seed, name in enumerate("abc", start=1):
        paths[name] = write_tiny_llama(root / name, seed, base=paths["base"], noise=0.01)
    return {f"{{{name}}}": str(path) for name, path in paths.items()}


def otherwise(root: Path) -> dict[str, str]:
    """Models for `stored_otherwise`."""
    from transformers import DonutSwinConfig, DonutSwinModel

    from tests.architectures import ARCHITECTURES, shaken

    paths = {name.strip("{}"): Path(path) for name, path in tiny(root).items()}
    paths["zeros"] = Path(shutil.copytree(paths["a"], root / "zeros"))
    weights = load_file(paths["zeros"] / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(weights, paths["zeros"] / "model.safetensors", {"format": "pt"})
    for name in ("gpt2", "mixtral"):
        for seed, end in enumerate(("", "_a", "_b")):
            paths[name + end] = root / (name + end)
            as_loaded = {"save_original_format": False} if name + end == "mixtral" else {}
            shaken(ARCHITECTURES[name].build(), seed).save_pretrained(paths[name + end], **as_loaded)
    weights = load_file(paths["gpt2"] / "model.safetensors")
    short = {key.removeprefix("transformer."): value for key, value in weights.items()}
    save_file(short, paths["gpt2"] / "model.safetensors", {"format": "pt"})
    paths["donut"] = root / "donut"
    small = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    DonutSwinModel(DonutSwinConfig(**small)).save_pretrained(paths["donut"])
    return {f"{{{name}}}": str(path) for name, path in paths.items()}


def real(folder: Path) -> dict[str, str]:
    sources = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "base")[:3]
    names = {"base": "base"} | dict(zip("abc", sources, strict=True))
    return {f"{{{key}}}": str((folder / name).resolve()) for key, name in names.items()}


def depth_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


class Mergekit:
    """A process of another environment that merges what it is told to."""

    def __init__(self, python: str, log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [python, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def __call__(self, config: Mapping[str, Any], out: Path, seed: int = 0) -> str | None:
        """Merges; returns what went wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        shutil.rmtree(out, ignore_errors=True)
        self._process.stdin.write(json.dumps({"config": config, "out": str(out), "seed": seed}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: str | None = json.loads(line.removeprefix("answer "))
                return answer
        raise SystemExit(f"mergekit ended: see {self._log.name}")

    def close(self) -> None:
        self._process.communicate()
        self._log.close()


def rows_of(
    label: str,
    paths: Mapping[str, str],
    chosen: Iterable[Case],
    only: list[str],
    mergekit: Mergekit,
    root: Path,
) -> Iterator[str]:
    """The rows of one family of models."""
    opened = {path: open_checkpoint(path) for path in paths.values()}
    names = {name for method in METHODS.values() for name in (method.name, *method.aliases)}
    for case in chosen:
        if case.recipe["merge_method"] not in names or (only and not any(text in case.name for text in only)):
            continue
        recipe = {"dtype": "float32"} | with_paths(dict(case.recipe), paths)
        if not case.stochastic:
            cells = once(recipe, opened, mergekit, root)
        elif label == "tiny":
            cells = over_seeds(recipe, mergekit, root)
        else:
            continue
        yield f"| {label} | {case.name} | " + " | ".join(cells) + f" | {case.differs or ''} |"


def once(recipe: Mapping[str, Any], opened: Mapping[str, Checkpoint], mergekit: Mergekit, root: Path) -> list[str]:
    """The five cells of a deterministic case."""
    try:
        parsed = parse_recipe({**recipe, "out_dtype": "float32"})
        planned, aligned, _ = align_and_plan(parsed, {m: opened[m] for m in parsed.models()}, identify=False)
    except EvoMergeError as error:
        return [f"refused here: {error}"[:160], "", "", "", ""]
    operations = {op.output: op for op in planned.operations}
    here, mergekits = root / "here", root / "mergekits"

    def merged(out: str, computed: str = recipe["dtype"]) -> str | None:
        """Both merges; what went wrong."""
        document = {**recipe, "out_dtype": out}
        try:
            merge_to_folder(parse_recipe(document), here, overwrite=True)
        except EvoMergeError as error:
            return f"refused here: {error}"[:160]
        problem = mergekit({**document, "dtype": computed}, mergekits)
        return f"fails in mergekit: {problem}"[:160] if problem else None

    def why(name: str) -> Reasons | None:
        if name not in operations:
            return None
        if _EXPERT.search(name):
            every = torch.ones(math.prod(operations[name].shape), dtype=torch.bool)
            return Reasons(~every, every)  # see DELIBERATE["experts"]
        return reasons(operations[name], aligned)

    def compared(rounded: bool) -> Differences:
        return compare(open_checkpoint(str(here)), open_checkpoint(str(mergekits)), rounded, why)

    if problem := merged("float32"):
        return [problem, "", "", "", ""]
    single = compared(False)
    cells = [_text(single, f"{single.largest:.1e}", single.largest > ROUNDING), ""]
    if single.differing or single.hair or single.purpose:  # is it the rounding of float32?
        problem, wide = merged("float32", "float64"), compared(False)
        cells[1] = problem or _text(wide, f"{wide.largest:.1e}", wide.largest > ROUNDING)
    problem, short = merged("bfloat16"), compared(True)
    cells.append(problem or _text(short, f"{short.steps:.2f}", bool(short.differing)))
    return [*cells, *(f"{n} ({n / single.total:.2%})" if n else "" for n in (single.hair, single.purpose))]


def _text(differences: Differences, largest: str, where: bool) -> str:
    if where:
        largest += f" ({differences.differing} elements; {differences.where})"
    return largest + (f" (names differ: {differences.names[:2]})" if differences.names else "")


def over_seeds(recipe: Mapping[str, Any], mergekit: Mergekit, root: Path) -> list[str]:
    """Mean and variance over seeds of both, as ratios."""
    samples: dict[str, list[torch.Tensor]] = {"here": [], "mergekits": []}
    start = _matrices(str(recipe["base_model"]))
    for seed in range(SEEDS):
        merge_to_folder(parse_recipe({**recipe, "seed": seed}), root / "here", overwrite=True)
        if problem := mergekit(recipe, root / "mergekits", seed):
            return [f"fails in mergekit: {problem}"[:160], "", "", "", ""]
        for name, sample in samples.items():
            sample.append(_matrices(str(root / name)) - start)
    a, b = (torch.stack(sample) for sample in samples.values())
    chance = b.var(0).sum() / SEEDS  # what the noise of a mean adds to its square
    mean = float((a.mean(0) * b.mean(0)).sum() / ((b.mean(0) ** 2).sum() - chance))
    spread = ((a.var(0) + b.var(0)) / SEEDS).sqrt()
    z = ((a.mean(0) - b.mean(0)).abs() / spread)[spread > 0]
    # Of a normal variable the mean magnitude is 0.80; a spread estimated from few seeds makes it a little more.
    texts = f"{SEEDS} seeds: mean / mean {mean:.3f}, mean abs(z) {float(z.mean()):.2f}"
    return [texts, "", f"variance / variance {float(a.var(0).mean() / b.var(0).mean()):.3f}", "", ""]


def _matrices(folder: str) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    names = sorted(name for name, info in checkpoint.tensors.items() if len(info.shape) == 2)
    return torch.cat([checkpoint.tensor(name).double().flatten() for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="python of an environment that has mergekit")
    parser.add_argument("--models", type=Path, help="a folder with `base` and its fine-tunes")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name holds one of these")
    every = ["tiny", "stored otherwise", "real"]
    parser.add_argument("--families", nargs="*", default=every, choices=every)
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS}")
    args = parser.parse_args()
    rows = [
        "| models | recipe | float32: largest difference | where mergekit computes in float64 | "
        "bfloat16: largest, in steps | by a hair | on purpose | what purpose |",
        "| --- " * 8 + "|",
    ]
    print("\n".join(rows), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mergekit = Mergekit(args.mergekit, root / "mergekit.log")
        families: dict[str, Callable[[], tuple[dict[str, str], Iterator[Case]]]] = {
            "tiny": lambda: (tiny(root / "tiny"), cases(4)),
            "stored otherwise": lambda: (otherwise(root / "otherwise"), stored_otherwise()),
        }
        if args.models:
            families["real"] = lambda: (real(args.models), cases(depth_of(args.models / "base")))
        for label in (name for name in families if name in args.families):
            paths, chosen = families[label]()
            for row in rows_of(label, paths, chosen, args.only, mergekit, root):
                rows.append(row)
                print(row, flush=True)
        mergekit.close()
    if args.write:
        RESULTS.write_text(
            "# Parity with mergekit\n\n    python bench/parity.py --mergekit MK/bin/python --models models\n\n"
            + "\n".join(rows)
            + "\n"
        )


if __name__ == "__main__":
    main()
