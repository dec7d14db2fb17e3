"""Asks an OpenAI-compatible server: several calls at once, retried with backoff, kept on the disk, within limits."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import OutputError, ServiceError
from evomerge.system.files import write_atomic
from evomerge.system.hashing import digest
from evomerge.system.secrets import masked

log = logging.getLogger(__name__)

_READINGS = 3
"""How often a reply is asked for that means nothing."""
_PAUSE = 0.2
"""Seconds before the first of these, doubled each time."""


@dataclass(frozen=True)
class ChatOptions:
    """Which model of which server, and what may be spent on it.

    Attributes:
        endpoint: The server's URL, up to and with ``/v1``.
        model: The model's name there.
        key: The variable of the environment that has the key; it may be unset for a server that wants none.
        temperature: Of the replies.
        max_reply_tokens: Tokens of a reply at most.
        concurrency: Calls under way at once.
        retries: How often a call that failed is made again, later each time.
        timeout: Seconds that a call may take.
        max_calls: Calls at most, all sessions together; None for no limit.
        max_cost: What they may cost, in the currency of `price`; None for no limit.
        price: Of a million tokens, of prompts and of replies.
    """

    endpoint: str
    model: str
    key: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_reply_tokens: int = 512
    concurrency: int = 16
    retries: int = 6
    timeout: float = 60.0
    max_calls: int | None = None
    max_cost: float | None = None
    price: tuple[float, float] = (0.0, 0.0)

    @property
    def identity(self) -> str:
        """What decides a reply, beside the prompt."""
        return repr((self.endpoint, self.model, self.temperature, self.max_reply_tokens))


class ChatClient:
    """Asks one model of one server.

    Args:
        options: Which, and what may be spent.
        folder: Where replies are kept.
        spent: The file that says what was spent.
        name: What the limits are said to be of.
    """

    def __init__(self, options: ChatOptions, folder: Path, spent: Path, name: str) -> None:
        self.options = options
        self._folder = folder
        self._name = name
        self._spent = _Spent(spent)
        self._stopped = threading.Event()

    def ask(self, questions: Sequence[tuple[str, int]], readable: Callable[[str], bool]) -> list[str | None]:
        """Asks questions, those that are not on the disk several at once.

        Args:
            questions: Prompts, and which of several replies to each is wanted.
            readable: Whether a reply means anything; if not, it is asked for again.

        Returns:
            The replies; None where the server would not take the question, or gave nothing that can be read.

        Raises:
            ServiceError: The server cannot be reached, refuses, or a limit is reached: later, the same call goes on.
        """
        replies = {question: self._kept(question) for question in questions}
        missing = [question for question, reply in replies.items() if reply is None]
        if missing:
            replies |= dict(zip(missing, self._ask_all(missing, readable), strict=True))
        return [replies[question] for question in questions]

    def _ask_all(self, questions: Sequence[tuple[str, int]], readable: Callable[[str], bool]) -> list[str | None]:
        pool = ThreadPoolExecutor(min(self.options.concurrency, len(questions)), "judge")
        self._stopped.clear()
        client = self._client
        try:
            futures = [pool.submit(self._ask, question, readable) for question in questions]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                if error := future.exception():
                    raise error
            return [future.result() for future in futures]
        except KeyboardInterrupt:  # nobody waits for what is under way
            self.__dict__.pop("_client")
            client.close()
            raise
        finally:  # what has not begun never does; what is under way is paid for, and kept
            self._stopped.set()
            pool.shutdown(cancel_futures=True)

    def _ask(self, question: tuple[str, int], readable: Callable[[str], bool]) -> str | None:
        """Asks until a reply can be read, a few times; the last one counts."""
        text: str | None = None
        for reading in range(_READINGS):
            if reading and self._stopped.wait(_PAUSE * 2 ** (reading - 1)):
                break
            text = self._call(question[0])
            if text is not None and readable(text):
                break
        if text is not None:
            self._keep(question, text)
        return text

    def _call(self, prompt: str) -> str | None:
        import openai

        options = self.options
        if self._stopped.is_set():
            raise ServiceError("stopped")
        self._spent.begin(self._require_within)
        used = (0, 0)
        try:
            reply = self._client.chat.completions.create(
                model=options.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=options.temperature,
                max_tokens=options.max_reply_tokens,
            )
            text, used = _text_of(reply), _tokens_of(reply, prompt)
            return text
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            log.warning("%s: the server would not take a question: %s", self._name, masked(str(error))[:300])
            return None
        except (openai.APIResponseValidationError, ValueError, AttributeError, TypeError):
            return None  # no reply in the form that was agreed on
        except openai.OpenAIError as error:
            raise ServiceError(self._trouble(error)) from None
        finally:
            self._spent.end(*used)

    def _trouble(self, error: Exception) -> str:
        import openai

        reason = masked(" ".join(str(error).split()))[:300]
        where = f"{self._name}: {self.options.endpoint}"
        tried = f", tried {self.options.retries + 1} times"
        if isinstance(error, openai.APITimeoutError):
            return f"{where} does not answer within {self.options.timeout:g} s{tried}"
        if isinstance(error, openai.APIConnectionError):
            return f"{where} cannot be reached{tried}: {reason}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            has = "has none" if self.options.key not in os.environ else "has one that is refused"
            return f"{where} wants a key; it is read from the variable {self.options.key}, which {has}: {reason}"
        return f"{where} fails{tried if isinstance(error, openai.InternalServerError) else ''}: {reason}"

    def _require_within(self, calls: int, tokens: tuple[int, int]) -> None:
        """Refuses another call after so many, of so many tokens."""
        options = self.options
        cost = sum(price * count / 1e6 for price, count in zip(options.price, tokens, strict=True))
        advice = "raise it in the search.yaml, and the same command goes on from here"
        if options.max_calls is not None and calls >= options.max_calls:
            raise ServiceError(f"{self._name}: max_calls is {options.max_calls}, and so many were made; {advice}")
        if options.max_cost is not None and cost >= options.max_cost:
            raise ServiceError(f"{self._name}: max_cost is {options.max_cost:g}, and {cost:.4g} is spent; {advice}")

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise ServiceError(f'{self._name}: a judge needs openai: pip install "evomerge[judge]"') from None
        return openai.OpenAI(
            api_key=os.environ.get(self.options.key) or "none",  # a local server wants none, the client one
            base_url=self.options.endpoint,
            timeout=self.options.timeout,
            max_retries=self.options.retries,
        )

    def _path(self, question: tuple[str, int]) -> Path:
        key = digest(self.options.identity, "\0", question[0], f"\0{question[1]}")
        return self._folder / key[:2] / f"{key}.json"

    def _kept(self, question: tuple[str, int]) -> str | None:
        try:
            return str(json.loads(self._path(question).read_text(encoding="utf-8"))["reply"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: is damaged and ignored: it is asked again (%s)", self._path(question), error)
            return None

    def _keep(self, question: tuple[str, int], reply: str) -> None:
        path = self._path(question)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"reply": reply}))
        except (OSError, OutputError) as error:  # the answer is asked for again, no more
            log.warning("a judge's reply cannot be kept: %s", error)


class _Spent:
    """Counts calls and tokens of all processes: a line of a file each.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._under_way = 0
        self._read = 0  # bytes of the file
        self._calls, self._tokens = 0, (0, 0)

    def begin(self, check: Callable[[int, tuple[int, int]], None]) -> None:
        """Has a call begin, if what was spent allows it."""
        with self._lock:
            self._update()
            check(self._calls + self._under_way, self._tokens)
            self._under_way += 1

    def end(self, prompt: int, reply: int) -> None:
        """Takes what a call has cost."""
        with self._lock:
            self._under_way -= 1
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:  # one write of a short line is never torn
                file.write(f"{prompt} {reply}\n")

    def _update(self) -> None:
        """Reads what was added to the file, by whatever process."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        self._read += len(added)
        for prompt, reply in (line.split() for line in added.splitlines()):
            self._calls += 1
            self._tokens = self._tokens[0] + int(prompt), self._tokens[1] + int(reply)


def _text_of(reply: Any) -> str | None:
    """The text of a reply, if it has the form that was agreed on."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    text = getattr(message, "content", None)
    return text if isinstance(text, str) else None


def _tokens_of(reply: Any, prompt: str) -> tuple[int, int]:
    """Tokens of prompt and reply, as the server counts them; a third of the characters where it does not."""
    usage = getattr(reply, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    lengths = (len(prompt), len(_text_of(reply) or ""))
    prompt_tokens, reply_tokens = (
        count if isinstance(count, int) else length // 3 for count, length in zip(counts, lengths, strict=True)
    )
    return prompt_tokens, reply_tokens
