"""The Hugging Face Hub on the loopback, as far as an upload asks for it: in this process, with a memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

TOKEN = "hf_" + "goodToken" * 3

DIRECT = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
"""Variables for a process of its own: LFS in the place of Xet, whose storage is no server of a page."""


@dataclass
class Repo:
    """A repository: who may see it, its files, its commits as (message, the paths in it)."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """The last commit."""
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class HubServer:
    """What the Hub has, what it was asked, and where it is to fail.

    Attributes:
        repos: ORG/NAME to repository.
        large: What was uploaded by its SHA-256.
        calls: (method, path) of every request.
        faults: Part of a path to the status of the next request for such a one, used once.
        role: Of the token.
        url: The endpoint.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    role: str = "write"
    url: str = ""

    @property
    def uploads(self) -> int:
        """How often a large file was sent."""
        return sum(method == "PUT" for method, _ in self.calls)


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Runs the Hub for the length of a block, in which huggingface_hub speaks to it over plain LFS."""
    state = HubServer()

    class Handler(_Handler):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    point_at(monkeypatch, state.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Has huggingface_hub, which reads its variables when it is imported, take another Hub."""
    from huggingface_hub import constants

    for name, value in {"ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        path = self.path.partition("?")[0]
        self.hub.calls.append((self.command, path))
        fault = next((part for part in self.hub.faults if part in path), None)
        if fault is not None:
            status = self.hub.faults.pop(fault)
            return self._reply(status, {"error": f"the server's own words for {status}"})
        if path.startswith("/lfs/"):  # the storage behind it knows no tokens
            self.hub.large[path.removeprefix("/lfs/")] = body
            return self._reply(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply(401, {"error": "Invalid credentials in Authorization header"})
        return self._reply(*self._answer(path, body))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"name": "org", "type": "user", "auth": {"accessToken": {"role": self.hub.role}}}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            wrong = [] if isinstance(front, dict) else [{"message": "no mapping"}]
            return (400 if wrong else 200), {"errors": wrong, "warnings": []}
        name = "/".join(path.removeprefix("/api/models").strip("/").removesuffix(".git").split("/")[:2])
        repo = self.hub.repos.get(name.removesuffix(".git"))
        if repo is None:
            return 404, {"error": "Repository not found"}
        if path.endswith("/preupload/main"):
            return 200, {"files": [self._mode(repo, file) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]}
        if path.endswith("/commit/main"):
            return self._commit(name, repo, body)
        return 200, {"id": name, "private": repo.private, "sha": repo.sha, "siblings": [], "tags": []}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": f"{self.hub.url}/{name}"}

    def _mode(self, repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        oid = None
        if (content := repo.files.get(file["path"])) is not None:
            blob = b"blob %d\0" % len(content) + content
            oid = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(blob).hexdigest()
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid = asked["oid"]
        if oid in self.hub.large:
            return dict(asked)
        return {**asked, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}}}

    def _commit(self, name: str, repo: Repo, body: bytes) -> tuple[int, Any]:
        header, *operations = (json.loads(line) for line in body.splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.large[value["oid"]]
            else:
                del repo.files[value["path"]]
        repo.commits.append((header["value"]["summary"], [o["value"]["path"] for o in operations]))
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha}

    def _reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)
