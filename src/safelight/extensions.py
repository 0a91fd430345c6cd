"""Finds what installed packages add: samplers, preprocessors, and so on. ``docs/extending.md`` describes each group.

A package declares an entry point. Its group says what it adds, its name is the name that requests use. Nothing is
loaded before it is used: reading the entry points of all packages takes some milliseconds, and importing a package may
take seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from safelight.errors import ExtensionError
from safelight.logs import Log

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")

_log = Log(__name__)


class Extensions(Mapping[str, Any]):
    """What the installed packages add to a group, by name. Looking a name up loads it.

    Looking up raises KeyError for an unknown name, and ExtensionError when two packages have the name or the package
    does not load.
    """

    def __init__(self, group: str, entries: Collection[EntryPoint]) -> None:
        self._group = group
        self._entries: dict[str, list[EntryPoint]] = {}
        self._loaded: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._failed: dict[str, ExtensionError] = {}
        for entry in entries:
            self._entries.setdefault(entry.name, []).append(entry)

    def __getitem__(self, name: str) -> Any:
        if name in self._failed:
            raise self._failed[name]
        if name not in self._loaded:
            entries = self._entries[name]
            if len(entries) > 1:
                raise ExtensionError(self._group, name, self.package(name), "two packages have this name; remove one")
            try:
                self._loaded[name] = entries[0].load()
            except Exception as error:
                self._failed[name] = self.error(name, error)
                raise self._failed[name] from error
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def package(self, name: str) -> str:
        """Return the package of an extension with its version. Several packages are joined by "and"."""
        entries = self._entries[name]
        return " and ".join(f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?" for entry in entries)

    def error(self, name: str, error: Exception) -> ExtensionError:
        """Return the error that says that an extension failed with ``error``."""
        problem = f"failed with {type(error).__name__}: {error}"
        return ExtensionError(self._group, name, self.package(name), problem)

    def warn(self, name: str, error: ExtensionError) -> None:
        """Log an error, once for each name."""
        if name not in self._warned:
            self._warned.add(name)
            _log.warning(str(error))


@cache
def extensions(group: str) -> Extensions:
    """Return what the installed packages add to a group. It is read once for each process, and loads nothing."""
    # The import takes 40 ms, and most commands never look a package up.
    from importlib.metadata import entry_points

    return Extensions(group, entry_points(group=group))


class Extensible(Mapping[str, T], Generic[T]):
    """Built-in values by name, followed by those of installed packages.

    A built-in name is looked up without reading the installed packages. If a package has the name of a built-in value,
    the built-in value counts. Iterating yields all names and loads nothing.

    ``builtin``: the built-in values.
    ``group``: the group of entry points.
    ``read``: makes a value of this table from what a package gives. It raises TypeError if that has the wrong type.
    """

    def __init__(self, builtin: Mapping[str, T], group: str, read: Callable[[Any], T]) -> None:
        self.builtin = builtin
        self.group = group
        self._read = read

    def __getitem__(self, name: str) -> T:
        if name in self.builtin:
            return self.builtin[name]
        found = extensions(self.group)
        given = found[name]
        try:
            return self._read(given)
        except TypeError as error:
            raise found.error(name, error) from error

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.builtin or name in extensions(self.group))

    def __iter__(self) -> Iterator[str]:
        yield from self.builtin
        yield from (name for name in extensions(self.group) if name not in self.builtin)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return bool(self.builtin) or bool(extensions(self.group))

    def package(self, name: str) -> str:
        """Return the package that adds a name, with its version. It is empty for built-in names."""
        return "" if name in self.builtin else extensions(self.group).package(name)

    def usable(self) -> Iterator[tuple[str, T]]:
        """Yield (name, value) of the built-in values, then of each extension that loads. Warn once of each other."""
        for name in self:
            try:
                yield name, self[name]
            except ExtensionError as error:
                extensions(self.group).warn(name, error)


def instance_of(kind: type[T]) -> Callable[[Any], T]:
    """Return a function that returns its argument if it is a ``kind``, and raises TypeError otherwise."""

    def check(given: Any) -> T:
        if not isinstance(given, kind):
            raise TypeError(f"must be a {kind.__name__}, not a {type(given).__name__}")
        return given

    return check


def function(given: Any) -> Callable[..., Any]:
    """Return a function unchanged. Raises TypeError for anything else."""
    if not callable(given):
        raise TypeError(f"must be a function, not a {type(given).__name__}")
    return given


def by_reference(reference: str) -> Any:
    """Import the object of a reference such as ``package.module:name``. Raises ImportError or AttributeError."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
