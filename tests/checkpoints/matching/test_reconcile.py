"""Models that store the same otherwise: other names, copies, constants, layers that need not be there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.matching.compatible import check_compatible
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.checkpoints.tensors import SelectedWeights, Weights
from tests.models import write_tiny_llama

Families = Callable[[str], dict[str, Path]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Tensors:
    """Weights in memory."""

    files = ()

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        self.tensors = {n: TensorInfo(n, tuple(t.shape), "F32", 0, 4 * t.numel()) for n, t in sorted(state.items())}

    def read(self, name: str) -> torch.Tensor:
        return self.state[name]

    def release(self, name: str) -> None:
        """Keeps everything."""

    def fingerprint(self, *, anew: bool = False) -> str:
        return str(sorted((name, float(value.sum())) for name, value in self.state.items()))


def _state(model: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: model.tensor(name) for name in model.tensors}


def _stored(model: Checkpoint, state: dict[str, torch.Tensor], **config: object) -> Checkpoint:
    return Checkpoint("other", model.folder, model.config | config, Tensors(state))


def _same(models: dict[str, Checkpoint], reference: str) -> dict[str, Checkpoint]:
    """The models as one set; whichever comes first, they fit each other and have the reference's names."""
    result = dict(reconcile(models, reference).checkpoints)
    assert check_compatible(None, result) == []
    assert {frozenset(model.tensors) for model in result.values()} == {frozenset(result[reference].tensors)}
    return result


def _under(rename: Callable[[str], str], names: object) -> dict[str, str]:
    return {str(name): rename(str(name)) for name in names}  # type: ignore[attr-defined]


def _without_prefix(name: str) -> str:
    return re.sub(r"^(transformer|model|bert|roberta|backbone|gpt_neox)\.", "", name)


def _nested(name: str) -> str:
    """As transformers has called them in memory since 4.52."""
    name = re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)
    return name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")


def _old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


OTHER_NAMES: dict[str, tuple[str, Callable[[str], str]]] = {
    "gpt2 without transformer.": ("gpt2", _without_prefix),
    "bloom without transformer.": ("bloom", _without_prefix),
    "a sub-model saved alone": ("qwen2", _without_prefix),
    "a sub-model of experts": ("qwen3_moe", lambda n: n if n == HEAD else _without_prefix(n)),
    "gamma and beta": ("bert", _old_norms),
    "both": ("roberta", lambda n: n if n.startswith("lm_head") else _without_prefix(_old_norms(n))),
    "its head by its name in memory": ("gpt_neox", lambda n: n.replace("embed_out", "lm_head")),
    "a training loop's wrapper": ("mistral", lambda n: f"_orig_mod.module.{n}"),
    "a wrapper in each layer": ("phi", lambda n: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", n)),
    "a vision-language model, nested": ("llava", _nested),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_other_names(family_of: Families, case: str) -> None:
    name, rename = OTHER_NAMES[case]
    family = family_of(name)
    base, tuned = (open_checkpoint(str(family[model])) for model in ("base", "a"))
    state = _state(tuned)
    renamed = _under(rename, state)
    assert renamed != {n: n for n in renamed}
    other = _stored(tuned, {renamed[n]: value for n, value in state.items()})
    in_names_of_base = _same({"base": base, "other": other}, "base")["other"]
    assert all(torch.equal(in_names_of_base.tensor(n), value) for n, value in state.items())
    in_other_names = _same({"base": base, "other": other}, "other")["base"]
    assert all(torch.equal(in_other_names.tensor(renamed[n]), value) for n, value in _state(base).items())


def test_models_that_store_the_same_stay_as_they_are(family_of: Families) -> None:
    models = {name: open_checkpoint(str(path)) for name, path in family_of("llama").items()}
    result = reconcile(models)
    assert all(result.checkpoints[name] is model for name, model in models.items())
    assert result.notes == ()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_tiny_llama(tmp_path_factory.mktemp("reconcile") / "tied")))


@pytest.mark.parametrize("reference", ["tied", "copied"])
def test_a_stored_copy_of_the_embedding_is_left_out(tied: Checkpoint, reference: str) -> None:
    state = _state(tied)
    copied = _stored(tied, state | {HEAD: state[EMBEDDING].clone()})
    result = _same({"tied": tied, "copied": copied}, reference)
    assert all(HEAD not in model.tensors and model.layout.tied_head for model in result.values())
    alone = _same({"copied": copied}, "copied")["copied"]
    assert alone.layout.tied_head, "of one model, too"


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("reference", ["tied", "own"])
def test_a_head_of_its_own_makes_heads_of_the_others(tied: Checkpoint, reference: str, flag: bool) -> None:
    state = _state(tied)
    own = _stored(tied, state | {HEAD: state[EMBEDDING] + 1}, tie_word_embeddings=flag)
    result = _same({"tied": tied, "own": own}, reference)
    assert torch.equal(result["tied"].tensor(HEAD), state[EMBEDDING])
    assert torch.equal(result["own"].tensor(HEAD), state[EMBEDDING] + 1)
    assert {model.config["tie_word_embeddings"] for model in result.values()} == {False}


def test_a_model_without_a_head_gets_none(tied: Checkpoint) -> None:
    state = _state(tied)
    own = _stored(tied, state | {HEAD: state[EMBEDDING] + 1}, tie_word_embeddings=False)
    bare = _stored(tied, state, tie_word_embeddings=False, architectures=["LlamaModel"])
    (problem,) = check_compatible(None, reconcile({"own": own, "bare": bare}).checkpoints)
    assert problem.startswith("bare: lacks lm_head.weight")


def test_copies_of_t5(family_of: Families) -> None:
    base = open_checkpoint(str(family_of("t5")["base"]))
    state = _state(base)
    extra = {f"{side}.embed_tokens.weight": state["shared.weight"].clone() for side in ("encoder", "decoder")}
    copied = _stored(base, state | extra | {HEAD: state["shared.weight"].clone()})
    for reference in ("base", "copied"):
        assert not set(extra) & _same({"base": base, "copied": copied}, reference)["copied"].tensors.keys()


@pytest.mark.parametrize("reference", ["tied", "old"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("model.rotary_emb.inv_freq", torch.ones(4)),
        ("model.layers.0.attn.bias", torch.ones(1, 1, 4, 4)),
        ("model.embeddings.position_ids", torch.arange(4.0)),
    ],
)
def test_constants_are_left_out_where_one_lacks_them(
    tied: Checkpoint, reference: str, name: str, value: torch.Tensor
) -> None:
    old = _stored(tied, _state(tied) | {name: value})
    result = reconcile({"tied": tied, "old": old}, reference)
    assert all(name not in model.tensors for model in result.checkpoints.values())
    assert name in reconcile({"old": old, "too": old}).checkpoints["old"].tensors


def test_a_bias_is_no_constant(tied: Checkpoint) -> None:
    other = _stored(tied, _state(tied) | {"model.layers.0.attn.bias": torch.ones(4)})
    (problem,) = check_compatible(None, reconcile({"tied": tied, "other": other}).checkpoints)
    assert "model.layers.0.attn.bias" in problem


def test_layers_for_further_tokens(tied: Checkpoint) -> None:
    extra = {"model.layers.4.eh_proj.weight": torch.ones(2, 3), "mtp.fc.weight": torch.ones(3, 2)}
    more = _stored(tied, _state(tied) | extra)
    kept = reconcile({"more": more, "tied": tied})
    assert extra.keys() < kept.checkpoints["more"].tensors.keys()
    assert check_compatible(more, {"tied": tied}) == []
    assert kept.notes == (
        "model.layers.4.eh_proj.weight, mtp.fc.weight predict further tokens: kept from more, as they are",
    )
    left = reconcile({"tied": tied, "more": more})
    assert left.checkpoints["more"].tensors.keys() == tied.tensors.keys()
    assert left.notes == ("more: model.layers.4.eh_proj.weight, mtp.fc.weight predict further tokens and are left out",)
    moved = reconcile({"more": more, "tied": tied}, layers_move=True).checkpoints["more"]
    assert moved.tensors.keys() - tied.tensors.keys() == {"mtp.fc.weight"}


def test_selected_weights(tied: Checkpoint) -> None:
    weights: Weights = SelectedWeights(tied.weights, {"b": EMBEDDING, "a": EMBEDDING})
    assert list(weights.tensors) == ["a", "b"]
    assert weights.tensors["a"].name == "a"
    assert torch.equal(weights.read("a"), tied.tensor(EMBEDDING))
    assert weights.fingerprint() != SelectedWeights(tied.weights, {"a": EMBEDDING}).fingerprint()
    assert weights.files == tied.files
