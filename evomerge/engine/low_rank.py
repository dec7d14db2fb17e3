"""What a model has beyond its base, as a LoRA adapter in PEFT's layout: the largest part of every difference.

The best approximation of a matrix by one of rank r is its singular vectors of the r largest singular values (Eckart and
Young, 1936, https://doi.org/10.1007/BF02288367). Scales are 1: the adapter's product is the difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from evomerge.errors import BadInput
from evomerge.methods.spectral import right_vectors, tall, times
from evomerge.system.files import write_atomic

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRankAdapter:
    """An adapter of a base.

    Attributes:
        rank: Of every product.
        products: Module -> (A [rank, in], B [out, rank]): linear layers, and as PEFT has it embeddings, transposed.
        embeddings: Those modules of them that are embeddings.
        whole: Module -> its weight as it is in the model: what has no rank, such as norms.
        ties: A head that is tied to the embedding follows it.
        share: How much of the sum of squares of all matrices' differences the products have.
        left_out: Tensors that differ and that no adapter can say.
    """

    rank: int
    products: Mapping[str, tuple[Tensor, Tensor]]
    embeddings: frozenset[str]
    whole: Mapping[str, Tensor]
    ties: bool
    share: float
    left_out: tuple[str, ...]

    def added_to(self, module: str, weight: Tensor) -> Tensor:
        """Computes a module's weight with the adapter: in float32, rounded once."""
        a, b = (factor.float() for factor in self.products[module])
        product = (b @ a).T if module in self.embeddings else b @ a
        return (weight.float() + product.to(weight.device)).to(weight.dtype)

    def apply(self, model: nn.Module) -> None:
        """Gives a model, the base, the weights that it has with the adapter; its own tensors are left as they are."""
        with torch.no_grad():
            for module in self.products:
                parameter = model.get_submodule(module).get_parameter("weight")
                parameter.data = self.added_to(module, parameter.data)
            for module, weight in self.whole.items():
                parameter = model.get_submodule(module).get_parameter("weight")
                parameter.data = weight.to(parameter)

    def write(self, folder: Path, base: str) -> None:
        """Writes adapter_config.json and adapter_model.safetensors.

        Args:
            folder: Made if need be.
            base: What the base is called, by which PEFT finds it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for module, factors in self.products.items():
            kind = "lora_embedding_{}" if module in self.embeddings else "lora_{}.weight"
            tensors |= {f"{_PREFIX}{module}.{kind.format(end)}": f for end, f in zip("AB", factors, strict=True)}
        tensors |= {f"{_PREFIX}{module}.weight": weight for module, weight in self.whole.items()}
        stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_atomic(folder / "adapter_model.safetensors", save(stored, metadata={"format": "pt"}))
        settings: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": sorted({module.rpartition(".")[2] for module in self.products}),
            "modules_to_save": sorted({module.rpartition(".")[2] for module in self.whole}) or None,
            **({"ensure_weight_tying": True} if self.ties else {}),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        write_atomic(folder / "adapter_config.json", json.dumps(settings, indent=2))


def low_rank_adapter(base: nn.Module, merged: Mapping[str, Tensor], rank: int) -> LowRankAdapter:
    """Finds the adapter of a rank that brings a base nearest to a model.

    Modules that share the last part of their names are adapted together, as PEFT names them.

    Args:
        base: The base, a model of transformers.
        merged: The other model's tensors, by the names that they have in memory.
        rank: Of every product; a matrix of a lower rank has rows of zeros.

    Raises:
        BadInput: The models have other tensors or shapes, or are the same.
    """
    state = base.state_dict()
    if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in merged.items()}:
        raise BadInput("no adapter of the base says this model: the two have other tensors, layers or shapes")
    changed = {name for name in state if not torch.equal(state[name], merged[name])}
    if not changed:
        raise BadInput("the model is its base: there is nothing that an adapter could say")
    modules = dict(base.named_modules(remove_duplicate=False))
    tied = _tied_names(base)
    kinds: dict[str, list[str]] = {"matrix": [], "embedding": [], "whole": []}
    left_out: list[str] = []
    for name in sorted(changed - tied):
        module, _, parameter = name.rpartition(".")
        kind = _kind(modules[module], parameter)
        if kind is None:
            left_out.append(name)
        else:
            kinds[kind].append(module)
    ends = {module.rpartition(".")[2] for module in kinds["matrix"]}
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in ends]
    matrices = [*(name for name in linear if f"{name}.weight" not in tied), *kinds["embedding"]]
    ends_of_whole = tuple(
        {module.rpartition(".")[2] for module in kinds["whole"]}
    )  # PEFT compares whole by the letters
    saved = [n for n in modules if ends_of_whole and n.endswith(ends_of_whole) and f"{n}.weight" in state]
    embeddings = frozenset(kinds["embedding"])
    products: dict[str, tuple[Tensor, Tensor]] = {}
    squares = kept = 0.0
    for module in matrices:
        before, after = state[f"{module}.weight"], merged[f"{module}.weight"]
        delta = after.float() - before.float()
        a, b = _factors(delta.T if module in embeddings else delta, rank)
        squares += float(delta.double().square().sum())
        kept += float((b.double() @ a.double()).square().sum())
        products[module] = (a.to(before.dtype), b.to(before.dtype))
    whole = {module: merged[f"{module}.weight"] for module in saved if module not in products}
    ties = bool(tied) and bool(embeddings)
    return LowRankAdapter(rank, products, embeddings, whole, ties, kept / squares if squares else 1.0, tuple(left_out))


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the nearest product to a matrix [out, in]; singular values shared evenly."""
    matrix = tall(delta)
    values, vectors = right_vectors(matrix)
    values, vectors = values[:rank], vectors[:, :rank]
    roots = values.sqrt()
    long = times(matrix, vectors / roots)
    short = (vectors * roots).float()
    padded = [nn.functional.pad(factor, (0, rank - len(values))) for factor in (long, short)]
    out, in_ = padded if matrix is delta else reversed(padded)
    return in_.T.contiguous(), out.contiguous()


def _kind(module: nn.Module, parameter: str) -> str | None:
    """How an adapter says a module's change: as a product, or whole; None where it cannot."""
    if parameter != "weight":
        return None
    if isinstance(module, nn.Linear):
        return "matrix"
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = module.get_parameter("weight")
    only = len(list(module.parameters())) == 1
    return "whole" if weight.ndim == 1 and only else None


def _tied_names(model: nn.Module) -> set[str]:
    """The head's name, where it is the embedding."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in every if first[id(parameter)] != name}
