"""Builds what a task asks of a model, as the very token sequences that lm-eval's HFLM would feed it."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evomerge.errors import BadInput, TaskError
from evomerge.evaluation.tasks.group_task import GroupTask
from evomerge.evaluation.tasks.strangers import require_bounded
from evomerge.evaluation.tasks.task import Task
from evomerge.system.arrays import FloatArray, IntArray
from evomerge.system.quiet import quiet, seeded

log = logging.getLogger(__name__)

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of the continuation to score."""


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A text, and at each of its positions what another model expects next.

    Its response is the expected log-likelihood: the sum over positions and targets of weight times log-probability.

    Attributes:
        tokens: [n], the first one stands for an empty context.
        targets: [n, k] tokens.
        weights: [n, k], which add up to 1 at every position.
    """

    tokens: tuple[int, ...]
    targets: IntArray
    weights: FloatArray


Responses = Sequence[Sequence[Sequence[Any]]]
"""For each item, for each of its instances, one response per repeat, as lm-eval's models give them."""


MOST_KEPT = 2**17
"""Encoded requests that are kept: a scorer may ask something new of every candidate."""
SOFT = "soft_targets"
"""The type of a request for an expected log-likelihood, which lm-eval does not have."""


class Written(str):
    """A text that a model wrote, and how many tokens it wrote for it: thinking and stops counted."""

    tokens: int

    def __new__(cls, text: object = "", tokens: int = 0) -> Written:
        """Makes it of the text and the number."""
        written = super().__new__(cls, text)
        written.tokens = tokens
        return written

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]
        """Gives what a copy is made of; some tasks copy their responses."""
        return str(self), self.tokens


class Encoder(TemplateLM):  # type: ignore[misc]  # lm-eval has no type hints
    """Tokenises like HFLM: the same base class, with scoring left out.

    `TemplateLM.loglikelihood` turns texts into tokens and hands them to `_loglikelihood_tokens`; here that returns
    them. BOS, empty contexts and spaces at the border are therefore treated as HFLM treats them.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_length: The longest input, in tokens.
        chat_template_args: What the chat template is rendered with.

    Raises:
        TaskError: The tokenizer has neither BOS nor EOS, so that nothing can stand for an empty context.
    """

    def __init__(self, tokenizer: Any, max_length: int, chat_template_args: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has neither a BOS nor an EOS token; set one in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat_template_args = dict(chat_template_args or {})
        self._pairs: dict[tuple[Any, ...], list[Pair | SoftTargets]] = {}

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token.

        Raises:
            TaskError: The tokenizer has none, so that no generated text would end.
        """
        if self.tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has no EOS token, which generated text ends with; set one in its config")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.tokenizer.eos_token_id)

    @cached_property
    def _prefix(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes a text, with the tokenizer's own special tokens unless the text already starts with BOS."""
        if add_special_tokens is None and has_bos_prefix(string, self._prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
        return [(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Cuts each text into windows: every token is predicted once, with all the context that fits."""
        return [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Encodes each prompt."""
        return [self.tok_encode(request.args[0]) for request in requests]

    def counted(self, response: Any) -> Any:
        """Adds to a text how many tokens it is, where the backend has not said how many were written."""
        if not isinstance(response, str) or isinstance(response, Written):
            return response
        return Written(response, len(self.tok_encode(response, add_special_tokens=False)))

    def pairs(self, instance: Any) -> list[Pair | SoftTargets]:
        """Encodes the (context, continuation) of one log-likelihood request; several for a text in windows.

        Requests of equal texts are encoded once.

        Raises:
            TaskError: The continuation is empty or longer than the model's context.
        """
        key = (instance.request_type, *instance.args)
        if key not in self._pairs:
            if len(self._pairs) >= MOST_KEPT:
                self._pairs.clear()
            self._pairs[key] = self._encode_pairs(instance)
        return self._pairs[key]

    def _encode_pairs(self, instance: Any) -> list[Pair | SoftTargets]:
        where = _where(instance)
        if instance.request_type == SOFT:
            return [instance.args[0]]
        if instance.request_type == "loglikelihood_rolling":
            return list(self.loglikelihood_rolling([instance])[0])
        if not instance.args[1]:
            raise TaskError(f"{where}: the text to score is empty")
        (pair,) = self.loglikelihood([instance], disable_tqdm=True)
        if not pair[1]:
            raise TaskError(f"{where}: {instance.args[1]!r} adds no token to its context, so it has no likelihood")
        if len(pair[1]) > self.max_length:
            raise TaskError(
                f"{where}: a text of {len(pair[1])} tokens to score does not fit the context of {self.max_length}"
            )
        return [pair]

    def is_cut(self, instance: Any) -> bool:
        """Checks whether a request's context loses its beginning, because all of it is longer than the model's context.

        A text in windows loses nothing.

        Raises:
            TaskError: The request cannot be encoded, or what it generates leaves no room for its prompt.
        """
        if instance.request_type != "generate_until":
            pairs = self.pairs(instance)
            if not pairs:
                raise TaskError(f"{_where(instance)}: its text is empty, so there is nothing to score")
            lone = pairs[0] if instance.request_type == "loglikelihood" else ()
            return isinstance(lone, tuple) and sum(map(len, lone)) > self.max_length + 1
        _ = self.eot_token_id
        options = normalize_gen_kwargs(dict(instance.args[1]), 256)
        if options.get("do_sample") and not float(options.get("temperature", 1.0)):
            raise TaskError(
                f"task {instance.task_name!r} samples (do_sample) at temperature 0, where there is no chance; "
                "say do_sample: false, or a temperature above 0"
            )
        limit = int(options["max_gen_toks"])
        if limit >= self.max_length:
            raise TaskError(
                f"task {instance.task_name!r} generates up to {limit} tokens, which leaves no room for a prompt in the"
                f" model's context of {self.max_length}"
            )
        return len(self.tok_encode(instance.args[0])) > self.max_length - limit

    def require_chat_template(self) -> None:
        """Checks that the tokenizer has a chat template.

        Raises:
            TaskError: It has none.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise TaskError(
                "apply_chat_template is on, but the tokenizer has no chat template; give one (evaluation.chat_template:"
                " {from: SOURCE} or a file; --chat-template FILE), or turn it off"
            )
        template = self.tokenizer.chat_template
        for text in template.values() if isinstance(template, dict) else [template]:
            require_bounded(str(text))

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Renders a conversation as HFLM does: without the system role where the template has none."""
        import jinja2

        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.chat_template_args,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except jinja2.exceptions.TemplateError:
            history = [message for message in chat_history if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(history, **options))


def _where(instance: Any) -> str:
    return f"task {instance.task_name!r}, item {instance.doc_id}"


@dataclass(frozen=True)
class Requests:
    """Everything one task asks.

    Attributes:
        task: The task's name.
        by_item: For every document, its lm-eval instances in order.
    """

    task: str
    by_item: Sequence[tuple[Any, ...]]

    def build(self, indices: Sequence[int]) -> None:
        """Builds what some items ask, all at once, where that has not been done."""
        if isinstance(self.by_item, _BuiltOnUse | _OfParts):
            self.by_item.build(indices)

    def fresh(self, indices: Sequence[int]) -> list[list[Any]]:
        """Copies the instances of some items, ready to take responses; the originals stay as they are."""
        self.build(indices)
        return [
            [dataclasses.replace(instance, resps=[], filtered_resps={}) for instance in self.by_item[index]]
            for index in indices
        ]


@dataclass(frozen=True)
class Prompting:
    """How prompts are put together, as lm-eval's options of the same names say.

    Attributes:
        apply_chat_template: Whether prompts are rendered as conversations.
        fewshot_as_multiturn: Whether each example is a turn of its own; None for lm-eval's default: where a chat
            template is applied.
        system_instruction: What the conversation, or the text, begins with.
    """

    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None

    def options(self, encoder: Encoder) -> dict[str, Any]:
        """Returns the arguments of lm-eval's `build_all_requests`."""
        chat, multiturn = self.apply_chat_template, self.fewshot_as_multiturn
        return {
            "apply_chat_template": chat,
            "chat_template": encoder.apply_chat_template if chat else None,
            "fewshot_as_multiturn": chat if multiturn is None else multiturn,
            "system_instruction": self.system_instruction,
        }


def read_template(path: Path) -> str:
    """Reads a chat template from a file: Jinja, or a tokenizer_config.json or chat_template.json that has one.

    Raises:
        BadInput: The file cannot be read, or has none.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"chat_template: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix != ".json":
        return text
    try:
        template = json.loads(text).get("chat_template")
    except (ValueError, AttributeError):
        template = None
    if not isinstance(template, str):
        raise BadInput(f"chat_template: {path} has no chat_template")
    return template


def build_requests(task: Task, encoder: Encoder, prompting: Prompting) -> Requests:
    """Gives the requests of every document of a task, as lm-eval's own code builds them; each is built on first use.

    Args:
        task: The task.
        encoder: Renders the chat template.
        prompting: How prompts are put together.

    Raises:
        TaskError: The task has no documents.
    """
    if isinstance(task, GroupTask):
        parts = [_BuiltOnUse(part, prompting.options(encoder)) for part in task.parts]
        return Requests(task.name, _OfParts(task, parts))
    if not task.docs:
        raise TaskError(f"task {task.name!r}: it has no documents")
    return Requests(task.name, _BuiltOnUse(task, prompting.options(encoder)))


class _BuiltOnUse(Sequence[tuple[Any, ...]]):
    """For every document of a task its instances, built when they are first asked for.

    Most of the time goes into rendering examples. Which examples a document gets is drawn document after document, so
    that is done for all of them at once; it costs next to nothing. Tasks that draw while they render, or that put
    prompts together in code of their own, are built as a whole, as lm-eval does it.
    """

    def __init__(self, task: Task, options: dict[str, Any]) -> None:
        self._task = task
        self._options = options
        self._built: dict[int, tuple[Any, ...]] = {}

    def __len__(self) -> int:
        return len(self._task.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            self.build(chosen)
            return [self._built[k] for k in chosen]
        index = range(len(self))[index]
        self.build((index,))
        return self._built[index]

    def build(self, indices: Sequence[int]) -> None:
        """Builds what some documents ask.

        Raises:
            TaskError: The task's templates or functions do not fit a document.
        """
        missing = sorted({index for index in indices if index not in self._built})
        if not missing:
            return
        with quiet(), seeded():
            start = _chance()
            if _is_lm_evals(self._task):
                self._built |= {index: self._instances(index) for index in missing}
            if not self._built or _chance() != start:
                self._build_all()

    @cached_property
    def _examples(self) -> list[Sequence[Any]]:
        """The examples of every document, in the order in which lm-eval draws them."""
        task = self._task.lm_eval_task
        count = task.config.num_fewshot or 0
        if not count:
            return []
        task.set_fewshot_seed(seed=self._task.fewshot_seed)
        same_split = task.fewshot_cfg.split == task.config.test_split
        return [task.sampler.sample(n=count, eval_doc=doc if same_split else None) for doc in self._task.docs]

    def _instances(self, index: int) -> tuple[Any, ...]:
        task, doc, options = self._task.lm_eval_task, self._task.docs[index], self._options
        try:
            with self._sampler_of(index):
                shots, prefix = task.config.num_fewshot or 0, task.doc_to_prefix(doc)
                context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=prefix, **options)
                made = task.construct_requests(
                    doc=doc,
                    ctx=context,
                    metadata=(task.config["task"], index, task.config.repeats),
                    apply_chat_template=options["apply_chat_template"],
                    chat_template=options["chat_template"],
                )
        except TaskError:
            raise
        except Exception as error:  # a task's templates and functions can raise anything
            raise self._failure(error, index) from error
        instances = made if isinstance(made, list) else [made]
        if not instances:
            raise TaskError(f"task {self._task.name!r}, item {index}: it asks for nothing")
        return tuple(sorted(instances, key=lambda instance: instance.idx))

    @contextmanager
    def _sampler_of(self, index: int) -> Iterator[None]:
        """Has lm-eval's task take the examples that were drawn for a document."""
        task = self._task.lm_eval_task
        if not self._examples:
            yield
            return
        sampler, task.sampler = task.sampler, _Drawn(self._examples[index])
        try:
            yield
        finally:
            task.sampler = sampler

    def _build_all(self) -> None:
        task = self._task.lm_eval_task
        task.set_fewshot_seed(seed=self._task.fewshot_seed)
        try:
            task.build_all_requests(rank=0, world_size=1, **self._options)
        except TaskError:
            raise
        except Exception as error:  # a task's templates and functions can raise anything
            raise self._failure(error, None) from error
        grouped: dict[int, list[Any]] = {}
        for instance in task.instances:
            grouped.setdefault(instance.doc_id, []).append(instance)
        if len(grouped) != len(self):
            raise TaskError(f"task {self._task.name!r}: {len(grouped)} of its {len(self)} documents ask for anything")
        self._built |= {k: tuple(sorted(own, key=lambda instance: instance.idx)) for k, own in grouped.items()}

    def _failure(self, error: Exception, index: int | None) -> TaskError:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "larger than population" in reason:
            shots = self._task.lm_eval_task.get_config("num_fewshot")
            reason = f"it wants {shots} examples before a question, more than the split that they come from has"
        where = "" if index is None else f", item {index}"
        return TaskError(f"task {self._task.name!r}{where}: its requests cannot be built: {reason}")


class _OfParts(Sequence[tuple[Any, ...]]):
    """The instances of a group's items."""

    def __init__(self, task: GroupTask, parts: Sequence[_BuiltOnUse]) -> None:
        self._task = task
        self._parts = parts

    def __len__(self) -> int:
        return len(self._task.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        part, item = self._task.locate(range(len(self))[index])
        return self._parts[part][item]

    def build(self, indices: Sequence[int]) -> None:
        """Builds what some items ask, task by task."""
        by_part: dict[int, list[int]] = {}
        for part, item in map(self._task.locate, indices):
            by_part.setdefault(part, []).append(item)
        for part, items in by_part.items():
            self._parts[part].build(items)


class _Drawn:
    """Gives the examples that were drawn for a document, in the place of lm-eval's sampler."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self._examples = examples

    def sample(self, n: int, **_: Any) -> Sequence[Any]:
        """Returns the examples."""
        return self._examples


def _is_lm_evals(task: Task) -> bool:
    """Whether a task puts its prompts together as lm-eval's own tasks do."""
    kind = type(task.lm_eval_task)
    return all(
        getattr(kind, name) is getattr(ConfigurableTask, name) for name in ("fewshot_context", "build_all_requests")
    )


def _chance() -> tuple[Any, ...]:
    """The state of the generators that tasks draw from."""
    return random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
