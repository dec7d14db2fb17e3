"""Copies beside the computing: in which order what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from evomerge.engine.device.copier import Copier, ahead, streams_of
from evomerge.engine.device.sources import DeviceSources, Room
from evomerge.planning.operation import Input
from tests.engine.device.pretend import pretending
from tests.engine.helpers import checkpoints_of

CPU = torch.device("cpu")


class Streams:
    """A device's module that writes down what it is asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._events = 0

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, "copies")

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(self, "computes")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"{stream.name} begin")
        yield
        self.log.append(f"{stream.name} end")

    def event(self) -> str:
        self._events += 1
        return f"event {self._events}"


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self._streams = streams
        self.name = name

    def record_event(self) -> str:
        event = self._streams.event()
        self._streams.log.append(f"{self.name} record {event}")
        return event

    def wait_event(self, event: str) -> None:
        self._streams.log.append(f"{self.name} wait for {event}")


def test_a_copy_waits_for_its_memory_and_the_computing_for_the_copy() -> None:
    streams: Any = Streams()
    with pretending() as device:
        copier = Copier(device, streams)
        there = torch.ones(2).to(device)
        arrival = copier.start([torch.arange(3.0), there])
        values = arrival.wait()
        assert values[0].tolist() == [0.0, 1.0, 2.0]
        assert values[1] is there
    assert streams.log == [
        "computes record event 1",
        "copies begin",
        "copies wait for event 1",
        "copies record event 2",
        "copies end",
        "computes wait for event 2",
    ]


def test_what_is_there_is_not_copied() -> None:
    streams: Any = Streams()
    with pretending() as device:
        there = torch.ones(2).to(device)
        assert Copier(device, streams).start([there]).wait()[0] is there
    assert streams.log == []


def test_an_error_of_a_copy_is_that_of_its_user() -> None:
    with pretending() as device:
        broken: Any = Streams()
        broken.stream = None
        arrival = Copier(device, broken).start([torch.ones(2)])
        with pytest.raises(TypeError):
            arrival.wait()


def test_one_ahead_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for k in range(4):
            made.append(k)
            yield k

    seen = [(item, len(made)) for item in ahead(items())]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(ahead([])) == []


def test_streams_where_a_device_has_some() -> None:
    assert streams_of(CPU) is None
    assert streams_of(torch.device("mps")) is None
    assert streams_of(torch.device("cuda")) is torch.cuda


def names(count: int) -> list[Input]:
    return [Input("m", f"t{k}", "f") for k in range(count)]


def sources(room: Room, count: int = 4) -> tuple[DeviceSources, list[Input]]:
    """Tensors of 40 bytes each."""
    tensors = {f"t{k}": torch.full((10,), float(k)) for k in range(count)}
    return DeviceSources(checkpoints_of({"m": tensors}), torch.device("meta"), room, block=4), names(count)


def test_the_first_ones_stay_and_the_others_come_and_go() -> None:
    with pretending() as device:
        reader, inputs = sources(Room(kept=90, ahead=40))
        for _ in range(2):
            for k, _ in enumerate(reader.in_turn([[each] for each in inputs])):
                assert reader.flat(inputs[k]).device == device
                assert reader.flat(inputs[k]).tolist() == [float(k)] * 10
        assert [reader.flat(each).device == device for each in inputs] == [True, True, False, False]


def test_what_is_too_large_to_be_there_whole_comes_in_blocks() -> None:
    with pretending() as device:
        reader, inputs = sources(Room(ahead=39))
        for k, _ in enumerate(reader.in_turn([[each] for each in inputs])):
            assert reader.flat(inputs[k]).device == CPU
            blocks = list(reader.floats([inputs[k], inputs[0]], 1, 9))
            assert [start for start, _ in blocks] == [1, 5]
            assert {value.device for _, values in blocks for value in values} == {device}
            assert torch.cat([values[0] for _, values in blocks]).tolist() == [float(k)] * 8


def test_an_error_in_a_turn_leaves_nothing_behind() -> None:
    with pretending():
        reader, inputs = sources(Room(ahead=40))
        turns = reader.in_turn([[each] for each in inputs])
        next(turns)
        turns.close()  # type: ignore[attr-defined]
        assert all(reader.flat(each).device == CPU for each in inputs)
