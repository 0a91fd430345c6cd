"""Where the running server of a root listens: the server writes its address down, commands read it. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from safelight.errors import FileError
from safelight.files.disk import write_whole
from safelight.files.folder import read_json

_FILE = ".serving.json"

_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a server that listens at every address is reached from the same machine."""


@contextmanager
def announced(root: Path, host: str, port: int) -> Generator[None]:
    """Within the context, :func:`find` returns the address of this process's server. Raises UnreadableFileError."""
    process = psutil.Process()
    address = {"url": _url(host, port), "pid": process.pid, "started": process.create_time()}
    write_whole(root / _FILE, json.dumps(address).encode(), mode=0o600, wait=False)
    try:
        yield
    finally:
        (root / _FILE).unlink(missing_ok=True)


def find(root: Path) -> str | None:
    """Return the address of the server that serves ``root``, None if none runs.

    A server that was killed leaves its file. The process in it is gone, or is another one.
    """
    with contextlib.suppress(FileError, psutil.Error, KeyError, TypeError, ValueError):
        address = read_json(root / _FILE)
        process = psutil.Process(address["pid"])
        if process.create_time() == address["started"] and process.status() != psutil.STATUS_ZOMBIE:
            return str(address["url"])
    return None


def _url(host: str, port: int) -> str:
    reached = _EVERY_ADDRESS.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
