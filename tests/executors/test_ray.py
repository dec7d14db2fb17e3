"""Actors of Ray on a cluster of two nodes: what they cost when they or their node die, and who is refused."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import RunError, SpecError
from evomerge.executors import ray as ray_module
from evomerge.executors.ray import RayWorkers
from evomerge.study.candidate import Candidate
from evomerge.study.record import Record
from tests.executors.scripted_worker import OPENER, actors, run, workers
from tests.executors.test_local import BUDGET, PATIENCE, alive, lasting, wait_for
from tests.frame import environment
from tests.study.scripted_run import SPACE
from tests.study.scripted_run import run as run_alone

pytestmark = pytest.mark.slow  # Ray itself takes seconds to start


def test_actors_that_die_and_a_node_that_is_removed_change_nothing(
    ray_cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three actors on three nodes; one candidate kills its actor once, and a node goes while they score others."""
    caplog.set_level(logging.WARNING)
    alone = lasting(run_alone(tmp_path / "one", "ga", BUDGET).candidates)
    for attempt in range(5):  # until the node that goes had an actor: which nodes have one is Ray's to say
        folder = tmp_path / f"three-{attempt}"
        candidates = _run_while_a_node_goes(ray_cluster, folder)
        assert lasting(candidates) == alone
        processes = {c.scores["process"] for c in candidates if c.state != "failed"}
        assert len(processes) >= 3
        assert "died (its worker process has died" in caplog.text
        wait_for(lambda processes=processes: not any(map(alive, processes)))
        if "died (its node has died" in caplog.text or "died (its node is gone" in caplog.text:
            break
    else:
        pytest.fail("no actor lost its node")


def _run_while_a_node_goes(cluster: Any, folder: Path) -> tuple[Candidate, ...]:
    node = cluster.add_node(wait=False, num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes(timeout=240)
    executor = actors(folder, 3, {0: "meets 1", 1: "meets 2", 2: "meets 0", 9: "killed once"}, pause=0.3)
    recorded = folder / "study.log"

    def remove() -> None:
        wait_for(lambda: recorded.exists() and recorded.read_bytes().count(b"\n") > 12)
        cluster.remove_node(node)

    removal = threading.Thread(target=remove)
    removal.start()
    try:
        return run(folder, BUDGET, executor).candidates
    finally:
        removal.join()
        executor.close()


def test_a_node_with_other_models_is_refused_by_name(ray_cluster: Any, tmp_path: Path) -> None:
    nodes = [node.node_id for node in (ray_cluster.head_node, *ray_cluster.worker_nodes)]
    refused = f"on node {socket.gethostname()} ({nodes[0][:8]}) is refused: the models have changed"
    alone = lasting(run_alone(tmp_path / "alone", "ga", 13).candidates)
    for attempt in range(5):  # until Ray has placed an actor on the refused node before the others were done
        reports: list[str] = []
        folder = tmp_path / f"one-{attempt}"
        executor = actors(folder, 2, {-1: f"refuses {nodes[0]}"}, pause=0.3, report=reports.append)
        try:
            assert lasting(run(folder, 13, executor).candidates) == alone
        finally:
            executor.close()
        if any(refused in text for text in reports):
            break
    else:
        pytest.fail("no actor was refused")
    executor = actors(tmp_path / "none", 1, {-1: f"refuses {nodes}"})
    try:
        with pytest.raises(
            RunError, match=r"no node of the cluster can score this run\nnode .*: the models have changed"
        ):
            run(tmp_path / "none", 13, executor)
    finally:
        executor.close()


def test_no_room(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_module, "PLACEMENT_SECONDS", 1.0)
    executor = ray_module_pool(tmp_path, {"GPU": 1})
    try:
        with pytest.raises(Exception, match=r"no node has room for an actor with GPU: 1; the cluster has .*CPU: 2"):
            run(tmp_path, 13, executor)
    finally:
        executor.close()


def ray_module_pool(folder: Path, resources: dict[str, float]) -> Any:
    from evomerge.executors.pool import Pool

    return Pool(RayWorkers(OPENER, (folder, {}, 0.0), 2, resources), 2, lambda history: None)


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that is not connected to any cluster, as far as it knows."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_module, "CONNECT_SECONDS", 1.0)
    begin = time.monotonic()
    for address, message in {
        "nowhere": "HOST:PORT of the cluster's head, or auto",
        "ray://127.0.0.1:1": "HOST:PORT of the cluster's head, or auto",
        "127.0.0.1:1": "127.0.0.1:1 does not answer: ",
    }.items():
        with pytest.raises(SpecError, match=message):
            RayWorkers(OPENER, (), 1, {"CPU": 1}, address)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(SpecError, match="no Ray answers at"):
            RayWorkers(OPENER, (), 1, {"CPU": 1}, f"127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - begin < PATIENCE


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpecError, match=r"pip install 'evomerge\[ray\]'"):
        RayWorkers(OPENER, (), 1, {"CPU": 1})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_ray_of_the_run_s_own_ends_with_its_driver_and_the_run_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    """In the middle of two candidates, each of which would take ten minutes; Ctrl-C goes to the whole group."""
    program = [sys.executable, "-c", DRIVER, str(tmp_path), str(BUDGET)]
    with (tmp_path / "out").open("wb") as out:
        driver = subprocess.Popen(program, env=environment(), start_new_session=True, stdout=out)
        try:
            marks = [tmp_path / f"{number}.mark" for number in (15, 16)]
            wait_for(lambda: all(mark.is_file() and mark.read_text() for mark in marks))
            processes = [*(int(mark.read_text()) for mark in marks), *_descendants(driver.pid)]
            assert len(processes) > 4
            if how == signal.SIGINT:
                os.killpg(driver.pid, how)
            else:
                driver.send_signal(how)
            driver.wait(PATIENCE)
            wait_for(lambda: not any(map(alive, processes)))
        finally:
            driver.kill()
            driver.wait()
    assert (tmp_path / "out").read_text() == ""
    recorded = Record.open(tmp_path / "study.log", "run", space=SPACE).candidates()
    assert {15, 16}.isdisjoint(c.number for c in recorded)
    executor = workers(tmp_path, 1)
    try:
        candidates = run(tmp_path, BUDGET, executor).candidates
    finally:
        executor.close()
    assert lasting(candidates) == lasting(run_alone(tmp_path / "one", "ga", BUDGET).candidates)


def _descendants(process: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*children, *(below for child in children for below in _descendants(child))]


# A shell that starts the tests in the background has their processes ignore Ctrl-C.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from tests.executors.scripted_worker import actors, run
folder, budget = Path(sys.argv[1]), int(sys.argv[2])
executor = actors(folder, 2, {15: "sleeps", 16: "sleeps"})
try:
    run(folder, budget, executor)
finally:
    executor.close()
"""
