"""EvoMerge: evolve the best merge of the models you already have.

evomerge.search("search.yaml")            evolve a merge
evomerge.merge("recipe.yaml", "merged")   carry out one recipe
evomerge.evaluate("merged", ["arc_easy"]) score a model
evomerge.merge_models("ties", base=..., models=[...], densities=[...])   a merge as a loaded model
evomerge.open_run("runs/quickstart")      look at a run: its candidates, its pictures
evomerge.mean_inputs("base", texts, "means.safetensors")   what `activations:` of a recipe names
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.api import evaluate, mean_inputs, merge, search
    from evomerge.notebook import dare_merge_llama, merge_models, open_run, ties_merge_llama
    from evomerge.run.dare import DareConfig, DareMerger

__all__ = [
    "DareConfig",
    "DareMerger",
    "dare_merge_llama",
    "evaluate",
    "mean_inputs",
    "merge",
    "merge_models",
    "open_run",
    "search",
    "ties_merge_llama",
]

_DEFINED_IN = {
    "DareConfig": "evomerge.run.dare",
    "DareMerger": "evomerge.run.dare",
    "dare_merge_llama": "evomerge.notebook",
    "evaluate": "evomerge.api",
    "mean_inputs": "evomerge.api",
    "merge": "evomerge.api",
    "merge_models": "evomerge.notebook",
    "open_run": "evomerge.notebook",
    "search": "evomerge.api",
    "ties_merge_llama": "evomerge.notebook",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for: the command line needs none of them."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'evomerge' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_DEFINED_IN[name]), name)
    return value


def __dir__() -> list[str]:
    """Lists the public names, imported or not."""
    return sorted({*globals(), *__all__})
