"""Recipes: what to merge and how, read from YAML and resolved tensor by tensor. A superset of mergekit's."""

from evomerge.recipe.frankenmerge import expand_frankenmerge, random_pattern
from evomerge.recipe.model import Recipe, Slice, Source
from evomerge.recipe.parse import load_recipe, parse_recipe
from evomerge.recipe.reader import DTYPES
from evomerge.recipe.references import resolve_models, resolve_reference
from evomerge.recipe.resolve import (
    Input,
    LayerPlace,
    ResolvedTensor,
    SliceInputs,
    layer_places,
    lookup,
    resolve,
    slice_inputs,
)
from evomerge.recipe.settings import Conditional, Parameters, Setting
from evomerge.recipe.tokenizer import ModelToken, TokenizerBlock, TokenRule, ZeroToken

__all__ = [
    "DTYPES",
    "Conditional",
    "Input",
    "LayerPlace",
    "ModelToken",
    "Parameters",
    "Recipe",
    "ResolvedTensor",
    "Setting",
    "Slice",
    "SliceInputs",
    "Source",
    "TokenRule",
    "TokenizerBlock",
    "ZeroToken",
    "expand_frankenmerge",
    "layer_places",
    "load_recipe",
    "lookup",
    "parse_recipe",
    "random_pattern",
    "resolve",
    "resolve_models",
    "resolve_reference",
    "slice_inputs",
]
