"""A candidate as an Optuna trial, and back.

Parameters, values, intermediate values and short user attributes are for people and for `optuna-dashboard`. What only a
program needs (all genes, the recipe, every score) is one compressed system attribute, which the dashboard hides.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evomerge.errors import RunError
from evomerge.space.decode import active_genes, copies_layers
from evomerge.space.genome import Genome, LayerGene
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, ConstraintValue, State, score_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

PACKED = "evomerge"
#: Optuna's number of a trial's state (`optuna.trial.TrialState`).
STATES: dict[State, int] = {"done": 1, "pruned": 2, "failed": 3}


def pack(candidate: Candidate) -> str:
    """Compresses a candidate to text that JSON need not escape."""
    content = {
        "number": candidate.number,
        "generation": candidate.generation,
        "operator": candidate.operator,
        "parents": list(candidate.parents),
        "recipe_hash": candidate.recipe_hash,
        "state": candidate.state,
        "fitness": candidate.fitness,
        "objectives": None if candidate.objectives is None else list(candidate.objectives),
        "failure": candidate.failure,
        "seconds": dict(candidate.seconds),
        "estimates": list(candidate.estimates.items()),
        "scores": dict(candidate.scores),
        "genome": candidate.genome.to_json(),
        "recipe": dict(candidate.recipe),
    }
    if candidate.constraints:
        content["constraints"] = {name: dataclasses.asdict(value) for name, value in candidate.constraints.items()}
    return base64.b64encode(zlib.compress(json.dumps(content, separators=(",", ":")).encode())).decode()


def unpack(packed: str) -> Candidate:
    """Reads the candidate that `pack` wrote."""
    saved = json.loads(zlib.decompress(base64.b64decode(packed)))
    genes = saved["genome"]["genes"]
    # The names are the same objects in all candidates: ten thousand of them have the same genes.
    saved["genome"]["genes"] = {sys.intern(name): value for name, value in genes.items()}
    return Candidate(
        number=saved["number"],
        generation=saved["generation"],
        genome=Genome.from_json(saved["genome"]),
        recipe=saved["recipe"],
        recipe_hash=saved["recipe_hash"],
        parents=tuple(saved["parents"]),
        operator=saved["operator"],
        state=saved["state"],
        fitness=saved["fitness"],
        objectives=None if saved["objectives"] is None else tuple(saved["objectives"]),
        scores=saved["scores"],
        failure=saved["failure"],
        seconds=saved["seconds"],
        estimates=dict(saved["estimates"]),
        constraints={name: ConstraintValue(**value) for name, value in saved.get("constraints", {}).items()},
    )


def system_attributes(candidate: Candidate) -> dict[str, Any]:
    """Collects what only programs read: all of the candidate, and its constraints where Optuna looks for them."""
    return {PACKED: pack(candidate), **constraint_attributes(candidate.constraints)}


def constraint_attributes(constraints: Mapping[str, ConstraintValue]) -> dict[str, float]:
    """Writes constraints as Optuna's `Trial.set_constraint` does: above zero where a trial is not feasible."""
    return {f"constraints:{name}": constraint.violation for name, constraint in constraints.items()}


def candidate_of_trial(system_attributes: Mapping[str, Any], trial: int) -> Candidate:
    """Reads the candidate in a trial's system attributes.

    Raises:
        RunError: The trial was not written by us, or by another version.
    """
    if PACKED not in system_attributes:
        raise RunError(f"trial {trial} of the study is not evomerge's: it has no system attribute '{PACKED}'")
    try:
        return unpack(system_attributes[PACKED])
    except KeyError as error:
        raise RunError(f"trial {trial} of the study lacks {error}: another version of evomerge wrote it") from error


def user_attributes(candidate: Candidate) -> dict[str, Any]:
    """Collects what a person wants to see beside the parameters: short, numbers where one may sort, none empty."""
    shown: dict[str, Any] = {"number": candidate.number, "generation": candidate.generation}
    shown["operator"] = candidate.operator
    if candidate.parents:
        shown["parents"] = ", ".join(map(str, candidate.parents))
    if candidate.failure is not None:
        shown["failure"] = candidate.failure
    if candidate.fitness is not None:
        shown["fitness"] = candidate.fitness
    shown.update({f"{split} {task} {m}": value for split, task, m, value in score_values(candidate.scores)})
    shown.update({f"violation of {name}": constraint.violation for name, constraint in candidate.constraints.items()})
    if candidate.items:
        shown["items"] = candidate.items
    if "total" in candidate.seconds:
        shown["seconds"] = round(candidate.seconds["total"], 3)
    return shown


def intermediate_values(candidate: Candidate) -> dict[int, float]:
    """Items seen -> estimate; Optuna has them for one objective only."""
    return dict(candidate.estimates) if candidate.objectives is None else {}


def values(candidate: Candidate) -> list[float] | None:
    """Returns the objectives of a candidate that is done."""
    if candidate.state != "done" or candidate.fitness is None:
        return None
    return list(candidate.objectives or (candidate.fitness,))


def start_and_end(candidate: Candidate) -> tuple[datetime.datetime, datetime.datetime]:
    """Returns when a candidate that ends now began, and now."""
    now = datetime.datetime.now(datetime.UTC)
    return now - datetime.timedelta(seconds=float(candidate.seconds.get("total", 0.0))), now


@lru_cache(maxsize=4)
def distributions_of(space: SearchSpace) -> Mapping[str, BaseDistribution]:
    """Returns Optuna's distribution of every gene; a layer pattern becomes its length and a few genes per layer."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, BaseDistribution] = {c.name: CategoricalDistribution(c.options) for c in space.choices}
    distributions.update({gene.name: FloatDistribution(gene.low, gene.high) for gene in space.reals})
    if space.pattern is not None:
        distributions["layers"] = IntDistribution(space.pattern.min_layers, space.pattern.max_layers)
        for index in range(space.pattern.max_layers):
            distributions[f"layers.{index:02d}.source"] = CategoricalDistribution(space.pattern.models)
            distributions[f"layers.{index:02d}.layer"] = IntDistribution(0, space.pattern.layer_count - 1)
            if space.pattern.scale is not None:
                low, high = space.pattern.scale
                distributions[f"layers.{index:02d}.scale"] = FloatDistribution(min(low, 1.0), max(high, 1.0))
    return distributions


def params_of(space: SearchSpace, genome: Genome) -> dict[str, Any]:
    """Returns the active genes of a genome, as parameters of an Optuna trial."""
    active = active_genes(space, genome)
    params: dict[str, Any] = {name: value for name, value in genome.scalars if name in active}
    if space.pattern is not None and copies_layers(space, genome):
        params |= layer_params(space, genome.layers)
    return params


def layer_params(space: SearchSpace, layers: Sequence[LayerGene]) -> dict[str, Any]:
    """Returns a layer pattern as parameters of an Optuna trial: its length, and a few for each layer."""
    params: dict[str, Any] = {"layers": len(layers)}
    for index, gene in enumerate(layers):
        params[f"layers.{index:02d}.source"] = gene.source
        params[f"layers.{index:02d}.layer"] = gene.layer
        if space.pattern is not None and space.pattern.scale is not None:
            params[f"layers.{index:02d}.scale"] = gene.scale
    return params


def genome_of(space: SearchSpace, params: Mapping[str, Any]) -> Genome:
    """Returns the genome that an Optuna sampler suggests; genes left out (inactive ones) keep their default."""
    start = space.default()
    values = {name: params.get(name, value) for name, value in start.scalars}
    layers = start.layers
    if "layers" in params:
        stems = [f"layers.{index:02d}" for index in range(params["layers"])]
        layers = tuple(
            LayerGene(params[f"{stem}.source"], params[f"{stem}.layer"], params.get(f"{stem}.scale", 1.0))
            for stem in stems
        )
    return Genome.of(values, layers)


class Parameters:
    """A space's genes as Optuna's parameters, in the journal's form.

    Args:
        space: The space; without one, trials have no parameters.
    """

    def __init__(self, space: SearchSpace | None) -> None:
        self._space = space
        self._texts: dict[str, str] = {}

    def of(self, candidate: Candidate) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Returns the active genes of a candidate: values and distributions."""
        if self._space is None:
            return {}, {}
        params = params_of(self._space, candidate.genome)
        distributions = distributions_of(self._space)
        return params, {name: distributions[name] for name in params}

    def journal_fields(self, candidate: Candidate) -> dict[str, Any]:
        """Returns the fields ``params`` and ``distributions`` of a line of the journal."""
        params, distributions = self.of(candidate)
        for name in distributions.keys() - self._texts.keys():
            self._texts[name] = distribution_json(distributions[name])
        return {
            "params": {name: distributions[name].to_internal_repr(value) for name, value in params.items()},
            "distributions": {name: self._texts[name] for name in params},
        }


def distribution_json(distribution: BaseDistribution) -> str:
    """Writes a distribution in the abbreviated form that Optuna reads: half as long as the one that it writes."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    content: dict[str, Any]
    if isinstance(distribution, CategoricalDistribution):
        content = {"type": "categorical", "choices": list(distribution.choices)}
    elif isinstance(distribution, FloatDistribution | IntDistribution):
        kind = "float" if isinstance(distribution, FloatDistribution) else "int"
        content = {"type": kind, "low": distribution.low, "high": distribution.high}
    else:
        raise TypeError(f"no gene has a {type(distribution).__name__}")
    return json.dumps(content, separators=(",", ":"))


def _state(candidate: Candidate) -> int:
    """Optuna's number for how a candidate ended."""
    if candidate.state == "pending":
        raise ValueError(f"candidate {candidate.number} is still being scored")
    return STATES[candidate.state]


def journal_line(candidate: Candidate, parameters: Parameters) -> dict[str, Any]:
    """Makes the fields of a finished trial in Optuna's journal."""
    began, ended = start_and_end(candidate)
    reached = values(candidate)
    several = reached is not None and len(reached) > 1
    return {
        "state": _state(candidate),
        "value": reached[0] if reached is not None and not several else None,
        "values": reached if several else None,
        "datetime_start": began.isoformat(timespec="microseconds"),
        "datetime_complete": ended.isoformat(timespec="microseconds"),
        **parameters.journal_fields(candidate),
        "user_attrs": user_attributes(candidate),
        "system_attrs": system_attributes(candidate),
        "intermediate_values": intermediate_values(candidate),
    }


def frozen_trial(candidate: Candidate, parameters: Parameters) -> FrozenTrial:
    """Makes a finished trial for any other storage."""
    import optuna

    began, ended = start_and_end(candidate)
    params, distributions = parameters.of(candidate)
    trial = optuna.trial.FrozenTrial(
        number=-1,
        trial_id=-1,
        state=optuna.trial.TrialState(_state(candidate)),
        value=None,
        values=values(candidate),
        datetime_start=began.astimezone().replace(tzinfo=None),
        datetime_complete=ended.astimezone().replace(tzinfo=None),
        params=params,
        distributions=distributions,
        user_attrs=user_attributes(candidate),
        system_attrs=system_attributes(candidate),
        intermediate_values=intermediate_values(candidate),
    )
    trial._validate()
    return trial
