"""The space of a specification over its models: what the groups of tensors are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.problem.problem import make_space, tensor_group_filters
from evomerge.space.decode import decode
from evomerge.space.genes import REST
from evomerge.space.genome import Genome
from evomerge.spec.load import parse_spec
from tests.architectures import ARCHITECTURES
from tests.engine.recipes import plan_of
from tests.frame import search_spec

Families = Callable[[str], dict[str, Path]]

GROUPS = [("attention", "mlp"), ("mlp",), ("router", "mlp", "norm", "ssm"), ("experts", "shared_experts", "attention")]
NAMES = [
    ("mixtral", "block_sparse_moe.gate.weight", "router"),
    ("qwen3_moe", "mlp.experts.1.gate_proj.weight", "experts"),
    ("qwen3_next", "mlp.shared_expert_gate.weight", "shared_experts"),
    ("qwen3_next", "linear_attn.A_log", "ssm"),
    ("qwen3_next", "linear_attn.norm.weight", "norm"),
    ("deepseek_v3", "mlp.gate.e_score_correction_bias", "router"),
    ("deepseek_v3", "mlp.up_proj.weight", "mlp"),
    ("granitemoehybrid", "block_sparse_moe.input_linear.weight", "experts"),
    ("granitemoehybrid", "block_sparse_moe.router.layer.weight", "router"),
    ("granitemoehybrid", "shared_mlp.output_linear.weight", "shared_experts"),
    ("nemotron_h", "mixer.in_proj.weight", "ssm"),
    ("nemotron_h", "mixer.q_proj.weight", "attention"),
    ("nemotron_h", "mixer.down_proj.weight", "mlp"),
    ("nemotron_h", "mixer.gate.weight", "router"),
    ("lfm2_moe", "feed_forward.expert_bias", "router"),
    ("lfm2_moe", "conv.in_proj.weight", "attention"),
    ("gpt_oss", "mlp.experts.gate_up_proj_bias", "experts"),
    ("llama4", "feed_forward.shared_expert.up_proj.weight", "shared_experts"),
    ("zamba2", "shared_transformer.self_attn.q_proj.weight", "attention"),
    ("zamba2", "mamba_decoder.mamba.D", "ssm"),
    ("gemma3n", "altup.modality_router.weight", "rest"),
    ("llama", "mlp.gate_proj.weight", "mlp"),
]


@pytest.mark.parametrize(("name", "suffix", "kind"), NAMES)
def test_what_a_tensor_is(family_of: Families, name: str, suffix: str, kind: str) -> None:
    layout = open_checkpoint(str(family_of(name)["base"])).layout
    places = [at for at in map(layout.locate, layout.names) if at.suffix == suffix]
    assert {at.kind for at in places} == {kind}


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if len(a.stacks) == 1])
def test_substrings_pick_a_group_and_nothing_else(family_of: Families, name: str) -> None:
    checkpoint = open_checkpoint(str(family_of(name)["base"]))
    for chosen in GROUPS:
        filters = tensor_group_filters(checkpoint, chosen)
        for tensor in checkpoint.tensors:
            at = checkpoint.layout.locate(tensor)
            if at.stack is None:
                continue
            expected = at.kind if at.kind in chosen else at.group if at.group in chosen else REST
            picked = [group for group in chosen if any(text in tensor for text in filters.get(group, ()))]
            assert picked == [expected] * (expected != REST), tensor


def test_genes_of_experts_and_routers_decide_their_tensors(family_of: Families) -> None:
    """The experts of each layer at 0.1, its router at 0.9, every other MLP at 0.5, all that is left at 0.3."""
    family = family_of("qwen3_next")
    values = {"experts": 0.1, "router": 0.9, "mlp": 0.5, "rest": 0.3}
    text = search_spec(family | {"c": family["b"]}, space__tensor_groups=["mlp", "router", "experts"])
    text["space"] |= {"methods": ["task_arithmetic"], "layer_groups": 1}
    spec = parse_spec(text)
    space = make_space(spec, {str(folder): open_checkpoint(str(folder)) for folder in family.values()})
    assert {gene.tensors for gene in space.reals} == {*values, None}
    scalars = {gene.name: values[gene.tensors] if gene.tensors else 0.2 for gene in space.reals}
    plan = plan_of(decode(space, Genome.of({**space.default().values, **scalars, "lambda.outer": 1.0})))
    weights = {op.output: op.settings.sources[0].get("weight") for op in plan.operations if op.settings.sources}
    layout = open_checkpoint(str(family["base"])).layout
    for tensor, weight in weights.items():
        at = layout.locate(tensor)
        expected = values.get(at.kind, values.get(at.group, 0.3)) if at.stack else 0.2
        assert weight == pytest.approx(expected), tensor
