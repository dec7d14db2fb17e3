"""Which row of which model each row of the merged vocabulary is, in every model: matched by the text of the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.checkpoints.header import name_some
from evomerge.errors import RecipeError
from evomerge.recipe.model import ModelToken, TokenRule, ZeroToken

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Row = tuple[str, int]
"""A model and the number of one of its rows."""


@dataclass(frozen=True)
class Vocabularies:
    """What the models have.

    Attributes:
        tokens: Model -> token -> row, in the order of the recipe.
        rows: Model -> number of its rows.
        base: The base model, whose row stands in for a token that several models have and others lack; None without.
    """

    tokens: Mapping[str, Mapping[str, int]]
    rows: Mapping[str, int]
    base: str | None

    def row(self, model: str, token: str) -> int | None:
        """Returns a model's row of a token; None where it has no such token, or no row for it."""
        row = self.tokens[model].get(token)
        return None if row is None or row >= self.rows[model] else row


@dataclass(frozen=True)
class RowMaps:
    """The merged vocabulary's rows.

    Attributes:
        own: Model -> [rows]: the row of the model that goes there, or -1 where it has none to give.
        defaults: Row -> what goes there in the models that have none: the mean of these rows; zeros for ().
        blank: Rows without a token (gaps between ids, padding): the mean of the rows with one.
        unknown: Tokens that no model has, and no rule speaks of.
    """

    own: Mapping[str, NDArray[np.int64]]
    defaults: Mapping[int, tuple[Row, ...]]
    blank: NDArray[np.int64]
    unknown: tuple[str, ...]


def map_rows(
    tokens: Mapping[str, int], rows: int, models: Vocabularies, rules: Mapping[str, TokenRule] | None = None
) -> RowMaps:
    """Finds every row.

    A token that a model lacks is there what its rule says. Without a rule it is the row of the one model that has it;
    of several, the base's if that has it, else their mean; and zeros where no model has it. These are mergekit's rules.

    Args:
        tokens: The merged vocabulary: token -> row.
        rows: Its number of rows.
        models: What the models have.
        rules: The recipe's rules, by token.

    Raises:
        RecipeError: A rule names a model or a token that is not there; all of them at once.
    """
    import numpy as np

    own = {model: np.full(rows, -1, np.int64) for model in models.tokens}
    defaults: dict[int, tuple[Row, ...]] = {}
    unknown: list[str] = []
    problems: list[str] = []
    rules = rules or {}
    for token, output_row in tokens.items():
        rule = rules.get(token, TokenRule())
        rows_held = [(model, row) for model in own if (row := models.row(model, token)) is not None]
        if not rule.force:
            for model, row in rows_held:
                own[model][output_row] = row
            if len(rows_held) == len(own):
                continue
        try:
            defaults[output_row] = _default(token, rule, rows_held, models)
        except RecipeError as error:
            problems += error.problems
        if not rows_held and rule.source is None:
            unknown.append(token)
    if problems:
        raise RecipeError(problems)
    blank = np.setdiff1d(np.arange(rows), np.fromiter(tokens.values(), np.int64, len(tokens)))
    return RowMaps(own, defaults, blank, tuple(unknown))


def _default(token: str, rule: TokenRule, rows: list[Row], models: Vocabularies) -> tuple[Row, ...]:
    """The rows whose mean is the token in the models that lack it."""
    if rule.source is not None:
        return _ruled(token, rule.source, models)
    of_base = [row for row in rows if row[0] == models.base]
    return tuple(of_base or rows)


def _ruled(token: str, source: str | ZeroToken | ModelToken, models: Vocabularies) -> tuple[Row, ...]:
    if isinstance(source, ZeroToken):
        return ()
    where = f"tokenizer.tokens.{token}.source"
    model = source if isinstance(source, str) else source.model
    if model not in models.tokens:
        raise RecipeError(f"{where}: {model} is not among the merged models: {name_some(models.tokens)}")
    if isinstance(source, ModelToken) and source.token_id is not None:
        if source.token_id >= models.rows[model]:
            raise RecipeError(f"{where}: {model} has {models.rows[model]} rows, there is no token_id {source.token_id}")
        return ((model, source.token_id),)
    text = token if isinstance(source, str) or source.token is None else source.token
    row = models.row(model, text)
    if row is None:
        raise RecipeError(f"{where}: {model} has no token {text!r}")
    return ((model, row),)
