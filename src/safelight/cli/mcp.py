"""``safelight mcp``: the tools of the Model Context Protocol over standard input and output."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from safelight import extras
from safelight.cli.common import RootOption, loaded
from safelight.errors import InputError

if TYPE_CHECKING:
    import httpx

    from safelight.settings import Settings

EXAMPLES = "Example, in a client's settings: `safelight mcp` as the command"

START_SECONDS = 120.0
"""A server that does not listen after this time is an error."""


def mcp(
    context: typer.Context,
    server: Annotated[
        str | None,
        typer.Option(
            help="Address of a running server; by default that of the same root, or one that this command starts.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SAFELIGHT_API_KEY", help="The server's API key.")] = None,
    root: RootOption = None,
) -> None:
    """Serve the Model Context Protocol to a program that starts this command: generate, edit, list models, describe.

    A running server has the same tools at /mcp.
    """
    for extra in ("server", "mcp"):
        extras.require(extra, "`safelight mcp`")
    settings = loaded(context, root).settings
    if server is not None and not server.startswith(("http://", "https://")):
        raise InputError(f"--server {server}: must be an address such as http://127.0.0.1:9090")
    import httpx

    from safelight.server.mcp_tools import make_server

    known = settings.api_key.get_secret_value() if settings.api_key is not None else None
    key = api_key or known
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with _server(settings, server) as url:

        def connect(_: Mapping[str, str] | None) -> httpx.AsyncClient:
            return httpx.AsyncClient(base_url=url, headers=headers, timeout=300.0, trust_env=False)

        make_server(connect, paths=True).run()


@contextmanager
def _server(settings: Settings, url: str | None) -> Generator[str]:
    """Yield the address of the server: the one that was named, the running one, or one for the time of the context."""
    from safelight.workers.running_server import find

    found = url or find(settings.root)
    if found is not None:
        yield found.rstrip("/")
        return
    # Standard output belongs to the protocol.
    command = [sys.executable, "-m", "safelight.cli", "serve", "--port", "0", "--root", str(settings.root)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        until = time.monotonic() + START_SECONDS
        while (started := find(settings.root)) is None or not _answers(started):
            if process.poll() is not None:
                raise InputError(f"the server ended with exit code {process.returncode} when it started")
            if time.monotonic() > until:
                raise InputError(f"the server did not start within {START_SECONDS:.0f} seconds")
            time.sleep(0.1)
        yield started
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    """Return whether a server accepts connections. It writes its address down just before it does."""
    import httpx

    try:
        return httpx.get(f"{url}/api/v1/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False
