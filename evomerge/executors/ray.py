"""Actors of Ray: on this machine, or on the nodes of a cluster that may grow and shrink.

Ray places the actors by the resources that each needs, so there are as many as there is room for, up to what was asked.
A node that has other models or items than the run is refused, and no actor is placed on it again.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from evomerge.errors import EvoMergeError, RunError, SpecError
from evomerge.executors.pool import Begin, Message, Scorer, Worker
from evomerge.study.candidate import Proposal

CONNECT_SECONDS = 10.0
"""How long the address of a cluster may take to answer; then its head has three times as long to say how it is."""
PLACEMENT_SECONDS = 300.0
"""How long nobody may have had room for any actor, as while a cluster grows."""

_LOOK = 1.0  # seconds between two looks at the nodes
_OBJECT_STORE = 80 * 2**20  # bytes: the least that Ray takes; what actors are sent is small
_LINES = 1000  # of an actor's log, between two of its outcomes
_PASSED_ON = ("HF_", "EVOMERGE_", "TOKENIZERS_", "TRANSFORMERS_")

log = logging.getLogger(__name__)


class _Lines(logging.Handler):
    """Keeps the latest log lines of an actor, for the driver's log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record's text."""
        self._lines.append(self.format(record))

    def take(self) -> list[str]:
        """Returns what was kept, and forgets it."""
        lines = list(self._lines)
        self._lines.clear()
        return lines


class ActorScorer:
    """What runs in an actor: a scorer that says where it is, and sends its log along."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)  # what Ray's own way of saying it would start a process more for
        self._scorer = Scorer()
        self._lines = _Lines()
        logger = logging.getLogger("evomerge")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._lines)

    def where(self) -> tuple[str, str]:
        """Returns the id of the node, and its name."""
        import ray

        return ray.get_runtime_context().get_node_id(), socket.gethostname()

    def open(self, opener: str, arguments: Sequence[Any]) -> tuple[Message, list[str]]:
        """As `Scorer.open`, with log lines."""
        return self._scorer.open(opener, arguments), self._lines.take()

    def score(self, proposal: Proposal, begin: Begin, attached: Any) -> tuple[Message, list[str]]:
        """As `Scorer.score`, with log lines."""
        return self._scorer.score(proposal, begin, attached), self._lines.take()


class _Actor:
    """An actor, seen from the driver: it is placed on a node, opens what it needs there, and then scores.

    Attributes:
        pending: What it has been asked and has not answered yet; None where it is idle.
        node: Id and name of its node, once it is placed.
        ready: Whether it has opened what it needs.
    """

    def __init__(self, handle: Any, slot: int) -> None:
        self._handle = handle
        self._slot = slot
        self.pending: Any = handle.where.remote()
        self.node: tuple[str, str] | None = None
        self.ready = False

    @property
    def name(self) -> str:
        """Its number, and where it is."""
        return f"actor {self._slot}" + ("" if self.node is None else f" on {_node_name(*self.node)}")

    def open(self, node: tuple[str, str], opener: str, arguments: Any) -> None:
        """Has it open what it needs, on the node where it is."""
        self.node = node
        self.pending = self._handle.open.remote(opener, arguments)

    def answered(self) -> None:
        """Notes that it has answered what it was asked when it was placed."""
        self.pending, self.ready = None, True

    def give(self, proposal: Proposal, begin: Begin, attached: Any) -> None:
        """Has it score a proposal."""
        self.pending = self._handle.score.remote(proposal, begin, attached)

    def end(self) -> None:
        """Kills it."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._handle)


class RayWorkers:
    """Actors of Ray.

    Args:
        opener: What an actor opens first, as ``module:function``; it returns `evomerge.executors.pool.Opened`.
        arguments: What the opener is called with.
        count: How many actors there may be.
        resources: What each needs, such as ``{"CPU": 2}`` or ``{"GPU": 1}``.
        address: Of a running cluster, as ``host:port`` or ``auto``; None for a Ray of this run's own on this machine,
            or for the one that this process has initialised.
        environment: What the environment of an actor has beside its node's.

    Raises:
        SpecError: Ray is not installed, or the address does not answer.
    """

    logs = "log.txt, and the logs of Ray"

    def __init__(
        self,
        opener: str,
        arguments: Sequence[Any],
        count: int,
        resources: Mapping[str, float],
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = _connect(address, count, resources)
        import ray

        self._opener = opener
        self._arguments = ray.put(tuple(arguments))
        self._resources = dict(resources)
        passed_on = {key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)}
        self._environment = {**passed_on, **(environment or {})}
        self._refused: dict[str, str] = {}  # what each node is refused for
        self._looked = self._placed = time.monotonic()
        self._waits = False

    def start(self, slot: int) -> Worker:
        """Asks Ray for an actor, on any node that was not refused."""
        import ray

        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        options: dict[str, Any] = {"num_cpus": 0}
        options |= {named[key]: value for key, value in self._resources.items() if key in named}
        options["resources"] = {key: value for key, value in self._resources.items() if key not in named}
        if self._refused:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self._refused)})"}
        actor = ray.remote(ActorScorer).options(**options, max_restarts=0, scheduling_strategy="SPREAD")
        return _Actor(actor.remote(self._environment), slot)

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Message] | None:
        """Waits up to a second for an answer of any of them, and looks at the nodes every second."""
        import ray

        actors = [worker for worker in workers if isinstance(worker, _Actor)]
        pending = {actor.pending: actor for actor in actors if actor.pending is not None}
        ready, _ = ray.wait(list(pending), timeout=_LOOK) if pending else ([], [])
        if time.monotonic() - self._looked >= _LOOK:
            self._looked = time.monotonic()
            idle = self._lost_with_its_node(actors)
            if idle is not None:
                return idle, ("lost", "its node is gone")
        return self._answer(pending[ready[0]]) if ready else None

    def close(self) -> None:
        """Leaves the cluster; ends a Ray of this run's own."""
        _disconnect(self._folder)

    def _answer(self, actor: _Actor) -> tuple[Worker, Message] | None:
        """What an actor has answered: where it is, whether it could open what it needs, or an outcome."""
        import ray

        try:
            answer = ray.get(actor.pending)
        except ray.exceptions.RayError as error:
            return actor, ("lost", _describe_death(error))
        if actor.node is None:
            self._placed, self._waits = time.monotonic(), False
            actor.open(answer, self._opener, self._arguments)
            return None
        (kind, content), lines = answer
        for line in lines:
            log.info("%s: %s", actor.name, line)
        if kind == "error" and not actor.ready:
            self._refused[actor.node[0]] = f"{_node_name(*actor.node)}: {content}"
            return actor, ("refused", str(content))
        actor.answered()
        return actor, (kind, content)

    def _lost_with_its_node(self, actors: Sequence[_Actor]) -> _Actor | None:
        """An idle actor whose node is gone, which nobody would hear of.

        Raises:
            RunError: Every node was refused.
            EvoMergeError: Nobody has had room for an actor for a long time.
        """
        import ray

        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
        if alive and alive.keys() <= self._refused.keys():
            raise RunError(["no node of the cluster can score this run", *(self._refused[node] for node in alive)])
        if any(actor.node is not None for actor in actors):
            self._placed = time.monotonic()
        waited = time.monotonic() - self._placed
        room = f"no node has room for an actor with {_describe(self._resources)}; the cluster has " + "; ".join(
            f"{node['NodeManagerHostname']}: {_describe(node['Resources'])}" for node in alive.values()
        )
        if waited > PLACEMENT_SECONDS:
            raise EvoMergeError(f"{room}; waited {waited:.0f} seconds for more")
        if waited > CONNECT_SECONDS and not self._waits:
            self._waits = True
            log.warning("%s; waiting for more", room)
        return next((a for a in actors if a.pending is None and a.node is not None and a.node[0] not in alive), None)


def _describe(resources: Mapping[str, float]) -> str:
    """Resources that people ask for, without those that Ray adds."""
    return ", ".join(f"{key}: {value:g}" for key, value in sorted(resources.items()) if ":" not in key) or "nothing"


def _node_name(node: str, host: str) -> str:
    return f"node {host} ({node[:8]})"


def _describe_death(error: Exception) -> str:
    """What Ray says last of an actor's death, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((line for line in lines if "because" in line), lines[-1] if lines else type(error).__name__)
    return last.rpartition(" because ")[2].partition(" Some common causes")[0][:300]


def _require_ray() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        text = "run.executor: ray needs Ray, which is not installed: `pip install 'evomerge[ray]'`"
        raise SpecError(text) from None


def _connect(address: str | None, count: int, resources: Mapping[str, float]) -> str | None:
    """Connects this process to a cluster, or starts one.

    Returns:
        The folder of a Ray of our own, "" where there is none but we are to disconnect; None where the process was
        connected before.
    """
    if address is None and "ray" not in sys.modules:  # it reads these when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _require_ray()
    import ray

    if ray.is_initialized():
        return None
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address is not None:
        _require_answer(address)
        with _own_signals():
            _init(address, address=address, **common)
        return ""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)  # a short path
    processors = max(os.cpu_count() or 1, int(count * max(1.0, resources.get("CPU", 0.0))))
    with _own_signals():
        _init(
            "this machine",
            address="local",
            num_cpus=processors,
            object_store_memory=_OBJECT_STORE,
            include_dashboard=False,
            _temp_dir=folder,
            **common,
        )
    ray._private.worker._worker_logs_enabled = False  # what daemons print would go to standard output
    return folder


def _init(where: str, **options: Any) -> None:
    import ray

    try:
        ray.init(**options)
    except (Exception, SystemExit) as error:  # of whatever kind: versions that differ, no permission, no memory
        raise SpecError(f"run.ray_address: Ray on {where} cannot be used: {error}") from error


def _disconnect(folder: str | None) -> None:
    if folder is None:
        return
    import ray

    with _own_signals():
        ray.shutdown()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts a handler of its own in the place of ours; it is taken away again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_answer(address: str) -> None:
    """Asks a cluster how it is: Ray itself asks an address that does not answer for minutes, and then ends the process.

    Raises:
        SpecError: It does not answer in time, or is no address.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        if "/" in address or not host or not port.isdecimal():
            text = "run.ray_address: HOST:PORT of the cluster's head, or auto on one of its nodes"
            raise SpecError(f"{text}; got '{address}'")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise SpecError(f"run.ray_address: {address} does not answer: {error}") from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=3 * CONNECT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SpecError(f"run.ray_address: no Ray answers at {address}") from None
    if asked.returncode:
        lines = [line for line in (asked.stdout + asked.stderr).splitlines() if line.strip()]
        raise SpecError(f"run.ray_address: no Ray answers at {address}: {lines[-1] if lines else 'no reason given'}")
