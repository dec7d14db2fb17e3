"""Scores models on items of tasks: everything that does not depend on the model is done once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from evomerge.errors import BadInput, CandidateError, EvoMergeError, TaskError
from evomerge.evaluation.backends.registry import BackendName, BackendOptions, Directions, make_backend
from evomerge.evaluation.live_model import BackendModel
from evomerge.evaluation.programs.sandbox import program_notes
from evomerge.evaluation.scorers.lm_eval import item_scores
from evomerge.evaluation.scorers.response_functions import Linear, smooth_metric
from evomerge.evaluation.scores import ItemScores, ResponseJacobian, SmoothMetric
from evomerge.evaluation.splits import Selection
from evomerge.evaluation.tasks.requests import Encoder, Prompting, Requests, build_requests
from evomerge.evaluation.tasks.scorer_task import ScorerTask, item_digest
from evomerge.evaluation.tasks.task import SOME_ANSWERS, Task
from evomerge.system.arrays import FloatArray
from evomerge.system.hashing import digest
from evomerge.system.quiet import quiet

log = logging.getLogger(__name__)

_TRIED = 4
"""Items that a scorer is tried on."""


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
        chat_template_args: What the chat template is rendered with, such as ``{"enable_thinking": False}``.
        think_end_token: What ends the thinking of a model, as text or as a token's number; only what follows counts.
        backend: One of `backends.registry`.
        threads: How many threads of a CPU the batches of generated text are cut for: what rounds them must not depend
            on how many there are in this process. None for all that torch has.
        vllm: Arguments of vLLM's engine, for that backend.

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
        chat_template_args: Mapping[str, Any] | None = None,
        think_end_token: str | int | None = None,
        backend: BackendName = "native",
        threads: int | None = None,
        vllm: Mapping[str, Any] | None = None,
    ) -> None:
        from lm_eval.models.utils import resolve_max_length

        listed = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
        self.tasks: dict[str, Task] = {loaded.name: loaded for loaded in listed}
        self.max_length = max_length or resolve_max_length(config, tokenizer)
        self.encoder = Encoder(tokenizer, self.max_length, chat_template_args)
        self.prompting = Prompting(apply_chat_template, fewshot_as_multiturn, system_instruction)
        if apply_chat_template:
            self.encoder.require_chat_template()
        self._requests: dict[str, Requests] = {}
        self._hashes: dict[tuple[str, int], str] = {}
        vocabulary = int((getattr(config, "text_config", None) or config).vocab_size)
        if isinstance(think_end_token, str) and think_end_token.isdigit():  # as HFLM takes it
            think_end_token = int(think_end_token)
        options = BackendOptions(self.encoder, vocabulary, batch_tokens, threads, think_end_token, vllm or {})
        self.backend = make_backend(backend, options)

    @cached_property
    def all_items(self) -> dict[str, tuple[int, ...]]:
        """Selects all items."""
        return {name: tuple(range(len(loaded.items))) for name, loaded in self.tasks.items()}

    def items(self, task: str) -> tuple[str, ...]:
        """Returns the ids of a task's items."""
        return self._task(task).items

    def prepare(self, model: Any) -> None:
        """Gets to know the model's architecture; `batch_digest` is final from then on.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        self.backend.prepare(model)

    def score(self, model: Any, selection: Selection | None = None) -> dict[str, ItemScores]:
        """Scores a model.

        Args:
            model: A causal language model of transformers, in evaluation mode.
            selection: Task to positions of its items, in the order in which the scores should come; all items if None.

        Returns:
            Task to per-item scores.

        Raises:
            CandidateError: The model's numbers are not finite.
            TaskError: An item that cannot be scored, or an empty selection.
        """
        chosen = self.all_items if selection is None else selection
        answered = self.answer(model, {task: indices for task, indices in chosen.items() if not self._scorer(task)})
        return {
            task: item_scores(self._task(task), *answered[task]) if task in answered else self._valued(model, task, own)
            for task, own in chosen.items()
        }

    def _valued(self, model: Any, task: str, indices: Sequence[int]) -> ItemScores:
        """The scores of a task that a scorer values."""
        scorer = self._scorer(task)
        if scorer is None or not indices:
            raise TaskError(f"task {task!r}: no items are selected, so there is nothing to score")
        if scorer.linear is not None:
            given = self.backend.respond(model, self.requests(task), indices)
            values = np.array([responses[0][0][0] for responses in given])
            return scorer.item_scores(indices, *scorer.linear.linear(indices, values)[:2])
        return scorer.scores(BackendModel(task, model, self.backend, self.encoder), indices)

    def answer(self, model: Any, selection: Selection) -> dict[str, tuple[Sequence[int], list[list[Any]]]]:
        """Asks a model.

        Args:
            model: As for `score`.
            selection: As for `score`, of lm-eval's tasks.

        Returns:
            Task to the items' positions, and for each item its lm-eval instances with the model's responses.

        Raises:
            CandidateError: As `score`.
            TaskError: As `score`.
        """
        self.prepare(model)
        answered: dict[str, tuple[Sequence[int], list[list[Any]]]] = {}
        for task, indices in selection.items():
            if not indices:
                raise TaskError(f"task {task!r}: no items are selected, so there is nothing to score")
            requests = self.requests(task)
            instances = requests.fresh(indices)
            responses = self.backend.respond(model, requests, indices)
            for group, by_instance in zip(instances, responses, strict=True):
                for instance, values in zip(group, by_instance, strict=True):
                    instance.resps.extend(map(self.encoder.counted, values))
            answered[task] = indices, instances
        return answered

    def jacobian(
        self, model: Any, selection: Selection, directions: Mapping[str, Sequence[Directions]], columns: int
    ) -> dict[str, ResponseJacobian]:
        """Differentiates the log-likelihoods that items are scored by with respect to numbers behind the weights.

        Args:
            model: A causal language model of transformers, in evaluation mode; as before afterwards.
            selection: Task to positions of its items.
            directions: Name of a parameter to how it moves with the numbers.
            columns: How many numbers there are.

        Returns:
            By task, without those that ask for text or for what they like; empty where there are no derivatives.

        Raises:
            CandidateError: A number is not finite, or the model cannot be differentiated.
        """
        selection = {
            task: indices
            for task, indices in selection.items()
            if (scorer := self._scorer(task)) is None or scorer.linear is not None
        }
        parts = [(self.requests(task), indices) for task, indices in selection.items()]
        by_task = zip(selection, self.backend.jacobian(model, parts, directions, columns), strict=True)
        return {task: part for task, part in by_task if part is not None}

    def smooth_metric(
        self, task: str, metric: str, indices: Sequence[int], loglikelihoods: FloatArray
    ) -> SmoothMetric | None:
        """Gives a metric as a function of its requests' log-likelihoods; as `response_functions.smooth_metric`."""
        if (scorer := self._scorer(task)) is not None:
            if scorer.linear is None:
                return None
            numerators, _, slopes = scorer.linear.linear(indices, loglikelihoods)
            return Linear(loglikelihoods, numerators, slopes, np.arange(len(indices)))
        return smooth_metric(self._task(task), metric, self.requests(task), indices, loglikelihoods)

    def requests(self, task: str) -> Requests:
        """Returns what the task asks, each item's on first use; nothing of a scorer, which asks what it likes."""
        if task not in self._requests and (scorer := self._scorer(task)) is not None:
            asked: list[tuple[Any, ...]] = [()] * len(scorer.rows)
            if scorer.linear is not None:
                asked = [(request,) for request in scorer.linear.requests()]
            self._requests[task] = Requests(task, asked)
        if task not in self._requests:
            self._requests[task] = build_requests(self._task(task), self.encoder, self.prompting)
        return self._requests[task]

    def texts(self, task: str, index: int) -> tuple[str, str]:
        """Returns what an item asks first: the context, and what follows it; of a scorer the texts of its row."""
        if (scorer := self._scorer(task)) is not None:
            texts = [value for value in scorer.rows[index].values() if isinstance(value, str)]
            return "".join(texts[:1]), "".join(texts[1:])
        args = self.requests(task).by_item[index][0].args
        return (str(args[0]) if len(args) > 1 else ""), (str(args[-1]) if isinstance(args[-1], str) else "")

    def tokens(self, task: str, index: int) -> list[int]:
        """Encodes what an item asks first, context and what follows it together."""
        return list(self.encoder.tok_encode("".join(self.texts(task, index))))

    def item_hash(self, task: str, index: int) -> str:
        """Returns the identity of one item's content: its document and what it asks."""
        if (task, index) not in self._hashes:
            scorer = self._scorer(task)
            self._hashes[task, index] = (
                digest(item_digest(scorer.rows[index]), repr(self.encoder.chat_template_args))
                if scorer is not None
                else _hash(self.requests(task).by_item[index])
            )
        return self._hashes[task, index]

    def check(self, selection: Selection | None = None) -> list[str]:
        """Builds and encodes what some items ask, so that what cannot be scored is found before any model is.

        Returns:
            Warnings: Python that tasks run, programs of models that they run, labels that are no choices, texts that
            lose their beginning because they are longer than the context.

        Raises:
            TaskError: With what is wrong with the first such item of every task, all at once.
        """
        warnings, problems = self.examine(selection)
        if problems:
            raise TaskError([problem for of_task in problems.values() for problem in of_task])
        return warnings

    def examine(self, selection: Selection | None = None) -> tuple[list[str], dict[str, tuple[str, ...]]]:
        """As `check`, but returns what is wrong beside the warnings, by task."""
        problems: dict[str, tuple[str, ...]] = {}
        files = dict.fromkeys(path for task in self.tasks.values() for path in task.python_files)
        warnings = [f"tasks run Python of yours: {', '.join(map(str, files))}"] if files else []
        warnings += program_notes(name for name, task in self.tasks.items() if task.runs_programs)
        for task, indices in (self.all_items if selection is None else selection).items():
            if self._scorer(task):
                continue
            try:
                requests = self.requests(task)
                requests.build(indices)  # first: what templates cannot do with a document is told there
                warnings += self._task(task).document_notes(indices)
                by_item = requests.by_item
                with quiet():  # tokenizers have an opinion on long texts, too
                    # Every request is encoded: the second one of an item may be what cannot be scored.
                    cut = sum(max(list(map(self.encoder.is_cut, by_item[k]))) for k in indices)
            except TaskError as error:
                problems[task] = error.problems
                continue
            if cut:
                warnings.append(
                    f"task {task!r}: {cut} of {len(indices)} items are longer than the context of {self.max_length}"
                    " tokens; their prompts lose their beginning, as in lm-eval"
                )
        return warnings, problems

    def read_reference(self, model: Any, name: str) -> None:
        """Has the scorers that compare with a model read what it answers; once, before any model is scored.

        Args:
            model: As for `score`.
            name: What scorers call it.
        """
        self.prepare(model)
        for task in self.tasks.values():
            if isinstance(task, ScorerTask) and name in task.scorer.references:
                asked = BackendModel(task.name, model, self.backend, self.encoder)
                task.scorer.read(name, asked, task.rows)

    def try_scorers(self, model: Any, selection: Selection) -> list[str]:
        """Has every scorer value a few items, so that what it cannot do is found before anything is spent.

        Args:
            model: A model that can be scored.
            selection: Scorers' tasks to positions of their items.

        Returns:
            What is worth knowing of them.

        Raises:
            TaskError: With what is wrong with each.
        """
        problems = []
        self.prepare(model)
        for task, indices in selection.items():
            try:
                self._valued(model, task, indices[:_TRIED])
            except CandidateError as error:
                problems.append(str(error))
        if problems:
            raise TaskError(problems)
        return [note for task in selection if (scorer := self._scorer(task)) for note in scorer.scorer.notes]

    def metrics_given(self, task: str, indices: Sequence[int]) -> set[str] | None:
        """Returns the metrics that some items have values for, whatever a model answers.

        None where the task's own code takes no answer but a model's.
        """
        instances = self.requests(task).fresh(indices)
        for group in instances:
            for instance in group:
                instance.resps.extend([SOME_ANSWERS[instance.request_type]] * instance.repeats)
        try:
            scores = item_scores(self._task(task), indices, instances)
        except EvoMergeError:
            return None
        return set(scores.scores())

    def batch_digest(self, selection: Selection | None = None) -> str:
        """Returns the identity of how a selection is batched: scores under equal digests are rounded alike."""
        chosen = sorted((self.all_items if selection is None else selection).items())
        for task, indices in chosen:
            self.requests(task).build(indices)
        parts = (f"{task}:{self.backend.digest(self.requests(task), indices)};" for task, indices in chosen)
        return digest(*parts)

    def _scorer(self, name: str) -> ScorerTask | None:
        task = self._task(name)
        return task if isinstance(task, ScorerTask) else None

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise TaskError(f"task {name!r} was not loaded; there are {', '.join(self.tasks)}")
        return self.tasks[name]


def require_decoder(name: str, config: Any, backend: BackendName) -> None:
    """Checks that a backend can run a model's architecture.

    Raises:
        BadInput: It is an encoder-decoder, which only lm-eval's own HFLM runs.
    """
    if getattr(config, "is_encoder_decoder", False) and backend != "hf":
        raise BadInput(
            f"{name}: an encoder-decoder ({config.model_type}), which backend {backend} cannot score; backend hf can"
            " (--backend hf, or evaluation.backend: hf)"
        )


def _hash(instances: Sequence[Any]) -> str:
    asked = (repr((instance.request_type, instance.args, instance.repeats)) for instance in instances)
    return digest(repr(instances[0].doc), *asked)
