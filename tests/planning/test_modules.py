"""Recipes with modules: what each name means, and models whose parts are merged each in its own way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.engine.resident import Resident
from evomerge.errors import RecipeError
from evomerge.planning.modules import find_shares, owner
from evomerge.planning.plan import align_and_plan, make_plan
from evomerge.planning.vocabulary.merged_tokenizer import WrittenTokenizer
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.architectures import ARCHITECTURES, outputs
from tests.engine.recipes import opened, plan_of
from tests.engine.test_architectures import load, tensors

Families = Callable[[str], dict[str, Path]]


def layout(*names: str) -> Layout:
    """Two layers of each stack (a name that ends in a dot), and the other tensors."""
    blocks = [f"{n}{i}.{s}.weight" for n in names if n.endswith(".") for i in (0, 1) for s in ("attn.q", "mlp.up")]
    return layout_of({name: TensorSpec(name, (4, 4), "F32") for name in [*blocks, *names] if name[-1] != "."}, {})


T5 = layout("encoder.block.", "decoder.block.", "shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight")
QWEN_VL = layout("model.layers.", "visual.blocks.", "visual.merger.mlp.weight", "lm_head.weight", "visual.patch.weight")
# Numbered parts of a merger are no layers: two of them in one tower, as Qwen3-VL has them.
QWEN3_VL = layout(
    *("model.language_model.layers.", "model.visual.blocks.", "model.visual.deepstack_merger_list."),
    *("model.visual.merger.linear_fc1.weight", "model.visual.pos_embed.weight", "model.language_model.norm.weight"),
)
NEW_VL = layout(
    *(
        "model.language_model.layers.",
        "model.vision_tower.encoder.layers.",
        "model.multi_modal_projector.linear.weight",
    ),
    *("model.language_model.norm.weight", "lm_head.weight", "model.vision_tower.post_layernorm.weight"),
)


@pytest.mark.parametrize(
    ("model", "modules", "expected"),
    [
        (T5, ["encoder", "decoder"], {"shared.weight": "decoder", "encoder.final_layer_norm.weight": "encoder"}),
        (T5, ["encoder", "decoder", "shared"], {"shared.weight": "shared", "lm_head.weight": "decoder"}),
        (T5, ["encoder.block", "decoder.block", "default"], {"encoder.final_layer_norm.weight": "default"}),
        (T5, ["encoder"], {"shared.weight": None, "decoder.block.0.mlp.up.weight": None}),
        (
            QWEN_VL,
            ["text_decoder", "vision_tower", "multi_modal_projector"],
            {
                "model.layers.1.attn.q.weight": "text_decoder",
                "visual.blocks.0.mlp.up.weight": "vision_tower",
                "visual.patch.weight": "vision_tower",
                "visual.merger.mlp.weight": "multi_modal_projector",
                "lm_head.weight": "text_decoder",
            },
        ),
        (
            QWEN3_VL,
            ["text_decoder", "vision_tower", "multi_modal_projector"],
            {
                "model.visual.blocks.1.attn.q.weight": "vision_tower",
                "model.visual.pos_embed.weight": "vision_tower",
                "model.visual.merger.linear_fc1.weight": "multi_modal_projector",
                "model.visual.deepstack_merger_list.1.mlp.up.weight": "multi_modal_projector",
                "model.language_model.norm.weight": "text_decoder",
            },
        ),
        (
            NEW_VL,
            ["text_decoder", "vision_tower"],
            {
                "model.multi_modal_projector.linear.weight": "text_decoder",
                "model.language_model.norm.weight": "text_decoder",
                "model.vision_tower.post_layernorm.weight": "vision_tower",
                "lm_head.weight": "text_decoder",
            },
        ),
        (NEW_VL, ["vision_tower", "multi_modal_projector"], {"model.language_model.layers.0.attn.q.weight": None}),
        (layout("model.layers.", "lm_head.weight"), ["anything"], {"lm_head.weight": "anything"}),
    ],
)
def test_what_a_module_decides(model: Layout, modules: list[str], expected: dict[str, str | None]) -> None:
    shares = find_shares(modules, model)
    found = {name: share.module if (share := owner(name, model, shares)) else None for name in expected}
    if len(model.stacks) > 1:  # of one stack, the planner asks nobody
        assert found == expected
    assert all(owner(name, model, shares) in (*shares, None) for name in model.names)


@pytest.mark.parametrize(
    ("model", "modules", "message"),
    [
        (
            T5,
            ["encoder", "head"],
            r"modules\.head: the model has no such part; its stacks are decoder\.block \(2 layers",
        ),
        (T5, ["decoder", "text_decoder"], r"modules\.text_decoder: is decoder\.block, which 'decoder' is already"),
        (QWEN_VL, ["audio_tower"], r"modules\.audio_tower: the model has no such part"),
        (
            layout("text_model.encoder.layers.", "vision_model.encoder.layers."),
            ["encoder"],
            r"modules\.encoder: may be any of text_model\.encoder\.layers \(2 layers\), vision_model",
        ),
    ],
)
def test_names_that_mean_nothing_or_too_much(model: Layout, modules: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_shares(modules, model)


def whole(family: dict[str, Path], weight: float) -> dict[str, Any]:
    models = [{"model": str(family["a"]), "parameters": {"weight": weight}}]
    return {"models": [*models, {"model": str(family["b"]), "parameters": {"weight": 1 - weight}}]}


def stacked(family: dict[str, Path], weight: float) -> dict[str, Any]:
    """Both layers, and the last once more."""
    sources = whole(family, weight)["models"]
    return {"slices": [{"sources": [s | {"layer_range": span} for s in sources]} for span in ([0, 2], [1, 2])]}


CASES = [
    ("t5", "decoder", "encoder", "decoder.block", {"num_decoder_layers": 3, "num_layers": 2}),
    ("t5", "encoder", "decoder", "encoder.block", {"num_decoder_layers": 2, "num_layers": 3}),
    ("whisper", "encoder", "decoder", "model.encoder.layers", {"encoder_layers": 3, "decoder_layers": 2}),
    ("whisper", "decoder", "encoder", "model.decoder.layers", {"encoder_layers": 2, "decoder_layers": 3}),
    ("clip", "vision_model", "text_model", "vision_model.encoder.layers", {"vision_config.num_hidden_layers": 3}),
    ("llava", "text_decoder", "vision_tower", "language_model.model.layers", {"text_config.num_hidden_layers": 3}),
]


@pytest.mark.parametrize(("name", "deeper", "other", "stack", "depths"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_each_module_in_its_own_way(
    family_of: Families, tmp_path: Path, name: str, deeper: str, other: str, stack: str, depths: dict[str, int]
) -> None:
    """One module gets a layer more at 0.8 a + 0.2 b, another is 0.3 a + 0.7 b; what nobody names is the base's."""
    architecture, family = ARCHITECTURES[name], family_of(name)
    modules = {deeper: stacked(family, 0.8), other: whole(family, 0.3)}
    recipe = {"merge_method": "linear", "base_model": str(family["base"]), "modules": modules}
    out = merge_to_folder(parse_recipe(recipe), tmp_path / "out")
    merged = load(architecture, out)
    for key, depth in depths.items():
        section, _, own = key.rpartition(".")
        config = merged.config.to_dict()
        assert (config[section] if section else config)[own] == depth

    base, a, b = (tensors(family[model]) for model in ("base", "a", "b"))
    place, written = open_checkpoint(str(family["base"])).layout, tensors(out)
    shares = find_shares([deeper, other], place)
    extra = {key for key in written if key not in base}
    assert {key.replace(f"{stack}.2.", f"{stack}.1.") for key in extra} == {k for k in base if f"{stack}.1." in k}
    weights = {deeper: 0.8, other: 0.3}
    for key, value in written.items():
        origin = key.replace(f"{stack}.2.", f"{stack}.1.")
        share = owner(origin, place, shares)
        expected = base[origin]
        if share is not None:
            expected = weights[share.module] * a[origin] + (1 - weights[share.module]) * b[origin]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=key)

    arguments = architecture.inputs(merged)
    live, _ = Resident(opened(str(folder) for folder in family.values())).write(plan_of(recipe))
    torch.testing.assert_close(outputs(live, arguments), outputs(merged, arguments), rtol=1e-5, atol=1e-6)


def test_what_no_module_names_is_the_base(family_of: Families) -> None:
    family = family_of("llava")
    recipe = {"merge_method": "linear", "base_model": str(family["base"])}
    plan = plan_of(recipe | {"modules": {"multi_modal_projector": whole(family, 0.5)}, "out_dtype": "bfloat16"})
    merged = {op.output for op in plan.operations if op.method == "linear"}
    assert merged == {n for n in open_checkpoint(str(family["base"])).tensors if "projector" in n}
    copied = [op for op in plan.operations if op.output not in merged]
    assert {(op.method, op.sources[0].model, op.dtype) for op in copied} == {("copy", str(family["base"]), "BF16")}


def test_what_no_module_decides_is_said(family_of: Families) -> None:
    family = family_of("t5")
    modules = {"encoder": whole(family, 0.5), "default": whole(family, 0.5)}
    recipe = parse_recipe({"merge_method": "linear", "modules": modules})
    _, _, warnings = align_and_plan(recipe, opened(recipe.models()), identify=False)
    assert [text for text in warnings if text.startswith("modules: none of them decides decoder.block.0.")]


def test_several_passthroughs(family_of: Families) -> None:
    """The text of one model with the eyes of another."""
    family = family_of("llava")
    modules = {"text_decoder": {"models": [{"model": str(family["a"])}]}}
    modules["vision_tower"] = {"models": [{"model": str(family["b"])}]}
    plan = plan_of({"merge_method": "passthrough", "modules": modules})
    models = {op.output.split(".")[0]: op.sources[0].model for op in plan.operations}
    assert models["language_model"] == str(family["a"])
    assert models["vision_tower"] == str(family["b"])


def test_embed_slerp_takes_the_tables_out_of_the_module_that_has_them(family_of: Families) -> None:
    family = family_of("llava")
    recipe = {"merge_method": "linear", "base_model": str(family["base"]), "tokenizer_source": "base"}
    recipe |= {"parameters": {"embed_slerp": True}}
    tables = {ARCHITECTURES["llava"].embedding, ARCHITECTURES["llava"].head}
    for names, expected in ((("text_decoder", "vision_tower"), tables), (("vision_tower",), set())):
        parsed = parse_recipe(recipe | {"modules": {name: whole(family, 0.3) for name in names}})
        plan = make_plan(parsed, opened(parsed.models()), WrittenTokenizer({}, {}))
        assert {op.output for op in plan.operations if op.method == "slerp"} == expected


def test_the_whole_model_is_no_scope_of_modules(family_of: Families) -> None:
    family = family_of("t5")
    body = whole(family, 0.5)
    recipe = {"merge_method": "ties", "base_model": str(family["base"]), "modules": {"encoder": body, "decoder": body}}
    with pytest.raises(RecipeError, match="scope: 'model' is not possible beside 'modules'"):
        plan_of(recipe | {"parameters": {"scope": "model", "density": 0.5}})


def test_a_layer_of_another_kind_is_refused(family_of: Families) -> None:
    """DeepSeek's first layer is dense, and only its number tells the model so."""
    family = family_of("deepseek_v3")
    slices = [{"sources": [{"model": str(family["a"]), "layer_range": span}]} for span in ([0, 2], [0, 1])]
    with pytest.raises(
        RecipeError, match=r"layer 2 of the output is layer 0 of .* of another kind than layer 1 before it"
    ):
        plan_of({"merge_method": "passthrough", "slices": slices})


def test_models_of_different_depth_may_be_sliced(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    from tests.models import write_tiny_llama

    short = write_tiny_llama(tmp_path / "short", 5, layers=2)
    slices = [
        {"sources": [{"model": str(model), "layer_range": span}]}
        for model, span in ((tiny_family["a"], [0, 3]), (short, [1, 2]))
    ]
    assert plan_of({"merge_method": "passthrough", "slices": slices}).config["num_hidden_layers"] == 4
    slices[1]["sources"][0]["layer_range"] = [1, 3]
    with pytest.raises(RecipeError, match=r"slices\[1\]: layer_range \[1, 3\] of .*short, which has 2 layers"):
        plan_of({"merge_method": "passthrough", "slices": slices})
