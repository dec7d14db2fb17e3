"""EvoMerge: evolve the best merge of the models you already have.

evomerge.search("search.yaml")            evolve a merge
evomerge.merge("recipe.yaml", "merged")   carry out one recipe
evomerge.evaluate("merged", ["arc_easy"]) score a model
"""

from evomerge.api import evaluate, merge, search
from evomerge.dare import DareConfig, DareMerger

__all__ = ["DareConfig", "DareMerger", "evaluate", "merge", "search"]
