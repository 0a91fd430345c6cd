"""All families: those in this package's folders, and those of installed packages (entry points ``safelight.families``).

Each folder has a ``spec.py`` with ``FAMILIES``, a tuple. An entry point names such a tuple.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType

from safelight import families as package
from safelight.extensions import Extensible, instance_of
from safelight.families.family import Config, Family

GROUP = "safelight.families"


@cache
def families() -> Mapping[str, Family]:
    """Return every family by its name. Families of this package come first, in the order of their folders' names.

    A package that does not load is left out, with a warning in the log.
    Raises ValueError if two families have the same name.
    """
    found: dict[str, Family] = {}
    for family in _all():
        if found.setdefault(family.name, family) is not family:
            raise ValueError(f"two families are named {family.name}")
    return MappingProxyType(found)


def _all() -> Iterator[Family]:
    for folder in sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg):
        yield from importlib.import_module(f"{package.__name__}.{folder}.spec").FAMILIES
    added = Extensible[tuple[Family, ...]]({}, GROUP, instance_of(tuple))
    for _, some in added.usable():
        yield from some


def family(name: str) -> Family:
    """Return the family of that name. Raises KeyError."""
    return families()[name]


@cache
def architectures() -> Mapping[str, type[Config]]:
    """Return the class of every component's settings, by its name in records."""
    found: dict[str, type[Config]] = {}
    for one in families().values():
        for config in one.architectures:
            if found.setdefault(config.architecture, config) is not config:
                raise ValueError(f"two architectures are named {config.architecture}")
    return MappingProxyType(found)
