"""APIs that installed packages add (group ``safelight.apis``)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from fastapi import APIRouter

from safelight.assembly.services import Services
from safelight.extensions import Extensible, extensions, function
from safelight.logs import Log

_log = Log(__name__)

GROUP = "safelight.apis"
APIS: Extensible[Callable[[Services], APIRouter]] = Extensible({}, GROUP, function)


def routers(control: Services, taken: Collection[str]) -> Iterator[APIRouter]:
    """Yield the routers of all packages. Log a warning for a package that fails; the server works without it.

    ``taken``: path prefixes that belong to others. The yielded routers have different ones.
    """
    first_parts = {_first_part(path) for path in taken}
    for name, make in APIS.usable():
        try:
            router = make(control)
            if not isinstance(router, APIRouter):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"returned a {type(router).__name__}, not an APIRouter")
            first = _first_part(router.prefix)
            if not first or first in first_parts:
                raise ValueError(f"its router needs a prefix of its own; {router.prefix!r} belongs to another API")
        except Exception as error:  # noqa: BLE001 - a package's code can raise anything
            _log.warning(str(extensions(GROUP).error(name, error)))
            continue
        first_parts.add(first)
        yield router


def _first_part(path: str) -> str:
    return path.strip("/").partition("/")[0]
