"""A judge on the loopback: an OpenAI-compatible server in this process, with the bad habits of real ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], str]


@dataclass
class JudgeServer:
    """What the server does, and what it has seen.

    Attributes:
        reply: Prompt to reply.
        faults: What to do instead, one for each call until they are used up: a status, "close", "rubbish", "no text".
        delay: Seconds that every answer takes.
        prompts: What was asked.
        headers: The last call's, by name in small letters.
        most: Calls that were under way at once.
        url: The endpoint.
    """

    reply: Reply = lambda prompt: "[[5]]"
    faults: list[Any] = field(default_factory=list)
    delay: float = 0.0
    prompts: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    most: int = 0
    url: str = ""
    under_way: int = 0
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def judge_server(**options: Any) -> Iterator[JudgeServer]:
    """Runs the server for as long as the block lasts."""
    state = JudgeServer(**options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.under_way += 1
                state.most = max(state.most, state.under_way)
                state.prompts.append(body["messages"][0]["content"])
                state.headers = {name.lower(): value for name, value in self.headers.items()}
                fault = state.faults.pop(0) if state.faults else None
            time.sleep(state.delay)
            try:
                self._answer(fault, body["messages"][0]["content"])
            finally:
                with state.lock:
                    state.under_way -= 1

        def _answer(self, fault: Any, prompt: str) -> None:
            if fault == "close":
                self.close_connection = True
                return
            message = {"role": "assistant", "content": None if fault == "no text" else state.reply(prompt)}
            content = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "judge",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
            status = fault if isinstance(fault, int) else 200
            text = json.dumps(content if status == 200 else {"error": {"message": f"status {status}"}})
            data = b"<html>{{" if fault == "rubbish" else text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Says nothing of callers that have gone."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
