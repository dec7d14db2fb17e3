"""EvoMerge: evolve the best merge of the models you already have.

evomerge.search("search.yaml")            evolve a merge
evomerge.merge("recipe.yaml", "merged")   carry out one recipe
evomerge.evaluate("merged", ["arc_easy"]) score a model
evomerge.merge_models("ties", base=..., models=[...], densities=[...])   a merge as a loaded model
"""

from evomerge.api import evaluate, merge, search
from evomerge.notebook import dare_merge_llama, merge_models, ties_merge_llama
from evomerge.run.dare import DareConfig, DareMerger

__all__ = [
    "DareConfig",
    "DareMerger",
    "dare_merge_llama",
    "evaluate",
    "merge",
    "merge_models",
    "search",
    "ties_merge_llama",
]
