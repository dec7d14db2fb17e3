"""Values by name: our own, and those that installed packages add by entry points, loaded when they are asked for.

A package names what it adds in its pyproject.toml, by the name that a recipe or a search.yaml will have for it:

    [project.entry-points."evomerge.methods"]
    median = "my_package.median:median"
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evomerge.errors import BadInput
from evomerge.system.hashing import digest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """A registry that packages add to.

    Args:
        own: Our own values by name.
        group: Of the entry points, such as "evomerge.methods".
        kind: What each of them has to be.
        adopt: Checks and completes what a package adds, by its name; None where there is nothing to it.
    """

    def __init__(
        self,
        own: Mapping[str, T],
        group: str,
        kind: type[T],
        adopt: Callable[[str, T], T] | None = None,
    ) -> None:
        super().__init__(own)
        self._group = group
        self._kind = kind
        self._adopt = adopt

    def __missing__(self, name: str) -> T:
        """Loads what a package adds under a name.

        Raises:
            KeyError: No package does.
            BadInput: It cannot be loaded, or is something else.
        """
        point = self._points[name]
        try:
            value = point.load()
        except Exception as error:  # a package's own code can raise anything
            reason = f"{type(error).__name__}: {error}"
            raise BadInput(f"{self._named(point)} cannot be loaded: {reason}") from error
        if not isinstance(value, self._kind):
            kind = f"{self._kind.__module__}.{self._kind.__qualname__}"
            raise BadInput(f"{self._named(point)}: {point.value} is no {kind}, but {type(value).__name__}")
        try:
            self.data[name] = value if self._adopt is None else self._adopt(name, value)
        except BadInput as error:
            raise BadInput([f"{self._named(point)}: {problem}" for problem in error.problems]) from None
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        """Tells whether there is such a name, loaded or not."""
        return name in self.data or name in self._points

    def __iter__(self) -> Iterator[str]:
        """Yields our own names, then those of packages."""
        return iter(dict.fromkeys([*self.data, *self._points]))

    def __len__(self) -> int:
        """Counts the names."""
        return len({*self.data, *self._points})

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """The entry points of the group, by name."""
        from importlib.metadata import entry_points  # which the command line can do without until here

        points: dict[str, EntryPoint] = {}
        for point in sorted(entry_points(group=self._group), key=lambda point: point.name):
            other = points.get(point.name)
            if other is not None or point.name in self.data:
                whose = f"{self._named(other)} is one" if other is not None else "EvoMerge has one itself"
                raise BadInput(f"{self._named(point)}: the name is taken, {whose}")
            points[point.name] = point
        return points

    def _named(self, point: EntryPoint) -> str:
        package = point.dist.name if point.dist is not None else "an unknown package"
        return f"{self._group}: '{point.name}' of {package}"


def source_digest(function: Callable[..., Any]) -> str:
    """Hashes the file that a function was written in: what it computed is of no use to another version of it."""
    path = getattr(sys.modules.get(function.__module__), "__file__", None)
    return digest(Path(path).read_bytes()) if path else ""
