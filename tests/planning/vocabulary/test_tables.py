"""Which tensors have a row for each token."""

from __future__ import annotations

from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.vocabulary_tensors import vocabulary_tensors

LAYER = {f"transformer.h.{i}.{part}.weight": (4, 4) for i in range(2) for part in ("attn.c_attn", "mlp.c_fc")}


def tables(shapes: dict[str, tuple[int, ...]], **config: object) -> tuple[str, ...]:
    tensors = {name: TensorSpec(name, shape, "F32") for name, shape in (shapes | LAYER).items()}
    return vocabulary_tensors(layout_of(tensors, {"vocab_size": 10, **config}), tensors)


def test_embedding_head_and_bias() -> None:
    """Not the positions, though there are as many, nor a norm."""
    shapes = {"transformer.wte.weight": (10, 4), "transformer.wpe.weight": (10, 4), "transformer.ln_f.weight": (4,)}
    assert tables(shapes) == ("transformer.wte.weight",)
    head = {"lm_head.weight": (10, 4), "lm_head.bias": (10,)}
    assert tables(shapes | head) == ("lm_head.bias", "lm_head.weight", "transformer.wte.weight")


def test_a_bias_beside_a_tied_head() -> None:
    shapes = {"embeddings.word_embeddings.weight": (10, 4), "cls.predictions.bias": (10,), "cls.norm.weight": (10,)}
    assert tables(shapes) == ("cls.predictions.bias", "embeddings.word_embeddings.weight")


def test_no_embedding_no_tables() -> None:
    assert tables({}) == ()
