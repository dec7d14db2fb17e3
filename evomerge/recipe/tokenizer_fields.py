"""Reading ``tokenizer_source:`` and the ``tokenizer:`` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.recipe.references import reference_at
from evomerge.recipe.tokenizer import ModelToken, TokenizerBlock, TokenRule, ZeroToken
from evomerge.recipe.validation import Findings, choice_at, integer_at, join, kind_of, mapping_at


def tokenizer_source_at(found: Findings, path: str, value: Any) -> str | None:
    """``base``, ``union``, ``model:PATH`` or a model reference; None when not given."""
    if value is None:
        return None
    reference = reference_at(found, path, value)
    if reference == "model:":
        found.error(path, "names no model after 'model:'")
        return None
    return reference


def tokenizer_at(found: Findings, path: str, value: Any) -> TokenizerBlock | None:
    """The whole block; None when not given."""
    if value is None:
        return None
    fields = mapping_at(found, path, value, ("source", "tokens", "pad_to_multiple_of"))
    source = tokenizer_source_at(found, join(path, "source"), fields.get("source", "union"))
    pad = None
    if "pad_to_multiple_of" in fields:
        pad = integer_at(found, join(path, "pad_to_multiple_of"), fields["pad_to_multiple_of"], 1)
    tokens = _tokens(found, join(path, "tokens"), fields.get("tokens", {}))
    return TokenizerBlock(source or "union", tokens, pad)


def _tokens(found: Findings, path: str, value: Any) -> tuple[tuple[str, TokenRule], ...]:
    if not isinstance(value, Mapping):
        found.error(path, f"expected a mapping from token to rule, got {kind_of(value)}")
        return ()
    return tuple((str(token), _rule(found, join(path, str(token)), rule)) for token, rule in value.items())


def _rule(found: Findings, path: str, value: Any) -> TokenRule:
    if value is None:
        return TokenRule()
    fields = mapping_at(found, path, value, ("source", "force"))
    force = fields.get("force", False)
    if not isinstance(force, bool):
        found.error(join(path, "force"), f"expected true or false, got {kind_of(force)}")
        force = False
    source = fields.get("source")
    if force and source is None:
        found.error(path, "force needs a source: it says where the token comes from in every model")
    return TokenRule(None if source is None else _token_source(found, join(path, "source"), source), force)


def _token_source(found: Findings, path: str, value: Any) -> str | ZeroToken | ModelToken | None:
    if not isinstance(value, Mapping) or "kind" not in value:
        return reference_at(found, path, value)
    kind = choice_at(found, join(path, "kind"), value["kind"], ("zero", "model_token"))
    if kind is None:
        return None
    if kind == "zero":
        mapping_at(found, path, value, ("kind",))
        return ZeroToken()
    return _model_token(found, path, value)


def _model_token(found: Findings, path: str, value: Mapping[str, Any]) -> ModelToken | None:
    fields = mapping_at(found, path, value, ("kind", "model", "token", "token_id"))
    if "model" not in fields:
        found.error(join(path, "model"), "is missing")
    if ("token" in fields) == ("token_id" in fields):
        found.error(path, "needs exactly one of token and token_id")
        return None
    model = reference_at(found, join(path, "model"), fields.get("model", "missing"))
    token = token_id = None
    if "token" in fields:
        token = fields["token"] if isinstance(fields["token"], str) else None  # a token may be blank text
        if token is None:
            found.error(join(path, "token"), f"expected text, got {kind_of(fields['token'])}")
    else:
        token_id = integer_at(found, join(path, "token_id"), fields["token_id"], 0)
    if model is None or (token is None and token_id is None):
        return None
    return ModelToken(model, token, token_id)
