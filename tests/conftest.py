"""Offline, one thread, a cache of its own, and for the whole session one family of tiny models and one finished run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap forks a pool of a process that has threads

import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import settings

from tests.frame import search_spec

# Libraries that take seconds to load are imported in fixtures: the process that hands out tests needs none of them.

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small gain nothing from a second thread, and wait for it on a busy machine; no progress bars."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random base and three noisy copies of it: {"base", "a", "b", "c"} -> folder."""
    from tests.models import write_tiny_llama

    root = tmp_path_factory.mktemp("family")
    family = {"base": write_tiny_llama(root / "base", 0)}
    for seed, name in enumerate("abc", start=1):
        family[name] = write_tiny_llama(root / name, seed, base=family["base"])
    return family


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Gives a base and two noisy copies of an architecture: {"base", "a", "b"} -> folder, each written once."""
    from tests.architectures import ARCHITECTURES, write_family

    root = tmp_path_factory.mktemp("architectures")
    return functools.cache(lambda name: write_family(ARCHITECTURES[name], root / name))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Fingerprints and zoo models go to a folder of this session, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EVOMERGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_probing() -> Iterator[None]:
    """`evaluation.dtype: auto` is float32: which is faster hangs on the machine, and scores on which it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evomerge.problem.problem.fastest_dtype", lambda shapes, device: "float32")
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and a killed process loses nothing that is written; other processes do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def command_line() -> Iterator[None]:
    """The command line is built once a session, not at every call: that takes longer than most commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def heard_interrupts() -> Iterator[None]:
    """Ctrl-C is heard, even where a shell started the tests in the background and had them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def finished_run(tiny_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search, for reading only; copy it to change it."""
    from evomerge.run.search import start
    from evomerge.spec.load import load_spec
    from evomerge.trackers.console import ConsoleTracker

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    path = folder.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(search_spec(tiny_family), sort_keys=False))
    start(load_spec(path), source=path, folder=folder, tracker=ConsoleTracker())
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, with this process connected to it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"USAGE_STATS_ENABLED": "0", "AUTH_MODE": "token", "AUTH_TOKEN": "0" * 64}.items():
            patch.setenv(f"RAY_{key}", value)
        before = signal.getsignal(signal.SIGTERM)
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
        cluster = Cluster()
        for more in ({"include_dashboard": False}, {}):
            cluster.add_node(wait=False, **node, **more)
        cluster.wait_for_nodes(timeout=240)  # a busy machine takes longer than the 30 s of `wait`
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        signal.signal(signal.SIGTERM, before)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
