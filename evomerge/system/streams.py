"""The streams to the terminal: open, whatever the caller has closed, and without what may not get there."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from typing import TextIO

from evomerge.system.text import printable


class PrintableStream(io.TextIOBase):
    """A stream of text that passes on what is `printable`, whoever writes to it.

    Attributes:
        unfiltered: The stream behind it, for what draws on the terminal on purpose.
    """

    def __init__(self, unfiltered: TextIO) -> None:
        self.unfiltered = unfiltered

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream behind it."""
        return self.unfiltered.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """That of the stream behind it."""
        return self.unfiltered.errors

    @property
    def buffer(self) -> io.BufferedIOBase:
        """That of the stream behind it."""
        return self.unfiltered.buffer  # type: ignore[return-value]

    def write(self, text: str) -> int:
        """Writes what is printable of a text."""
        self.unfiltered.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        """Writes what is printable of some texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream behind it."""
        self.unfiltered.flush()

    def isatty(self) -> bool:
        """Tells whether the stream behind it is a terminal."""
        return not self.unfiltered.closed and self.unfiltered.isatty()

    def fileno(self) -> int:
        """Gives the file descriptor of the stream behind it."""
        return self.unfiltered.fileno()

    def writable(self) -> bool:
        """Tells that it can be written to."""
        return True


def prepare_streams() -> None:
    """Gives the process three open streams, of which the ones that are written to filter what they are given.

    A stream that whoever started us has closed would be the number of the next file that is opened: the record of a
    search, say, to which every stray line for the terminal would then go.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
    sys.stdout = _filtered(sys.stdout, 1)
    sys.stderr = _filtered(sys.stderr, 2)


def discard(number: int) -> None:
    """Lets go of whatever is still to be written to a file descriptor, which takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _filtered(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (for as long as we run)
    if isinstance(stream, PrintableStream):
        return stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return PrintableStream(stream)  # type: ignore[return-value]
