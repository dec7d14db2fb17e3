"""The search: genomes, their meaning as recipes, algorithms that propose them, the loop, and the record.

Nothing here sees a tensor, and importing it does not import torch.

Python binds this package to the name `evomerge.search` when it is first imported, in place of the function of that
name; so the package can be called too, and does the same.
"""

import sys
from types import ModuleType
from typing import Any

from evomerge.search.propose import Algorithm, AlgorithmSettings
from evomerge.search.registry import ALGORITHMS, get_algorithm
from evomerge.space.baselines import Start, baselines
from evomerge.space.build import build_space
from evomerge.space.genome import Genome, LayerGene
from evomerge.space.space import SearchSpace, digest
from evomerge.study.candidate import Candidate, Outcome, Proposal, best, ranked, spent_items
from evomerge.study.interfaces import Executor, InProcess
from evomerge.study.loop import Finished, Stop, search
from evomerge.study.record import Record

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
