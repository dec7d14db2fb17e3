"""The way in: the models of a recipe with one vocabulary, and the tokenizer that goes with it.

With a tokenizer source, rows are matched by the text of their tokens, and every model gets the rows of the merged
vocabulary: the engine sees models that fit. Without one, models with more rows lose those beyond the smallest
vocabulary, provided that the rows they keep mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.checkpoint import Checkpoint, generation_defaults, stop_ids
from evomerge.checkpoints.header import name_some, shape_text
from evomerge.checkpoints.layout import vocabulary_tensors
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.checkpoints.reference import find_model
from evomerge.checkpoints.tokenizer import (
    Tokenizer,
    is_python_code,
    read_tokenizer,
    tokenizer_contents,
    tokenizer_files,
)
from evomerge.checkpoints.weight_files import read_json_object
from evomerge.errors import CheckpointError
from evomerge.planning.parts import is_meant, separate
from evomerge.planning.vocabulary.chat_template import chosen_template
from evomerge.planning.vocabulary.conversation import lost_stops, lost_stops_text, lost_template, with_stops
from evomerge.planning.vocabulary.merged_tokenizer import WrittenTokenizer, files_of, fitting_ids, with_chat_template
from evomerge.planning.vocabulary.merged_vocabulary import Vocabulary, output_vocabulary, shortened
from evomerge.planning.vocabulary.row_maps import RowMaps, Vocabularies, map_rows
from evomerge.recipe import Recipe, Source, TokenizerBlock

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MODEL = "model:"
_OF_THE_MODEL = re.compile(
    r"\..*|.*\.md|(generation_)?config\.json|.*\.index\.json|.*\.(safetensors|bin|pt|pth|gguf)"
    r"|(modeling|configuration)_.*\.py"
)


@dataclass(frozen=True)
class Aligned:
    """Models with one vocabulary.

    Attributes:
        checkpoints: The models by reference, with the merged vocabulary's rows where that changes any.
        tokenizer: What is written beside the merged weights; None for the reference model's files as they are.
        warnings: What was odd but possible.
        tokens: The merged vocabulary, where it is not the reference model's own.
    """

    checkpoints: Mapping[str, Checkpoint]
    tokenizer: WrittenTokenizer | None = None
    warnings: tuple[str, ...] = ()
    tokens: Mapping[str, int] | None = None


def align(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    truncate_vocabulary: bool = False,
    keep_tables: bool = False,
) -> Aligned:
    """Gives the models of a recipe one naming and one vocabulary.

    Args:
        recipe: The recipe, its references as the keys of `checkpoints`.
        checkpoints: Open checkpoints by reference.
        truncate_vocabulary: Cut vocabularies of different sizes to the smallest where the recipe has no tokenizer
            source; they are refused otherwise.
        keep_tables: Keep embeddings and heads with the merged rows in memory once they are computed.

    Raises:
        RecipeError: What the recipe says of tokens, tokenizers or the chat template cannot be carried out.
        CheckpointError: A tokenizer is missing or cannot be used, or the models' rows cannot be told or matched.
    """
    sliced = any(part.length is not None for part in recipe.parts)
    listed = recipe.tokenizer.models if recipe.tokenizer else ()
    given = {reference: checkpoints[reference] for reference in dict.fromkeys([*listed, *recipe.models()])}
    reconciled = reconcile(
        given,
        recipe.models()[0],
        layers_move=sliced,
        separate=lambda models: separate(recipe, models),
        apart=lambda name: any(is_meant(pattern, name) for pattern, _ in recipe.take_from),
    )
    models = reconciled.checkpoints
    tokenizers = _Tokenizers(models)
    block = _block(recipe)
    if block is None:
        aligned = _by_row(recipe, models, tokenizers, truncate_vocabulary)
    else:
        aligned = _by_token(recipe, block, models, tokenizers, keep_tables)
    if recipe.chat_template is not None:
        aligned = _with_template(recipe, recipe.chat_template, aligned, tokenizers)
    lost = _lost(recipe, models, aligned, tokenizers)
    every = {**checkpoints, **aligned.checkpoints}
    return replace(aligned, checkpoints=every, warnings=(*reconciled.notes, *aligned.warnings, *lost))


def align_for_search(
    base: str | None, sources: Iterable[str], checkpoints: Mapping[str, Checkpoint], tokenizer_source: str | None
) -> Aligned:
    """Gives the models of a search one naming and one vocabulary, once for all of its candidates.

    Args:
        base: Reference of the base; None without one.
        sources: References of the sources, in order.
        checkpoints: Open checkpoints by reference.
        tokenizer_source: As in a recipe; None leaves the vocabularies as they are.

    Raises:
        RecipeError, CheckpointError: As `align`.
    """
    if tokenizer_source is None:
        reconciled = reconcile(checkpoints, base)
        return Aligned(reconciled.checkpoints, warnings=reconciled.notes)
    recipe = Recipe(
        "linear",
        base_model=base,
        sources=tuple(Source(source) for source in sources),
        tokenizer=TokenizerBlock(tokenizer_source, models=tuple(checkpoints)),
        chat_template=tokenizer_keys(tokenizer_source, checkpoints).get("chat_template"),
    )
    return align(recipe, checkpoints, keep_tables=True)


def tokenizer_keys(tokenizer_source: str, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Gives what the recipes of a search say of the tokenizer, whichever of its models they merge.

    A union of vocabularies has the chat template of most models, too.
    """
    keys: dict[str, Any] = {"tokenizer": TokenizerBlock(tokenizer_source, models=tuple(checkpoints)).to_mapping()}
    template = tokenizer_source == "union" and any(model.has_chat_template for model in checkpoints.values())
    return keys | ({"chat_template": "auto"} if template else {})


class _Tokenizers:
    """The models' tokenizers, each read once and only when it is needed."""

    def __init__(self, models: Mapping[str, Checkpoint]) -> None:
        self._models = models
        self._read: dict[str, Tokenizer] = {}

    def has(self, model: str) -> bool:
        return bool(self._models[model].tokenizer_files)

    def of(self, model: str) -> Tokenizer:
        """Returns a model's tokenizer.

        Raises:
            CheckpointError: It has none.
        """
        folder = self._models[model].tokenizer_folder
        if folder is None or not self.has(model):
            raise CheckpointError(f"{model}: has no tokenizer, which the recipe needs: give a folder with one")
        if model not in self._read:
            self._read[model] = read_tokenizer(model, folder)
        return self._read[model]

    def stops(self, model: str) -> frozenset[int]:
        """Returns the tokens at which a model stops."""
        return self._models[model].stop_tokens

    def all(self) -> list[Tokenizer]:
        """Returns the tokenizers of the models that have one, in the order of the recipe."""
        return [self.of(model) for model in self._models if self.has(model)]


def _block(recipe: Recipe) -> TokenizerBlock | None:
    if recipe.tokenizer is not None:
        return recipe.tokenizer
    return None if recipe.tokenizer_source is None else TokenizerBlock(source=recipe.tokenizer_source)


def _by_token(
    recipe: Recipe,
    block: TokenizerBlock,
    models: Mapping[str, Checkpoint],
    tokenizers: _Tokenizers,
    keep_tables: bool,
) -> Aligned:
    if misfits := _misfits(models):
        raise CheckpointError(misfits)
    reference = recipe.models()[0]
    rows = _row_counts(models)
    first = block.models[0] if block.models else reference
    own = tokenizers.of(first)
    others = [tokenizers.of(model) for model in models if model != first and tokenizers.has(model)]
    start = _start(block.source, own, models, tokenizers)
    vocabulary = output_vocabulary(block, start, others, rows)
    tokens = {model: (tokenizers.of(model) if tokenizers.has(model) else own).tokens for model in models}
    warnings = [
        f"{model}: has no tokenizer; taken to have that of {first}" for model in models if not tokenizers.has(model)
    ]
    vocabularies = Vocabularies(tokens, rows, recipe.base_model)
    maps = map_rows(vocabulary.tokens, vocabulary.rows, vocabularies, dict(block.tokens))
    warnings += [*vocabulary.warnings, *_doubts(vocabularies, vocabulary, maps)]
    aligned = _aligned(models, maps, exact=recipe.output_dtype is not None, keep=keep_tables)
    before = None if start.folder == models[reference].tokenizer_folder else tokenizers.of(reference)
    return _finished(reference, aligned, vocabulary, before, warnings)


def _start(source: str, own: Tokenizer, models: Mapping[str, Checkpoint], tokenizers: _Tokenizers) -> Tokenizer:
    """The tokenizer that the merged vocabulary starts from."""
    if source in ("base", "union"):
        return own
    reference = source.removeprefix(_MODEL)
    if reference in models:
        return tokenizers.of(reference)
    path = find_model(reference, None, weights=False)
    folder = path if path.is_dir() else path.parent
    if not tokenizer_files(folder):
        raise CheckpointError(f"{reference}: has no tokenizer, which the recipe takes as tokenizer source")
    return read_tokenizer(reference, folder)


def _doubts(vocabularies: Vocabularies, vocabulary: Vocabulary, maps: RowMaps) -> list[str]:
    doubts = []
    if maps.unknown:
        named = name_some(repr(token) for token in maps.unknown)
        doubts.append(f"no model has the {_tokens(len(maps.unknown))} {named}: zeros, until they are trained")
    count = len(vocabulary.tokens)
    for model in vocabularies.tokens:
        own_count = sum(vocabularies.row(model, token) is not None for token in vocabulary.tokens)
        if 2 * own_count < count:
            doubts.append(
                f"{model}: has {own_count} of the merged vocabulary's {_tokens(count)}; "
                "the others' rows are not its own"
            )
    return doubts


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _by_row(
    recipe: Recipe, models: Mapping[str, Checkpoint], tokenizers: _Tokenizers, truncate_vocabulary: bool
) -> Aligned:
    """Without a tokenizer source: rows keep their numbers, as far as every model has them."""
    reference = recipe.models()[0]
    if _misfits(models):  # they are merged as they are, or refused with all else that does not fit
        return Aligned(models)
    rows = _row_counts(models)
    smallest = min(rows.values())
    unlike = _unlike(reference, smallest, tokenizers, models)
    if len(set(rows.values())) == 1:
        return Aligned(models, warnings=tuple(f"{text}; {_ADVICE}" for text in unlike))
    if unlike:
        raise CheckpointError([f"{text}; {_ADVICE}" for text in unlike])
    counts = ", ".join(f"{model} {count}" for model, count in rows.items())
    differ = f"the vocabularies differ in size ({counts} rows)"
    if not truncate_vocabulary:
        cut = f"with --truncate-vocabulary they are cut to the smallest, {smallest} rows"
        raise CheckpointError([f"{differ}: {_ADVICE}; {cut}"])
    warnings = [f"{differ}: cut to the smallest, {smallest} rows; {_ADVICE}"]
    maps = _first_rows(models, smallest)
    aligned = _aligned(models, maps, exact=False)
    if not tokenizers.has(reference):
        return Aligned(aligned, warnings=tuple(warnings))
    return _finished(reference, aligned, shortened(tokenizers.of(reference), smallest), None, warnings)


_ADVICE = "with tokenizer_source: union or base they are matched by token"


def _first_rows(models: Iterable[str], rows: int) -> RowMaps:
    import numpy as np

    every: NDArray[np.int64] = np.arange(rows)
    return RowMaps(dict.fromkeys(models, every), {}, every[:0], ())


def _unlike(reference: str, rows: int, tokenizers: _Tokenizers, models: Mapping[str, Checkpoint]) -> list[str]:
    """Models whose rows stand for other tokens than the reference's, though they will be merged by number."""
    problems: list[str] = []
    if not tokenizers.has(reference):
        return problems
    files = _tokenizer_json(models[reference])
    for model, checkpoint in models.items():
        if model == reference or not tokenizers.has(model) or (files and files == _tokenizer_json(checkpoint)):
            continue
        if coded := [m for m in (reference, model) if _is_code(models[m])]:
            if _python_files(models[reference]) != _python_files(checkpoint):
                problems.append(
                    f"{coded[0]}: its tokenizer is Python code, which is not run: whether {model} has the same tokens "
                    f"as {reference} cannot be told"
                )
            continue
        reference_tokens, model_tokens = (
            {i: t for t, i in tokenizers.of(m).tokens.items() if i < rows} for m in (reference, model)
        )
        different = sorted(
            i for i in reference_tokens.keys() & model_tokens.keys() if reference_tokens[i] != model_tokens[i]
        )
        if different:
            i = different[0]
            problems.append(
                f"{model}: another vocabulary: {len(different)} rows stand for other tokens than in {reference} (row "
                f"{i}: {model_tokens[i]!r} against {reference_tokens[i]!r})"
            )
    return problems


def _is_code(checkpoint: Checkpoint) -> bool:
    return checkpoint.tokenizer_folder is not None and is_python_code(checkpoint.tokenizer_folder)


def _python_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What a tokenizer that is Python code may be read from: it says itself which files those are."""
    folder = checkpoint.folder
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder else []
    small = [path for path in paths if path not in checkpoint.files and not _OF_THE_MODEL.fullmatch(path.name)]
    return {path.name: path.read_bytes() for path in small}


def _tokenizer_json(checkpoint: Checkpoint) -> bytes | None:
    path = next((path for path in checkpoint.tokenizer_files if path.name == "tokenizer.json"), None)
    return None if path is None else path.read_bytes()


def _misfits(models: Mapping[str, Checkpoint]) -> list[str]:
    """Why rows cannot be moved: an embedding cannot be told, a head has other rows than it, or columns are others."""
    problems: list[str] = []
    widths: dict[str, tuple[int, ...]] = {}
    first = next(iter(models), "")
    for model, checkpoint in models.items():
        embedding = checkpoint.layout.embedding
        if embedding is None:
            problems.append(f"{model}: no token embedding can be told, so its vocabulary cannot be matched")
            continue
        rows = checkpoint.tensors[embedding].shape[0]
        for name in vocabulary_tensors(checkpoint.layout, checkpoint.tensors):
            shape = checkpoint.tensors[name].shape
            if shape[0] != rows:
                problems.append(f"{model}: {name} has {shape[0]} rows, {embedding} has {rows}")
            if widths.setdefault(name, shape[1:]) != shape[1:]:
                problems.append(
                    f"{model}: {name} has rows of {shape_text(shape[1:])}, in {first} {shape_text(widths[name])}"
                )
    return problems


def _row_counts(models: Mapping[str, Checkpoint]) -> dict[str, int]:
    """The rows of each model's embedding, where there is one."""
    named = {model: checkpoint.layout.embedding for model, checkpoint in models.items()}
    return {model: models[model].tensors[name].shape[0] for model, name in named.items() if name is not None}


def _aligned(
    models: Mapping[str, Checkpoint], maps: RowMaps, *, exact: bool, keep: bool = False
) -> dict[str, Checkpoint]:
    from evomerge.planning.vocabulary.aligned_weights import aligned_checkpoint

    return {model: aligned_checkpoint(model, models, maps, exact=exact, keep=keep) for model in models}


def _finished(
    reference: str,
    aligned: Mapping[str, Checkpoint],
    vocabulary: Vocabulary,
    before: Tokenizer | None,
    warnings: list[str],
) -> Aligned:
    """Makes the reference model's config agree with the vocabulary, and collects the tokenizer's files."""
    checkpoint = aligned[reference]
    folder = vocabulary.start.folder
    config, lost = fitting_ids(checkpoint.config, read_json_object(folder / "config.json"), vocabulary, before)
    given = read_json_object(folder / "generation_config.json")
    own = checkpoint.generation_config
    if before is not None:  # what is another tokenizer's to say: its model's own, where the reference says nothing
        own = {key: value for key, value in given.items() if key.endswith("_token_id")} | own
    generation, lost_too = fitting_ids(own, given, vocabulary, before)
    sized = checkpoint.changed(config=config)
    files = WrittenTokenizer(files_of(vocabulary), generation)
    every = dict.fromkeys([*warnings, *lost, *lost_too])
    return Aligned({**aligned, reference: sized}, files, tuple(every), vocabulary.tokens)


def _lost(recipe: Recipe, models: Mapping[str, Checkpoint], aligned: Aligned, tokenizers: _Tokenizers) -> list[str]:
    """What the sources' users will miss: their chat template, and the tokens at which generation stops."""
    reference = recipe.models()[0]
    source = recipe.tokenizer_source if recipe.tokenizer is None else recipe.tokenizer.source
    texts = [] if recipe.chat_template else lost_template(reference, models, aligned.tokenizer, source)
    stops = _stops(aligned, reference)
    if all(model.stop_tokens <= stops for model in models.values()) and aligned.tokens is None:
        return texts
    if _is_code(models[reference]):
        return texts
    others = {m: model for m, model in models.items() if m != reference and not _is_code(model)}
    lost = lost_stops(others, _texts_of(stops, aligned, reference, tokenizers), lambda m: tokenizers.of(m).added)
    return texts + lost_stops_text(lost, reference)


def _stops(aligned: Aligned, reference: str) -> frozenset[int]:
    """The tokens at which the merged model stops."""
    checkpoint = aligned.checkpoints[reference]
    if aligned.tokenizer is None:
        return checkpoint.stop_tokens
    return stop_ids(aligned.tokenizer.generation_config, checkpoint.config)


def _texts_of(stops: frozenset[int], aligned: Aligned, reference: str, tokenizers: _Tokenizers) -> set[str]:
    tokens = aligned.tokens
    if tokens is None:
        tokens = tokenizers.of(reference).tokens if tokenizers.has(reference) else {}
    return {token for token, number in tokens.items() if number in stops}


def _with_template(recipe: Recipe, chat_template: str, aligned: Aligned, tokenizers: _Tokenizers) -> Aligned:
    """Puts the chat template that the recipe asks for in; one that is a model's own brings its stop tokens."""
    reference = recipe.models()[0]
    template = chosen_template(chat_template, tokenizers.all())
    if template is None:
        return replace(aligned, warnings=(*aligned.warnings, "chat_template: auto finds none: no model has one"))
    written = aligned.tokenizer
    if written is None:
        own = tokenizers.of(reference)
        files = tokenizer_contents(own.folder)
        written = WrittenTokenizer(files, aligned.checkpoints[reference].generation_config)
    aligned = replace(aligned, tokenizer=replace(written, files=with_chat_template(written.files, template)))
    if chat_template != "auto":
        return aligned
    owner = next(t.model for t in tokenizers.all() if t.chat_template == template)
    return _with_stops_of(owner, reference, aligned, tokenizers)


def _with_stops_of(owner: str, reference: str, aligned: Aligned, tokenizers: _Tokenizers) -> Aligned:
    """The merged model stops where the template's own model does, as far as it has the tokens."""
    tokens = aligned.tokens if aligned.tokens is not None else tokenizers.of(reference).tokens
    texts = tokenizers.of(owner).added
    stops = tokenizers.stops(owner)
    ids = {tokens[texts[number]] for number in stops if texts.get(number) in tokens}
    written = aligned.tokenizer
    if written is None or ids <= _stops(aligned, reference):
        return aligned
    given = written.generation_config or generation_defaults(aligned.checkpoints[reference].config)
    return replace(aligned, tokenizer=replace(written, generation_config=with_stops(given, ids)))
