"""The search: genomes, their meaning as recipes, algorithms that propose them, the loop, and the record.

Nothing here sees a tensor, and importing it does not import torch.

Python binds this package to the name `evomerge.search` when it is first imported, in place of the function of that
name; so the package can be called too, and does the same.
"""

import sys
from types import ModuleType
from typing import Any

from evomerge.search.candidate import Candidate, Outcome, Proposal, best, ranked, spent_items
from evomerge.search.executor import Executor, InProcess
from evomerge.search.loop import Finished, Stop, search
from evomerge.search.propose import Algorithm, AlgorithmSettings
from evomerge.search.record import Record
from evomerge.search.registry import ALGORITHMS, get_algorithm
from evomerge.space.baselines import Start, baselines
from evomerge.space.build import build_space
from evomerge.space.genome import Genome, LayerGene
from evomerge.space.space import SearchSpace, digest

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmSettings",
    "Candidate",
    "Executor",
    "Finished",
    "Genome",
    "InProcess",
    "LayerGene",
    "Outcome",
    "Proposal",
    "Record",
    "SearchSpace",
    "Start",
    "Stop",
    "baselines",
    "best",
    "build_space",
    "digest",
    "get_algorithm",
    "ranked",
    "search",
    "spent_items",
]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        from evomerge import api

        return api.search(*args, **options)


sys.modules[__name__].__class__ = _Callable
