"""pass@k (Chen et al., 2021, arXiv:2107.03374), as code_eval of the evaluate library has it, of programs shut in.

lm-eval's tasks ask evaluate for code_eval while their functions are loaded. That would come from the Hub, and it runs
programs in copies of this process, with all that the user may do. What they get in its place takes and gives the same.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError
from evomerge.evaluation.programs.sandbox import Limits, run_program

NAME = "code_eval"
UNASKED = (
    "runs code that the model writes, which has to be asked for: evaluation.unsafe_code: true in a search.yaml, "
    "--confirm-run-unsafe-code of `evomerge eval`"
)
_SECONDS = 3.0
"""What code_eval gives a program."""


class CodeEval:
    """The metric code_eval: which programs pass their tests, and pass@k of that."""

    def compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = _SECONDS,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Runs programs one after another: who asks for many items asks for several at once.

        Args:
            predictions: By item, the programs that the model wrote.
            references: By item, the test that follows each.
            k: Each k of pass@k; those that exceed the number of any item's programs are left out.
            num_workers: Without a meaning here.
            timeout: Seconds of a program.

        Returns:
            ``{"pass@k": mean over items}``, and by item what came of every program.
        """
        del num_workers
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, (candidates, test) in enumerate(zip(predictions, references, strict=True)):
            for number, candidate in enumerate(candidates):
                passed = check_correctness(f"{candidate}\n{test}", timeout)
                outcome = {"task_id": task, "passed": passed, "result": "passed" if passed else "failed"}
                results.setdefault(task, []).append((number, {**outcome, "completion_id": number}))
        counts = [(len(own), sum(outcome["passed"] for _, outcome in own)) for own in results.values()]
        given = [one for one in k if counts and all(samples >= one for samples, _ in counts)]
        means = {one: math.fsum(pass_at_k(*count, one) for count in counts) / len(counts) for one in given}
        return {f"pass@{one}": mean for one, mean in means.items()}, results


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimates without bias the probability that one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, how many there are; k at least.
        correct: c, how many of them are correct.
        k: How many are drawn.
    """
    wrong = samples - correct
    return 1.0 - math.prod(1.0 - k / one for one in range(wrong + 1, samples + 1)) if wrong >= k else 1.0


def check_correctness(check_program: str, timeout: float = _SECONDS) -> bool:
    """Runs a program with its test in it; called as what lm-eval's own cruxeval has in its place."""
    return run_program(check_program, Limits(seconds=timeout))


def asks_for_programs(config: Mapping[str, Any]) -> bool:
    """Says of a task's settings, functions unresolved, whether its scoring runs what a model writes."""
    metrics = [part.get("metric") for part in config.get("metric_list") or [] if isinstance(part, Mapping)]
    files = [Path(metric.rpartition(".")[0] + ".py") for metric in metrics if isinstance(metric, str)]
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    return bool(config.get("unsafe_code")) or NAME in metrics or any(NAME in text for text in texts)


def runs_programs(task: Any) -> bool:
    """Says of a task of lm-eval's whether its scoring runs what a model writes."""
    if getattr(task, "UNSAFE_CODE", False):
        return True
    return any(_has_code_eval(function) for function in _functions(task))


@contextlib.contextmanager
def code_eval_here() -> Iterator[None]:
    """Gives `CodeEval` to whoever asks the evaluate library for code_eval within."""
    import evaluate

    load = evaluate.load

    def load_or_own(path: str, *args: Any, **options: Any) -> Any:
        return CodeEval() if path == NAME else load(path, *args, **options)

    evaluate.load = load_or_own
    try:
        yield
    finally:
        evaluate.load = load


def contain(task: Any) -> None:
    """Sees to it that all programs of a task are run here.

    Args:
        task: lm-eval's task, loaded within `code_eval_here`.

    Raises:
        TaskError: Functions of its own run them elsewhere.
    """
    for function in _functions(task):
        names: dict[str, Any] = getattr(function, "__globals__", {})
        if _is_runner(names.get("check_correctness")):
            names["check_correctness"] = check_correctness
        elif not _has_code_eval(function):
            name = getattr(function, "__qualname__", function)
            raise TaskError(
                f"task {task.task_name!r} runs code that the model writes by a function of its own, {name}, and not by "
                "code_eval: EvoMerge cannot shut it in, so it does not run it"
            )


def _functions(task: Any) -> list[Callable[..., Any]]:
    """The functions of a task's own that value responses."""
    config = getattr(task, "config", None)
    given = [part.get("metric") for part in getattr(config, "metric_list", None) or [] if isinstance(part, Mapping)]
    given += [getattr(config, "process_results", None), getattr(type(task), "process_results", None)]
    return [
        one for one in given if callable(one) and getattr(one, "__qualname__", "") != "ConfigurableTask.process_results"
    ]


def _has_code_eval(function: Any) -> bool:
    """Whether a function, or what it is a method of, has our code_eval at hand."""
    names = getattr(function, "__globals__", {})
    return any(isinstance(value, CodeEval) for value in (getattr(function, "__self__", None), *names.values()))


def _is_runner(function: Any) -> bool:
    """Whether a function takes a whole program, test and all, as cruxeval's does."""
    return callable(function) and next(iter(inspect.signature(function).parameters), "") == "check_program"
