"""All families: those in this package's folders, and those of installed packages (entry points ``safelight.families``).

Each folder has a ``spec.py`` with ``FAMILIES``, a tuple. An entry point names such a tuple.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType

from safelight import families as package
from safelight.errors import ExtensionError
from safelight.extensions import Extensible, extensions, instance_of
from safelight.families.components import Config
from safelight.families.family import Family

GROUP = "safelight.families"


@cache
def families() -> Mapping[str, Family]:
    """Return every family by its name. Families of this package come first, in the order of their folders' names.

    A package that does not load, or whose family or architecture has a name that is taken, is left out with a warning
    in the log.
    """
    found: dict[str, Family] = {}
    for folder in sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg):
        if find_spec(f"{package.__name__}.{folder}.spec") is None:
            # ``parts``: what families share.
            continue
        own: tuple[Family, ...] = importlib.import_module(f"{package.__name__}.{folder}.spec").FAMILIES
        found |= {family.name: family for family in own}
    added = Extensible[tuple[Family, ...]]({}, GROUP, instance_of(tuple))
    for name, some in added.usable():
        problem = _clash([*found.values(), *some])
        if problem is None:
            found |= {family.name: family for family in some}
        else:
            extensions(GROUP).warn(name, ExtensionError(GROUP, name, added.package(name), problem))
    return MappingProxyType(found)


def _clash(some: Sequence[Family]) -> str | None:
    """Return which name two families or two architectures have; None if there is none."""
    names = [family.name for family in some]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return f"the family name {twice} is taken"
    known: dict[str, type[Config]] = {}
    for family in some:
        for config in family.architectures:
            if known.setdefault(config.architecture, config) is not config:
                return f"the architecture name {config.architecture} is taken"
    return None


def family(name: str) -> Family:
    """Return the family of that name. Raises KeyError."""
    return families()[name]


@cache
def architectures() -> Mapping[str, type[Config]]:
    """Return the class of every component's settings, by its name in records."""
    return MappingProxyType({c.architecture: c for family in families().values() for c in family.architectures})
