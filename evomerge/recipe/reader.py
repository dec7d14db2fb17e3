"""One document's plain values to the parts of a recipe: keys, types and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from evomerge.errors import ErrorCollector, describe, suggest
from evomerge.methods.contract import Method
from evomerge.methods.registry import STAGES, with_stages
from evomerge.recipe.model import ModelToken, Recipe, Slice, Source, TokenizerBlock, TokenRule, ZeroToken
from evomerge.recipe.parameters import EMBED_SLERP, parameters_at
from evomerge.recipe.settings import Parameters
from evomerge.recipe.validation import (
    choice_at,
    integer_at,
    join,
    list_at,
    mapping_at,
    number_at,
    reference_at,
    text_at,
)

_TOP = (
    *("name", "merge_method", "base_model", "models", "slices", "modules", "parameters", "input_model_parameters"),
    *("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "ignore", "take_from", "seed"),
    *("after", "activations"),
)
_SLICE = ("sources", "base_model", "merge_method", "parameters", "residual_weight", "residual_scale")
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class _Body:
    """Where models or slices stand: a mapping, its path, and the module's name."""

    fields: Mapping[str, Any]
    path: str
    module: str | None


@dataclass
class Reader:
    """Reads the parts of one recipe; what is wrong goes to `errors`."""

    errors: ErrorCollector
    methods: Mapping[str, Method]

    def recipe(self, data: Mapping[str, Any]) -> Recipe:
        """Reads the recipe from a document's plain values; incomplete where there were errors."""
        after = self._after(data.get("after"))
        staged = {name: with_stages(method, after) for name, method in self.methods.items()}
        return replace(self, methods=staged)._staged_recipe(data, after)

    def _staged_recipe(self, data: Mapping[str, Any], after: tuple[str, ...]) -> Recipe:
        top = self._top_level(data)
        method = self._method("merge_method", top.get("merge_method"), required=True)
        bodies = self._bodies(top)
        used = list({m.name: m for body in bodies for m in self._used(method, body.fields, body.path)}.values())
        self._tokenizer_conflict(top)
        shared = Recipe(
            merge_method=method.name if method else "",
            base_model=self._reference("base_model", top.get("base_model")),
            parameters=self._parameters("parameters", top.get("parameters"), used + self._of_embeddings(top)),
            input_model_parameters=self._input_model_parameters(top.get("input_model_parameters"), used),
            dtype=self._dtype("dtype", top.get("dtype")),
            out_dtype=self._dtype("out_dtype", top.get("out_dtype")),
            tokenizer_source=tokenizer_source_at(self.errors, "tokenizer_source", top.get("tokenizer_source")),
            tokenizer=tokenizer_at(self.errors, "tokenizer", top.get("tokenizer")),
            chat_template=self._text("chat_template", top.get("chat_template")),
            ignore=self._ignore(top.get("ignore")),
            take_from=self._take_from(top.get("take_from")),
            seed=self._seed(top.get("seed")),
            after=after,
            activations=self._reference("activations", top.get("activations")),
            name=self._text("name", top.get("name")),
        )
        modules = tuple(self._with_body(shared, body, top, method) for body in bodies)
        return modules[0] if len(modules) == 1 else replace(shared, modules=modules)

    def _with_body(self, shared: Recipe, body: _Body, top: Mapping[str, Any], method: Method | None) -> Recipe:
        """The recipe with the models or slices of one body."""
        slices, sources = self._slices_or_models(body.fields, body.path, method)
        self._passthrough_of_several(top, body, sources)
        if body.module is None:
            return replace(shared, sources=sources, slices=slices)
        path = join(body.path, "parameters")
        used = self._used(method, body.fields, body.path)
        parameters = self._parameters(path, body.fields.get("parameters"), used)
        return replace(shared, sources=sources, slices=slices, module=body.module, module_parameters=parameters)

    def _top_level(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The known keys; a method's parameter at the top is told to move down."""
        names = {p.name for method in self.methods.values() for p in method.parameters} - {"seed"}
        misplaced = [str(key) for key in data if str(key) in names and key not in _TOP]
        for name in misplaced:
            self.errors.error(name, f"is a parameter: put it under 'parameters:' as '{name}: {data[name]}'")
        return self._mapping("", {k: v for k, v in data.items() if str(k) not in misplaced}, _TOP)

    def _mapping(self, path: str, value: Any, allowed: tuple[str, ...]) -> dict[str, Any]:
        names = {p.name for method in self.methods.values() for p in method.parameters}
        return mapping_at(self.errors, path, value, allowed, names)

    def _method(self, path: str, name: Any, *, required: bool) -> Method | None:
        if name is None:
            if required:
                self.errors.error(path, f"is missing: choose one of {', '.join(sorted(self.methods))}")
            return None
        text = text_at(self.errors, path, name)
        if text is None:
            return None
        by_name = {alias: m for m in self.methods.values() for alias in (m.name, *m.aliases)}
        if text not in by_name:
            hint = suggest(text, by_name) or f": choose one of {', '.join(sorted(by_name))}"
            self.errors.error(path, f"unknown merge method '{text}'{hint}")
        return by_name.get(text)

    def _bodies(self, top: dict[str, Any]) -> list[_Body]:
        """Where models or slices stand: at the top, or in each module."""
        given = [key for key in ("models", "slices", "modules") if key in top]
        if len(given) != 1:
            text = "needs one of 'models' and 'slices'" if not given else f"has both {' and '.join(map(repr, given))}"
            self.errors.error("", f"{text}: give the models to merge as a list under exactly one of them")
        if given != ["modules"]:
            return [_Body(top, "", None)]
        modules = top["modules"]
        if not isinstance(modules, Mapping) or not modules:
            got = "an empty one" if isinstance(modules, Mapping) else describe(modules)
            self.errors.error("modules", f"expected a mapping from modules to their models or slices, got {got}")
            return [_Body({}, "modules", None)]
        bodies = []
        for name, body in modules.items():
            path = f"modules.{name}"
            fields = self._mapping(path, body, ("slices", "models", "parameters"))
            if ("slices" in fields) == ("models" in fields):
                self.errors.error(path, "needs exactly one of 'models' and 'slices'")
            bodies.append(_Body(fields, path, str(name)))
        return bodies

    def _used(self, method: Method | None, body: Mapping[str, Any], path: str) -> list[Method]:
        """The methods that read recipe-wide parameters: the recipe's own and those of slices."""
        slices = body.get("slices")
        entries = slices if isinstance(slices, list | tuple) else []
        names = [entry.get("merge_method") for entry in entries if isinstance(entry, Mapping)]
        quiet = Reader(ErrorCollector(""), self.methods)
        own = [quiet._method("", name, required=False) for name in names]
        candidates = own if names and all(isinstance(name, str) for name in names) else [method, *own]
        return list({m.name: m for m in candidates if m is not None}.values())

    def _slices_or_models(
        self, body: Mapping[str, Any], path: str, method: Method | None
    ) -> tuple[tuple[Slice, ...], tuple[Source, ...]]:
        if "slices" in body:
            at = join(path, "slices")
            entries = list_at(self.errors, at, body["slices"])
            return tuple(self._slice(f"{at}[{i}]", entry, method) for i, entry in enumerate(entries)), ()
        if "models" in body:
            at = join(path, "models")
            entries = list_at(self.errors, at, body["models"])
            return (), tuple(self._source(f"{at}[{i}]", entry, method, layers=False) for i, entry in enumerate(entries))
        return (), ()

    def _slice(self, path: str, value: Any, default: Method | None) -> Slice:
        fields = self._mapping(path, value, _SLICE)
        method = self._method(join(path, "merge_method"), fields.get("merge_method"), required=False)
        effective = method if "merge_method" in fields else default
        if isinstance(value, Mapping) and "sources" not in fields:
            self.errors.error(join(path, "sources"), "is missing: list the models that this slice is made of")
        at = join(path, "sources")
        entries = list_at(self.errors, at, fields["sources"]) if "sources" in fields else []
        sources = tuple(self._source(f"{at}[{i}]", e, effective, layers=True) for i, e in enumerate(entries))
        weight = fields.get("residual_weight")
        if weight is not None:
            self.errors.warn(join(path, "residual_weight"), "has no effect, as in mergekit; see residual_scale")
            weight = number_at(self.errors, join(path, "residual_weight"), weight)
        return Slice(
            sources=sources,
            base_model=self._reference(join(path, "base_model"), fields.get("base_model")),
            merge_method=method.name if method is not None and method is not default else None,
            parameters=self._parameters(join(path, "parameters"), fields.get("parameters"), _some(effective)),
            residual_weight=weight,
            residual_scale=self._residual_scale(join(path, "residual_scale"), fields.get("residual_scale")),
        )

    def _source(self, path: str, value: Any, method: Method | None, *, layers: bool) -> Source:
        keys = ("model", "layer_range", "parameters") if layers else ("model", "parameters")
        if isinstance(value, str):
            self.errors.error(path, f"expected a mapping: write '- model: {value}'")
            return Source("")
        fields = self._mapping(path, value, keys)
        if isinstance(value, Mapping) and "model" not in fields:
            self.errors.error(join(path, "model"), "is missing")
        return Source(
            model=self._reference(join(path, "model"), fields.get("model")) or "",
            layer_range=self._layer_range(path, fields, value) if layers else None,
            parameters=self._parameters(join(path, "parameters"), fields.get("parameters"), _some(method), True),
        )

    def _layer_range(self, path: str, fields: Mapping[str, Any], value: Any) -> tuple[int, int] | None:
        at = join(path, "layer_range")
        if "layer_range" not in fields:
            if isinstance(value, Mapping):
                self.errors.error(at, "is missing: give [first, last + 1]")
            return None
        span = fields["layer_range"]
        if not isinstance(span, list | tuple) or len(span) != 2:
            self.errors.error(at, f"expected two layer numbers [first, last + 1], got {describe(span)}")
            return None
        first, stop = (integer_at(self.errors, f"{at}[{i}]", entry, 0) for i, entry in enumerate(span))
        if first is None or stop is None:
            return None
        if stop <= first:
            kind = "empty" if stop == first else "reversed"
            self.errors.error(at, f"[{first}, {stop}] is {kind}: the second number is one more than the last layer")
            return None
        return first, stop

    def _residual_scale(self, path: str, value: Any) -> float | tuple[float, ...] | None:
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            return number_at(self.errors, path, value)
        numbers = [
            number_at(self.errors, f"{path}[{i}]", entry) for i, entry in enumerate(list_at(self.errors, path, value))
        ]
        return tuple(number for number in numbers if number is not None)

    def _parameters(self, path: str, value: Any, used: list[Method], of_source: bool = False) -> Parameters:
        return parameters_at(self.errors, path, value, used, self.methods.values(), of_source)

    def _of_embeddings(self, top: Mapping[str, Any]) -> list[Method]:
        """SLERP, where ``embed_slerp`` has it merge the embeddings: then its parameters have an effect."""
        parameters = top.get("parameters")
        by_slerp = isinstance(parameters, Mapping) and parameters.get(EMBED_SLERP) is True
        return [method for method in self.methods.values() if by_slerp and method.name == "slerp"]

    def _input_model_parameters(self, value: Any, used: list[Method]) -> tuple[tuple[str, Parameters], ...]:
        if value is None:
            return ()
        if not isinstance(value, Mapping):
            self.errors.error("input_model_parameters", f"expected a mapping from models, got {describe(value)}")
            return ()
        entries = {str(m): self._parameters(f"input_model_parameters.{m}", p, used, True) for m, p in value.items()}
        return tuple(sorted(entries.items(), key=lambda entry: entry[0]))

    def _reference(self, path: str, value: Any) -> str | None:
        return None if value is None else reference_at(self.errors, path, value)

    def _ignore(self, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        patterns = [
            text_at(self.errors, f"ignore[{i}]", part) for i, part in enumerate(_listed(self.errors, "ignore", value))
        ]
        return tuple(pattern for pattern in patterns if pattern is not None)

    def _take_from(self, value: Any) -> tuple[tuple[str, str], ...]:
        if value is None:
            return ()
        if not isinstance(value, Mapping) or not value:
            self.errors.error("take_from", f"expected a mapping from tensors to models, got {describe(value)}")
            return ()
        models = {str(pattern): self._reference(f"take_from.{pattern}", model) for pattern, model in value.items()}
        return tuple((pattern, model) for pattern, model in models.items() if model is not None)

    def _text(self, path: str, value: Any) -> str | None:
        return None if value is None else text_at(self.errors, path, value)

    def _dtype(self, path: str, value: Any) -> str | None:
        text = self._text(path, value)
        if text is None:
            return None
        name = text.removeprefix("torch.")
        if name not in DTYPES:
            self.errors.error(
                path, f"unknown dtype '{text}'{suggest(name, DTYPES) or ': known are ' + ', '.join(DTYPES)}"
            )
            return None
        return name

    def _after(self, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        names = [text_at(self.errors, f"after[{i}]", n) for i, n in enumerate(_listed(self.errors, "after", value))]
        for name in names:
            if name is not None and name not in STAGES:
                hint = suggest(name, STAGES) or f": choose from {', '.join(STAGES)}"
                self.errors.error("after", f"no stage is called '{name}'{hint}")
        if len(set(names)) < len(names):
            self.errors.error("after", f"each stage follows once, got {', '.join(map(str, names))}")
        return tuple(dict.fromkeys(name for name in names if name in STAGES))

    def _seed(self, value: Any) -> int:
        return 0 if value is None else integer_at(self.errors, "seed", value, 0) or 0

    def _passthrough_of_several(self, top: Mapping[str, Any], body: _Body, sources: tuple[Source, ...]) -> None:
        """Under mergekit's name nobody expects a random pattern."""
        parameters = top.get("parameters")
        pattern = parameters.get("pattern") if isinstance(parameters, Mapping) else None
        if top.get("merge_method") == "passthrough" and len(sources) > 1 and pattern is None:
            text = f"passthrough copies one model, got {len(sources)}: give slices or a pattern, or use frankenmerge"
            self.errors.error(join(body.path, "models"), text)

    def _tokenizer_conflict(self, top: Mapping[str, Any]) -> None:
        if "tokenizer" in top and "tokenizer_source" in top:
            self.errors.error("tokenizer", "is given beside tokenizer_source: keep one of them")


def _listed(errors: ErrorCollector, path: str, value: Any) -> list[Any]:
    """One text, or a list of them."""
    return [value] if isinstance(value, str) else list_at(errors, path, value)


def _some(method: Method | None) -> list[Method]:
    return [method] if method is not None else []


def tokenizer_source_at(errors: ErrorCollector, path: str, value: Any) -> str | None:
    """``base``, ``union``, ``model:PATH`` or a model reference; None when not given."""
    if value is None:
        return None
    reference = reference_at(errors, path, value)
    if reference == "model:":
        errors.error(path, "names no model after 'model:'")
        return None
    return reference


def tokenizer_at(errors: ErrorCollector, path: str, value: Any) -> TokenizerBlock | None:
    """Returns the whole block; None when not given."""
    if value is None:
        return None
    fields = mapping_at(errors, path, value, ("source", "tokens", "pad_to_multiple_of", "models"))
    source = tokenizer_source_at(errors, join(path, "source"), fields.get("source", "union"))
    pad = None
    if "pad_to_multiple_of" in fields:
        pad = integer_at(errors, join(path, "pad_to_multiple_of"), fields["pad_to_multiple_of"], 1)
    tokens = _tokens(errors, join(path, "tokens"), fields.get("tokens", {}))
    path = join(path, "models")
    given = list_at(errors, path, fields["models"]) if "models" in fields else []
    models = [reference_at(errors, f"{path}[{i}]", model) for i, model in enumerate(given)]
    return TokenizerBlock(source or "union", tokens, pad, tuple(model for model in models if model is not None))


def _tokens(errors: ErrorCollector, path: str, value: Any) -> tuple[tuple[str, TokenRule], ...]:
    if not isinstance(value, Mapping):
        errors.error(path, f"expected a mapping from token to rule, got {describe(value)}")
        return ()
    return tuple((str(token), _rule(errors, join(path, str(token)), rule)) for token, rule in value.items())


def _rule(errors: ErrorCollector, path: str, value: Any) -> TokenRule:
    if value is None:
        return TokenRule()
    fields = mapping_at(errors, path, value, ("source", "force"))
    force = fields.get("force", False)
    if not isinstance(force, bool):
        errors.error(join(path, "force"), f"expected true or false, got {describe(force)}")
        force = False
    source = fields.get("source")
    if force and source is None:
        errors.error(path, "force needs a source: it says where the token comes from in every model")
    return TokenRule(None if source is None else _token_source(errors, join(path, "source"), source), force)


def _token_source(errors: ErrorCollector, path: str, value: Any) -> str | ZeroToken | ModelToken | None:
    if not isinstance(value, Mapping) or "kind" not in value:
        return reference_at(errors, path, value)
    kind = choice_at(errors, join(path, "kind"), value["kind"], ("zero", "model_token"))
    if kind is None:
        return None
    if kind == "zero":
        mapping_at(errors, path, value, ("kind",))
        return ZeroToken()
    return _model_token(errors, path, value)


def _model_token(errors: ErrorCollector, path: str, value: Mapping[str, Any]) -> ModelToken | None:
    fields = mapping_at(errors, path, value, ("kind", "model", "token", "token_id"))
    if "model" not in fields:
        errors.error(join(path, "model"), "is missing")
    if ("token" in fields) == ("token_id" in fields):
        errors.error(path, "needs exactly one of token and token_id")
        return None
    model = reference_at(errors, join(path, "model"), fields.get("model", "missing"))
    token = token_id = None
    if "token" in fields:
        token = fields["token"] if isinstance(fields["token"], str) else None  # a token may be blank text
        if token is None:
            errors.error(join(path, "token"), f"expected text, got {describe(fields['token'])}")
    else:
        token_id = integer_at(errors, join(path, "token_id"), fields["token_id"], 0)
    if model is None or (token is None and token_id is None):
        return None
    return ModelToken(model, token, token_id)
