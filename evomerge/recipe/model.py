"""The recipe: what to merge, and how. Frozen; a superset of mergekit's merge configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evomerge.recipe.settings import Parameters, plain
from evomerge.system.hashing import digest
from evomerge.system.yaml import write_documents


@dataclass(frozen=True)
class ZeroToken:
    """An embedding of zeros (``kind: zero``)."""


@dataclass(frozen=True)
class ModelToken:
    """The embedding of one token of one model (``kind: model_token``): by text or by id, exactly one of them."""

    model: str
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """Where one token's embedding comes from.

    Attributes:
        source: A model, another token, zeros, or None to merge it like any other.
        force: Take it from there even in models that have the token themselves.
    """

    source: str | ZeroToken | ModelToken | None = None
    force: bool = False

    def to_mapping(self) -> dict[str, Any]:
        """Returns the rule as in YAML."""
        mapping: dict[str, Any] = {}
        if isinstance(self.source, ZeroToken):
            mapping["source"] = {"kind": "zero"}
        elif isinstance(self.source, ModelToken):
            mapping["source"] = {"kind": "model_token", "model": self.source.model}
            if self.source.token is not None:
                mapping["source"]["token"] = self.source.token
            else:
                mapping["source"]["token_id"] = self.source.token_id
        elif self.source is not None:
            mapping["source"] = self.source
        if self.force:
            mapping["force"] = True
        return mapping


@dataclass(frozen=True)
class TokenizerBlock:
    """The whole block.

    Attributes:
        source: ``union``, ``base``, or a model.
        tokens: (token, rule), in the order of the recipe.
        pad_to_multiple_of: Round the vocabulary up to a multiple of this.
        models: Whose tokens count, in this order, merged or not; () for the merged models'.
    """

    source: str = "union"
    tokens: tuple[tuple[str, TokenRule], ...] = ()
    pad_to_multiple_of: int | None = None
    models: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """Returns the block as in YAML."""
        mapping: dict[str, Any] = {"source": self.source}
        if self.tokens:
            mapping["tokens"] = {token: rule.to_mapping() for token, rule in self.tokens}
        if self.pad_to_multiple_of is not None:
            mapping["pad_to_multiple_of"] = self.pad_to_multiple_of
        if self.models:
            mapping["models"] = list(self.models)
        return mapping


@dataclass(frozen=True)
class Source:
    """A model that goes into a merge.

    Attributes:
        model: Its reference: folder, Hub id, ``base+adapter``, ``.safetensors`` file or ``zoo:NAME``.
        layer_range: (first, last + 1) layers; None for all (the ``models:`` form).
        parameters: What is set for this source alone.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=Parameters)

    def to_mapping(self) -> dict[str, Any]:
        """Returns the source as in YAML."""
        mapping: dict[str, Any] = {"model": self.model}
        if self.layer_range is not None:
            mapping["layer_range"] = list(self.layer_range)
        return mapping | _parameters("parameters", self.parameters)


@dataclass(frozen=True)
class Slice:
    """A run of output layers.

    Attributes:
        sources: What is merged; every source gives the same number of layers.
        base_model: Instead of the recipe's.
        merge_method: Instead of the recipe's (ours; mergekit has one method for all).
        parameters: What is set for the slice.
        residual_weight: Read for mergekit's sake; it has no effect there or here.
        residual_scale: Factor on what each block last writes to the residual stream: one number, or one for each layer.
    """

    sources: tuple[Source, ...]
    base_model: str | None = None
    merge_method: str | None = None
    parameters: Parameters = field(default_factory=Parameters)
    residual_weight: float | None = None
    residual_scale: float | tuple[float, ...] | None = None

    @property
    def length(self) -> int | None:
        """Number of layers; None for all of the models' layers (the ``models:`` form)."""
        span = self.sources[0].layer_range if self.sources else None
        return None if span is None else span[1] - span[0]

    def to_mapping(self) -> dict[str, Any]:
        """Returns the slice as in YAML."""
        mapping: dict[str, Any] = {"sources": [source.to_mapping() for source in self.sources]}
        for name in ("base_model", "merge_method", "residual_weight"):
            if (value := getattr(self, name)) is not None:
                mapping[name] = value
        if self.residual_scale is not None:
            scale = self.residual_scale
            mapping["residual_scale"] = list(scale) if isinstance(scale, tuple) else scale
        return mapping | _parameters("parameters", self.parameters)


@dataclass(frozen=True)
class Recipe:
    """One merge.

    Attributes:
        merge_method: The method's own name (an alias in the YAML becomes it).
        base_model: Reference of the common ancestor, or None.
        sources: The ``models:`` of the YAML, when whole models are merged; exclusive with `slices`.
        slices: The output's layers from first to last, when they are given.
        parameters: What is set for all.
        input_model_parameters: (model, what is set for it wherever it is a source), sorted by model.
        module: Name of the entry of a ``modules:`` block that this is, or None.
        module_parameters: What is set for that module.
        modules: The merge of each entry of a ``modules:`` block of several; `sources` and `slices` are then empty.
        dtype: mergekit's working dtype; here the output's, when `out_dtype` is None.
        out_dtype: The output's dtype.
        tokenizer_source: ``base``, ``union``, ``model:PATH`` or a path; exclusive with `tokenizer`.
        tokenizer: The ``tokenizer:`` block.
        chat_template: ``auto``, a template's name, or the template.
        ignore: Tensors that are left out, by a part of their names or a glob.
        take_from: (such tensors, the model that they are taken from as they are).
        seed: For methods that draw random numbers.
        after: Stages that follow the merge of each tensor, by name.
        activations: File of the mean magnitudes of the base's inputs, for the stages that ask for them.
        name: What other recipes may call the result.
        steps: The merges to carry out before this one, in order; this one, and those after each, name their results.
        warnings: What parsing found odd but possible; no part of the recipe's identity.
    """

    merge_method: str
    base_model: str | None = None
    sources: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = field(default_factory=Parameters)
    input_model_parameters: tuple[tuple[str, Parameters], ...] = ()
    module: str | None = None
    module_parameters: Parameters = field(default_factory=Parameters)
    modules: tuple[Recipe, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerBlock | None = None
    chat_template: str | None = None
    ignore: tuple[str, ...] = ()
    take_from: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    after: tuple[str, ...] = ()
    activations: str | None = None
    name: str | None = None
    steps: tuple[Recipe, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def parts(self) -> tuple[Slice, ...]:
        """The slices, of all modules; the ``models:`` form is one slice of all layers."""
        if self.modules:
            return tuple(part for module in self.modules for part in module.parts)
        return self.slices or (Slice(sources=self.sources),)

    @property
    def output_dtype(self) -> str | None:
        """The dtype to write, or None for that of the models."""
        return self.out_dtype or self.dtype

    @property
    def asks_for_tokenizer(self) -> bool:
        """Whether the merged model's vocabulary is more than the base's (or first model's) as it is."""
        return self.tokenizer_source is not None or self.tokenizer is not None

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal characters that depend on what the recipe says, not on key order or on 1 against 1.0."""
        mapping = self.to_mapping()
        mapping.pop("name", None)
        if self.steps:
            mapping["steps"] = [[step.name, step.digest] for step in self.steps]
        text = json.dumps(_canonical(mapping), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return digest(text)

    def models(self) -> tuple[str, ...]:
        """Returns every model whose weights are read, without repeats: the base first, then in order of appearance.

        An earlier step counts as the model that it makes.
        """
        return tuple(dict.fromkeys(self._references()))

    def external_models(self) -> tuple[str, ...]:
        """Returns every model that has to be there before anything is merged: those of all steps, no step's result."""
        made = {step.name for step in self.steps}
        every = [reference for document in self.documents for reference in document.opened()]
        return tuple(dict.fromkeys(reference for reference in every if reference.partition("+")[0] not in made))

    def opened(self) -> tuple[str, ...]:
        """Returns every model that is opened for this merge: `models`, and those whose tokens alone count."""
        return tuple(dict.fromkeys([*self.models(), *(self.tokenizer.models if self.tokenizer else ())]))

    @property
    def documents(self) -> tuple[Recipe, ...]:
        """Every merge in the order of the work, this one last."""
        return (*self.steps, self)

    def _references(self) -> Iterator[str]:
        if self.base_model is not None:
            yield self.base_model
        for part in self.parts:
            if part.base_model is not None:
                yield part.base_model
            for source in part.sources:
                yield source.model

    def to_mapping(self) -> dict[str, Any]:
        """This merge, without its steps, as in YAML; `parse_recipe` reads it back as an equal recipe."""
        mapping: dict[str, Any] = {"name": self.name, "merge_method": self.merge_method, "base_model": self.base_model}
        if self.modules or self.module is not None:
            mapping["modules"] = {
                str(module.module): module._body() | _parameters("parameters", module.module_parameters)
                for module in self.modules or (self,)
            }
        else:
            mapping |= self._body()
        mapping |= _parameters("parameters", self.parameters)
        if self.input_model_parameters:
            entries = {model: _plain_items(items) for model, items in self.input_model_parameters}
            mapping["input_model_parameters"] = entries
        for name in ("dtype", "out_dtype", "tokenizer_source", "chat_template"):
            mapping[name] = getattr(self, name)
        mapping["tokenizer"] = self.tokenizer.to_mapping() if self.tokenizer else None
        mapping["ignore"] = list(self.ignore) or None
        mapping["take_from"] = dict(self.take_from) or None
        mapping["seed"] = self.seed or None
        mapping["after"] = list(self.after) or None
        mapping["activations"] = self.activations
        return {key: value for key, value in mapping.items() if value is not None}

    def _body(self) -> dict[str, Any]:
        if self.slices:
            return {"slices": [part.to_mapping() for part in self.slices]}
        return {"models": [source.to_mapping() for source in self.sources]}

    def to_yaml(self) -> str:
        """Returns the recipe as YAML, a document for each step."""
        return write_documents(document.to_mapping() for document in self.documents)


def _plain_items(parameters: Parameters) -> dict[str, Any]:
    return {name: plain(setting) for name, setting in parameters.items()}


def _parameters(key: str, parameters: Parameters) -> dict[str, Any]:
    return {key: _plain_items(parameters)} if parameters else {}


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
