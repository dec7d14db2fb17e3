"""Recipes: what to merge and how, read from YAML and resolved tensor by tensor. A superset of mergekit's."""

from evomerge.recipe.frankenmerge import expand_frankenmerge, random_pattern
from evomerge.recipe.mergekit import to_mergekit_yaml
from evomerge.recipe.model import ModelToken, Recipe, Slice, Source, TokenizerBlock, TokenRule, ZeroToken
from evomerge.recipe.parse import load_recipe, parse_recipe, resolve_models
from evomerge.recipe.reader import DTYPES
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
    "slice_inputs",
    "to_mergekit_yaml",
]
