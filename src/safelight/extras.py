"""The extras: packages that only some commands need. ``docs/installing.md`` says which command needs which extra."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from safelight.errors import MissingExtraError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "cluster": ("ray",),
    "compiled": ("numba",),
    "mcp": ("mcp",),
    "postgres": ("psycopg",),
    "preprocess": ("cv2",),
    "samplers": ("torchsde",),
    "server": (
        *("alembic", "argon2", "fastapi", "limits", "prometheus_client", "python_multipart", "sqlalchemy"),
        *("sse_starlette", "uvicorn"),
    ),
}
"""The modules of each extra that ``pyproject.toml`` declares."""


def require(extra: str, what: str) -> None:
    """Raise MissingExtraError if a module of an extra is not installed. Nothing is imported.

    ``what``: what needs the extra, the subject of the message.
    """
    missing = [module for module in EXTRAS[extra] if not _is_there(module)]
    if missing:
        raise MissingExtraError(what, extra, missing, _command(extra))


def installed() -> tuple[str, ...]:
    """Return the names of the extras whose modules are all installed."""
    return tuple(extra for extra, modules in EXTRAS.items() if all(map(_is_there, modules)))


def _is_there(module: str) -> bool:
    return sys.modules.get(module) is not None or find_spec(module) is not None


def _command(extra: str) -> str:
    """Return the command that installs an extra."""
    source, options = _source()
    words = (sys.executable, "-m", "pip", "install", *options, f"{source}[{extra}]")
    return shlex.join(words)


def _source() -> tuple[str, tuple[str, ...]]:
    """Return where Safelight came from, as its installer recorded it (PEP 610), and pip's options for this source.

    A name alone is not a source: an index may have somebody else's package of that name.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        recorded = distribution("safelight").read_text("direct_url.json")
    except PackageNotFoundError:
        recorded = None
    if not recorded:
        return "PATH-OF-SAFELIGHT", ()
    values = json.loads(recorded)
    parts = urlsplit(values["url"])
    source = str(Path(unquote(parts.path))) if parts.scheme == "file" else values["url"]
    return source, ("-e",) if values.get("dir_info", {}).get("editable") else ()
