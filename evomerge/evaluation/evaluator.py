"""Scores models on items of tasks: everything that does not depend on the model is done once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import TaskError
from evomerge.evaluation.backends.native.backend import NativeBackend
from evomerge.evaluation.backends.native.hidden_state_cache import Depths, Prefixes
from evomerge.evaluation.backends.native.weight_gradients import weight_gradient
from evomerge.evaluation.backends.registry import BackendName
from evomerge.evaluation.scorers.derivatives import Answers, sensitivities
from evomerge.evaluation.scorers.lm_eval import item_scores
from evomerge.evaluation.scores import Array, ItemScores
from evomerge.evaluation.tasks.requests import Encoder, Prompting, Requests, build_requests
from evomerge.evaluation.tasks.task import Task
from evomerge.system.hashing import digest
from evomerge.system.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Selection = Mapping[str, Sequence[int]]
"""Task to positions of its items."""


class Backend(Protocol):
    """What answers requests."""

    def prepare(self, model: Any) -> None:
        """Gets to know the model as it is now; called before every score."""

    def respond(
        self, model: Any, requests: Requests, indices: Sequence[int], depths: Depths = ()
    ) -> list[list[list[Any]]]:
        """The responses of the model: for each item, for each of its instances, one per repeat."""

    def digest(self, requests: Requests, indices: Sequence[int]) -> str:
        """Identity of everything that decides how the responses are rounded, apart from the model."""


class Evaluator:
    """Scores models on the items of some tasks.

    Args:
        tasks: From `load_tasks`.
        tokenizer: The models' tokenizer.
        config: The models' config (for the vocabulary and the length of the context).
        batch_tokens: Tokens in a batch, fixed for the whole run; None for what suits the device.
        max_length: Longest input in tokens; the model's context if None.
        apply_chat_template: Whether prompts are rendered as conversations.
        fewshot_as_multiturn: Whether each example is a turn of its own; None for where a chat template is applied.
        system_instruction: What every prompt begins with.
        backend: "native"; "hf" for lm-eval's HFLM itself; "vllm" for lm-eval's VLLM on a live engine.
        reuse_prefixes: Whether hidden states of layers that candidates share are kept (needs `depths` in `score`).
        threads: How many threads of a CPU the batches of generated text are cut for: what rounds them must not depend
            on how many there are in this process. None for all that torch has.

    Raises:
        TaskError: The tokenizer lacks what the tasks need, or a task's requests cannot be built.
    """

    def __init__(
        self,
        tasks: Sequence[Task] | Mapping[str, Task],
        tokenizer: Any,
        config: Any,
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool | None = None,
        system_instruction: str | None = None,
        backend: BackendName = "native",
        reuse_prefixes: bool = True,
        threads: int | None = None,
    ) -> None:
        from lm_eval.models.utils import resolve_max_length

        listed = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
        self.tasks: dict[str, Task] = {loaded.name: loaded for loaded in listed}
        self.max_length = max_length or resolve_max_length(config, tokenizer)
        self.encoder = Encoder(tokenizer, self.max_length)
        self.prompting = Prompting(apply_chat_template, fewshot_as_multiturn, system_instruction)
        if apply_chat_template:
            self.encoder.require_chat_template()
        self._requests: dict[str, Requests] = {}
        self._hashes: dict[str, tuple[str, ...]] = {}
        self.prefixes = Prefixes() if reuse_prefixes and backend == "native" else None
        self._backend: Backend
        if backend == "native":
            text = getattr(config, "text_config", None) or config
            self._backend = NativeBackend(self.encoder, int(text.vocab_size), batch_tokens, self.prefixes, threads)
        elif backend == "hf":
            from evomerge.evaluation.backends.hf import HFBackend

            self._backend = HFBackend(tokenizer, self.max_length, batch_tokens)
        else:
            from evomerge.evaluation.backends.vllm import VLLMBackend

            self._backend = VLLMBackend(tokenizer, self.max_length)

    @cached_property
    def everything(self) -> dict[str, tuple[int, ...]]:
        """The selection of all items."""
        return {name: tuple(range(len(loaded.items))) for name, loaded in self.tasks.items()}

    def items(self, task: str) -> tuple[str, ...]:
        """The ids of a task's items."""
        return self._task(task).items

    def prepare(self, model: Any) -> None:
        """Gets to know the model's architecture; `layout_digest` is final from then on.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        self._backend.prepare(model)

    def score(self, model: Any, selection: Selection | None = None, depths: Depths = ()) -> dict[str, ItemScores]:
        """Scores a model.

        Args:
            model: A causal language model of transformers, in evaluation mode.
            selection: Task to positions of its items, in the order in which the scores should come; all items if None.
            depths: For each layer the identity of the hidden states before it (`engine.prefix.depth_digests`), so that
                layers which this model shares with one scored before need not be run again.

        Returns:
            Task to per-item scores.

        Raises:
            CandidateError: The model's numbers are not finite.
            TaskError: An item that cannot be scored, or an empty selection.
        """
        self.prepare(model)
        scores = {}
        for task, indices in (self.everything if selection is None else selection).items():
            if not indices:
                raise TaskError(f"task {task!r}: no items are selected, so there is nothing to score")
            requests = self.requests(task)
            instances = requests.fresh(indices)
            for group, answers in zip(instances, self._backend.respond(model, requests, indices, depths), strict=True):
                for instance, responses in zip(group, answers, strict=True):
                    instance.resps.extend(responses)
            scores[task] = item_scores(self._task(task), indices, instances)
        return scores

    def gradient(
        self,
        model: Any,
        selection: Selection,
        pulls: Mapping[str, Mapping[str, Array]],
        names: Sequence[str],
    ) -> dict[str, Tensor] | None:
        """The derivative of Σ pull · numerator, over metrics and items, with respect to the model's weights.

        Args:
            model: A causal language model of transformers, in evaluation mode; as before afterwards.
            selection: Task to positions of its items.
            pulls: Task to metric to one number per item of the selection: what its numerator counts.
            names: The parameters that matter.

        Returns:
            Name to float32 tensor, without the parameters that do not matter after all; None where no task is scored by
            log-likelihoods, or the backend is not the native one. What asks for generated text counts nothing.

        Raises:
            CandidateError: A number is not finite.
        """
        backend = self._backend
        if not isinstance(backend, NativeBackend):
            return None
        backend.prepare(model)
        pieces = []
        for task, wanted in pulls.items():
            indices, requests = selection[task], self.requests(task)
            sensitive = partial(self._sensitivities, task, indices, wanted)
            pieces += backend.pieces(model, requests, indices, sensitive) or []
        if not pieces:
            return None
        return weight_gradient(model, pieces, names, head_is_last=backend.scorer.head_is_last)

    def _sensitivities(
        self, task: str, indices: Sequence[int], pulls: Mapping[str, Array], places: Sequence[int], answers: Answers
    ) -> list[list[float]]:
        part = {metric: pull[list(places)] for metric, pull in pulls.items()}
        return sensitivities(self._task(task), self.requests(task), [indices[place] for place in places], answers, part)

    def expect(self, depths: Depths) -> None:
        """Announces the model that will be scored after the next one: what both share is kept."""
        if self.prefixes is not None:
            self.prefixes.expect(depths)

    def requests(self, task: str) -> Requests:
        """What the task asks, built on first use."""
        if task not in self._requests:
            self._requests[task] = build_requests(self._task(task), self.encoder, self.prompting)
        return self._requests[task]

    def item_hash(self, task: str, index: int) -> str:
        """Identity of one item's content: its document and what it asks."""
        if task not in self._hashes:
            by_item = self.requests(task).by_item
            self._hashes[task] = tuple(_hash(instances) for instances in by_item)
        return self._hashes[task][index]

    def check(self, selection: Selection | None = None) -> list[str]:
        """Builds and encodes what some items ask, so that what cannot be scored is found before any model is.

        Returns:
            Warnings: texts that lose their beginning because they are longer than the context.

        Raises:
            TaskError: With what is wrong with the first such item of every task, all at once.
        """
        problems: list[str] = []
        warnings: list[str] = []
        for task, indices in (self.everything if selection is None else selection).items():
            try:
                by_item = self.requests(task).by_item
                with quiet():  # tokenizers have an opinion on long texts, too
                    # Every request is looked at: the second one of an item may be what cannot be scored.
                    cut = sum(max(list(map(self.encoder.is_cut, by_item[k]))) for k in indices)
            except TaskError as error:
                problems += error.problems
                continue
            if cut:
                warnings.append(
                    f"task {task!r}: {cut} of {len(indices)} items are longer than the context of {self.max_length}"
                    " tokens; their prompts lose their beginning, as in lm-eval"
                )
        if problems:
            raise TaskError(problems)
        return warnings

    def layout_digest(self, selection: Selection | None = None) -> str:
        """Identity of how a selection is batched: scores under equal digests are rounded alike."""
        chosen = sorted((self.everything if selection is None else selection).items())
        parts = (f"{task}:{self._backend.digest(self.requests(task), indices)};" for task, indices in chosen)
        return digest(*parts)

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise TaskError(f"task {name!r} was not loaded; there are {', '.join(self.tasks)}")
        return self.tasks[name]


def _hash(instances: Sequence[Any]) -> str:
    asked = (repr((instance.request_type, instance.args, instance.repeats)) for instance in instances)
    return digest(repr(instances[0].doc), *asked)
