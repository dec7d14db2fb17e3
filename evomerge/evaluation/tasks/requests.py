"""Builds what a task asks of a model, as the very token sequences that lm-eval's HFLM would feed it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evomerge.errors import TaskError
from evomerge.evaluation.tasks.task import Task
from evomerge.system.quiet import quiet, seeded

log = logging.getLogger(__name__)

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of the continuation to score."""

Responses = Sequence[Sequence[Sequence[Any]]]
"""For each item, for each of its instances, one response per repeat, as lm-eval's models give them."""


class Encoder(TemplateLM):  # type: ignore[misc]  # lm-eval has no type hints
    """Tokenises like HFLM: the same base class, with scoring left out.

    `TemplateLM.loglikelihood` turns texts into tokens and hands them to `_loglikelihood_tokens`; here that returns
    them. BOS, empty contexts and spaces at the border are therefore treated as HFLM treats them.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_length: The longest input, in tokens.

    Raises:
        TaskError: The tokenizer has neither BOS nor EOS, so that nothing can stand for an empty context.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has neither a BOS nor an EOS token; set one in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._pairs: dict[tuple[Any, ...], list[Pair]] = {}

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

    def pairs(self, instance: Any) -> list[Pair]:
        """Encodes the (context, continuation) of one log-likelihood request; several for a text in windows.

        Requests of equal texts are encoded once.

        Raises:
            TaskError: The continuation is empty or longer than the model's context.
        """
        key = (instance.request_type, *instance.args)
        if key not in self._pairs:
            self._pairs[key] = self._encode_pairs(instance)
        return self._pairs[key]

    def _encode_pairs(self, instance: Any) -> list[Pair]:
        where = _where(instance)
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
            lone = instance.request_type == "loglikelihood"
            return lone and sum(map(len, pairs[0])) > self.max_length + 1
        _ = self.eot_token_id
        limit = int(normalize_gen_kwargs(dict(instance.args[1]), 256)["max_gen_toks"])
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
            raise TaskError("apply_chat_template is on, but the tokenizer has no chat template; turn it off")

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Renders a conversation as HFLM does: without the system role where the template has none."""
        import jinja2

        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
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
    """Everything one task asks, built once per run.

    Attributes:
        task: The task's name.
        by_item: For every document, its lm-eval instances in order.
    """

    task: str
    by_item: tuple[tuple[Any, ...], ...]

    def fresh(self, indices: Sequence[int]) -> list[list[Any]]:
        """Copies the instances of some items, ready to take responses; the originals stay as they are."""
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


def build_requests(task: Task, encoder: Encoder, prompting: Prompting) -> Requests:
    """Builds the requests of every document of a task with lm-eval's own code.

    Args:
        task: The task.
        encoder: Renders the chat template.
        prompting: How prompts are put together.

    Raises:
        TaskError: The task has no documents, or its templates do not fit them.
    """
    task.lm_eval_task.set_fewshot_seed(seed=task.fewshot_seed)
    try:
        with quiet(), seeded():
            task.lm_eval_task.build_all_requests(rank=0, world_size=1, **prompting.options(encoder))
    except TaskError:
        raise
    except Exception as error:  # a task's templates and functions can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "larger than population" in reason:
            shots = task.lm_eval_task.get_config("num_fewshot")
            reason = f"it wants {shots} examples before a question, more than the split that they come from has"
        raise TaskError(f"task {task.name!r}: its requests cannot be built: {reason}") from error
    grouped: dict[int, list[Any]] = {}
    for instance in task.lm_eval_task.instances:
        grouped.setdefault(instance.doc_id, []).append(instance)
    by_item = [sorted(grouped[k], key=lambda instance: instance.idx) for k in sorted(grouped)]
    if len(by_item) != len(task.items):
        raise TaskError(f"task {task.name!r}: {len(by_item)} of its {len(task.items)} documents ask for anything")
    return Requests(task.name, tuple(tuple(instances) for instances in by_item))
