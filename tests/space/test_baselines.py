"""Generation 0: the right recipes, once each, and genomes to breed from."""

from __future__ import annotations

from evomerge.space.baselines import baselines
from evomerge.space.decode import recipe_hash
from evomerge.space.genome import LayerGene
from tests.algorithms.landscapes import make_space, pattern_space


def test_names_and_order() -> None:
    names = [start.name for start in baselines(make_space(methods=("linear", "slerp", "ties", "dare")))]
    assert names == [
        "parent:base",
        "parent:math",
        "parent:code",
        "parent:law",
        "uniform average",
        "task_arithmetic λ=0.3",
        "task_arithmetic λ=0.6",
        "task_arithmetic λ=1",
        "slerp (defaults)",
        "ties (defaults)",
        "dare (defaults)",
    ]  # linear at its defaults is the uniform average


def test_recipes_by_hand() -> None:
    found = {start.name: start.recipe for start in baselines(make_space(methods=("ties",), dtype="float32"))}
    sources = ("models/math", "models/code", "models/law")
    assert found["parent:math"] == {
        "merge_method": "linear",
        "models": [{"model": "models/math", "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    assert found["task_arithmetic λ=0.6"] == {
        "merge_method": "task_arithmetic",
        "base_model": "models/base",
        "models": [{"model": source, "parameters": {"weight": 1.0}} for source in sources],
        "parameters": {"lambda": 0.6},
        "dtype": "float32",
    }
    assert found["ties (defaults)"] == {
        "merge_method": "ties",
        "base_model": "models/base",
        "models": [{"model": source, "parameters": {"weight": 1.0, "density": 0.2}} for source in sources],
        "dtype": "float32",
    }


def test_every_genome_is_in_the_space_and_no_recipe_twice() -> None:
    for space in (make_space(), make_space(base=None, methods=("linear", "slerp")), pattern_space()):
        starts = baselines(space)
        assert all(space.contains(start.genome) for start in starts)
        assert len({recipe_hash(start.recipe) for start in starts}) == len(starts)


def test_genomes_are_the_nearest() -> None:
    space = make_space(methods=("ties", "task_arithmetic"), gene_overrides={"weight": {"low": 0.2, "high": 0.8}})
    found = {start.name: start.genome.values for start in baselines(space)}
    parent = found["parent:code"]
    assert parent["method"] == "task_arithmetic"
    assert (parent["weight.code.g0"], parent["weight.math.outer"]) == (0.8, 0.2)
    assert found["task_arithmetic λ=0.3"]["lambda.g2"] == 0.3
    assert found["ties (defaults)"]["method"] == "ties"
    assert found["ties (defaults)"]["density.law.g1"] == 0.2


def test_a_pattern_space_starts_from_whole_stacks() -> None:
    found = {start.name: start.genome.layers for start in baselines(pattern_space())}
    assert found["parent:code"] == tuple(LayerGene("code", layer) for layer in range(12))
    assert [gene.source for gene in found["frankenmerge (defaults)"]] == ["math"] * 3 + ["code"] * 3 + ["law"] * 3 + [
        "math"
    ] * 3
    # Each model's lower half is seen once, and each one's upper half.
    halves = {name: layers for name, layers in found.items() if name.startswith("halves:")}
    assert list(halves) == ["halves:base+math", "halves:math+code", "halves:code+law", "halves:law+base"]
    assert halves["halves:code+law"] == tuple(LayerGene("code" if k < 6 else "law", k) for k in range(12))


def test_halves_are_for_spaces_of_patterns_only() -> None:
    mixed = make_space(methods=("ties", "frankenmerge"))
    assert not any(start.name.startswith("halves:") for start in baselines(mixed))


def test_without_a_base_nothing_needs_one() -> None:
    starts = baselines(make_space(base=None, methods=("linear",)))
    assert [start.name for start in starts] == ["parent:math", "parent:code", "parent:law", "uniform average"]
    assert all("base_model" not in start.recipe for start in starts)


def test_a_lambda_below_its_range_is_put_into_the_weights() -> None:
    """λ 0.3 with weights 1 is λ 0.5 with weights 0.6."""
    space = make_space(methods=("task_arithmetic",), gene_overrides={"lambda": {"low": 0.5, "high": 1.5}})
    genome = next(start.genome for start in baselines(space) if start.name == "task_arithmetic λ=0.3")
    assert {genome.values[g.name] for g in space.reals if g.parameter == "lambda"} == {0.5}
    assert {genome.values[g.name] for g in space.reals if g.parameter == "weight"} == {0.6}
