"""The difference of two models as an adapter: what PEFT makes of it is the model again, as far as the rank goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from evomerge.engine.low_rank import low_rank_adapter
from evomerge.errors import BadInput
from tests.models import write_tiny_llama


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Path]]:
    """A base and a noisy copy in which every tensor differs, with the head tied and untied."""
    made = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        base = write_tiny_llama(folder / "base", layers=2, hidden=16, tied=tied)
        made[tied] = (base, write_tiny_llama(folder / "tuned", 1, base=base, layers=2, hidden=16, tied=tied))
    return made


def loaded(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT: the tied embedding is saved with the adapter
@pytest.mark.parametrize("tied", [True, False])
def test_at_full_rank_peft_has_the_model_again(
    pairs: dict[bool, tuple[Path, Path]], tmp_path: Path, tied: bool
) -> None:
    base, tuned = pairs[tied]
    merged = loaded(tuned).state_dict()
    adapter = low_rank_adapter(loaded(base), merged, 64)
    assert adapter.left_out == ()
    assert adapter.ties == tied
    assert adapter.share == pytest.approx(1.0, abs=1e-4)
    adapter.write(tmp_path / "adapter", str(base))
    live = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter").eval()
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(live(ids).logits, loaded(tuned)(ids).logits, rtol=1e-3, atol=1e-4)
    model = loaded(base)
    adapter.apply(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-4, atol=1e-5)


def test_a_low_rank_keeps_the_largest_singular_values(pairs: dict[bool, tuple[Path, Path]]) -> None:
    base, tuned = loaded(pairs[False][0]), loaded(pairs[False][1]).state_dict()
    adapter = low_rank_adapter(base, tuned, 3)
    name = "model.layers.1.mlp.down_proj"
    delta = tuned[f"{name}.weight"] - base.state_dict()[f"{name}.weight"]
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    a, b = adapter.products[name]
    assert (a.shape, b.shape) == ((3, delta.shape[1]), (delta.shape[0], 3))
    torch.testing.assert_close(b @ a, u[:, :3] * s[:3] @ v[:3], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-6)
    assert 0.1 < adapter.share < 0.9


def test_what_did_not_change_is_in_it_only_beside_what_did(pairs: dict[bool, tuple[Path, Path]]) -> None:
    base, tuned = loaded(pairs[True][0]), loaded(pairs[True][1]).state_dict()
    state = base.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = {**state, name: tuned[name], "model.norm.weight": tuned["model.norm.weight"]}
    adapter = low_rank_adapter(base, changed, 4)
    assert sorted(adapter.products) == [f"model.layers.{k}.self_attn.q_proj" for k in (0, 1)]
    assert not adapter.products["model.layers.1.self_attn.q_proj"][0].any()
    # PEFT takes every module whose name ends in "norm" for one of them.
    assert {name.rpartition(".")[2] for name in adapter.whole} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    with pytest.raises(BadInput, match="the model is its base"):
        low_rank_adapter(base, state, 4)
    with pytest.raises(BadInput, match="other tensors, layers or shapes"):
        low_rank_adapter(base, {**state, "more.weight": torch.zeros(2)}, 4)
