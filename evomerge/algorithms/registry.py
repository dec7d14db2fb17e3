"""The search algorithms by the name they have in a search.yaml. A new one is a function and a line here.

Installed packages add theirs by entry points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evomerge.algorithms import catcma, cmaes, map_elites, optuna_samplers
from evomerge.algorithms.ga.ga import OPTIONS, POPULATION, ga
from evomerge.algorithms.random_search import random_search
from evomerge.errors import SpecError, suggest
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import Algorithm, AlgorithmSettings
from evomerge.system.plugins import Registry


@dataclass(frozen=True)
class RegisteredAlgorithm:
    """An algorithm and what it understands. Called like the algorithm itself.

    Attributes:
        propose: The algorithm.
        options: Its own settings (`search.options` in a search.yaml) with their defaults.
        check: What is wrong with options of the right names and kinds; None where nothing can be.
        single_objective: Whether it can maximise one fitness.
        multi_objective: Whether it can look for the Pareto front of several objectives.
        asynchronous: Whether it can propose one candidate at a time, while others are being scored: those are in the
            history as "pending", without a fitness. One that learns from whole generations cannot.
        population: Candidates per generation, where a search.yaml does not say.
    """

    propose: Algorithm
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], list[str]] | None = None
    single_objective: bool = True
    multi_objective: bool = False
    asynchronous: bool = True
    population: int = 16

    def __call__(
        self,
        space: SearchSpace,
        history: tuple[Candidate, ...],
        numbers: range,
        generation: int,
        seed: int,
        settings: AlgorithmSettings,
    ) -> list[Proposal]:
        """The algorithm's proposals."""
        return self.propose(space, history, numbers, generation, seed, settings)

    def option_problems(self, options: Mapping[str, Any]) -> list[str]:
        """Lists what is wrong with these options."""
        problems = []
        for name, value in options.items():
            if name not in self.options:
                names = ", ".join(sorted(self.options)) or "none"
                problems.append(f"search.options.{name}: no such option{suggest(name, self.options)}; it has: {names}")
            elif not _of_kind(value, self.options[name]):
                kind = type(self.options[name]).__name__
                problems.append(f"search.options.{name}: a {kind} such as {self.options[name]!r}; got {value!r}")
        return problems or (self.check(options) if self.check is not None else [])


def _of_kind(value: Any, default: Any) -> bool:
    """Whether a value is of the default's type; a whole number will do for a float. Without a default, anything is."""
    if default is None or isinstance(value, bool) or isinstance(default, bool):
        return default is None or (isinstance(value, bool) and isinstance(default, bool))
    return isinstance(value, int | float if isinstance(default, float) else type(default))


_OWN = {
    "ga": RegisteredAlgorithm(ga, OPTIONS, multi_objective=True, population=POPULATION),
    "random": RegisteredAlgorithm(random_search, multi_objective=True),
    "tpe": RegisteredAlgorithm(optuna_samplers.tpe, optuna_samplers.TPE_OPTIONS, multi_objective=True),
    "cmaes": RegisteredAlgorithm(cmaes.cmaes, cmaes.OPTIONS, check=cmaes.check_options, asynchronous=False),
    "catcma": RegisteredAlgorithm(catcma.catcma, catcma.OPTIONS, check=catcma.check_options, asynchronous=False),
    "gp": RegisteredAlgorithm(optuna_samplers.gp, optuna_samplers.GP_OPTIONS),
    "nsga2": RegisteredAlgorithm(optuna_samplers.nsga2, multi_objective=True, asynchronous=False),
    "nsga3": RegisteredAlgorithm(optuna_samplers.nsga3, multi_objective=True, asynchronous=False),
    "map_elites": RegisteredAlgorithm(
        map_elites.map_elites,
        map_elites.OPTIONS,
        check=map_elites.check_options,
        multi_objective=True,
        asynchronous=False,
    ),
}

ALGORITHMS: Registry[RegisteredAlgorithm] = Registry(_OWN, "evomerge.algorithms", RegisteredAlgorithm)


def get_algorithm(name: str) -> RegisteredAlgorithm:
    """Returns the algorithm of that name.

    Raises:
        SpecError: There is none.
    """
    if name not in ALGORITHMS:
        raise SpecError(
            f"search.algorithm: there is no '{name}'{suggest(name, ALGORITHMS)}; one of {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[name]


def search_problems(name: str, options: Mapping[str, Any], *, multi_objective: bool, asynchronous: bool) -> list[str]:
    """Says why an algorithm cannot do a search; nothing where it can.

    Args:
        name: As written under `search.algorithm`.
        options: As written under `search.options`.
        multi_objective: Whether there are several objectives.
        asynchronous: Whether candidates are proposed one by one.
    """
    if name not in ALGORITHMS:
        names = ", ".join(sorted(ALGORITHMS))
        return [f"search.algorithm: '{name}' is not one of {names}{suggest(name, ALGORITHMS)}"]
    algorithm = ALGORITHMS[name]
    problems = algorithm.option_problems(options)
    fit = {key: a.multi_objective if multi_objective else a.single_objective for key, a in ALGORITHMS.items()}
    if not fit[name]:
        able = ", ".join(sorted(key for key, can in fit.items() if can))
        goal = "pareto" if multi_objective else "mean"
        problems.append(f"search.objectives: {name} cannot search for {goal}; these can: {able}")
    if asynchronous and not algorithm.asynchronous:
        able = ", ".join(sorted(key for key, a in ALGORITHMS.items() if a.asynchronous))
        problems.append(
            f"search.mode: {name} learns from whole generations and cannot be asynchronous; these can: {able}"
        )
    return problems
