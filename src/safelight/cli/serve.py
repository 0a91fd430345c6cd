"""``safelight serve``: the server."""

from __future__ import annotations

import signal
import socket
from typing import Annotated

import typer

from safelight import logs
from safelight.cli.common import RootOption, loaded
from safelight.errors import InputError

EXAMPLES = "Example: `safelight serve`, then http://127.0.0.1:9090 in the browser"

KEEP_ALIVE_SECONDS = 600
"""An AUTOMATIC1111 client that set a model is known by its connection."""


def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 9090 by default, 0 for a free one.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Who asks must give it; needed for other addresses than this machine's own.")
    ] = None,
    root: RootOption = None,
) -> None:
    """Run the server: the page, and the HTTP APIs of Safelight, OpenAI and AUTOMATIC1111."""
    settings = loaded(context, root, host=host, port=port, api_key=api_key).settings
    from safelight.server.auth import is_loopback

    if not is_loopback(settings.host) and settings.api_key is None:
        raise InputError(f"--host {settings.host}: others can reach it there, so it needs --api-key KEY")
    bound = _bound(settings.host, settings.port)

    import uvicorn

    from safelight.assemble.serving import open_control
    from safelight.server import app
    from safelight.server.connections import Numbered
    from safelight.web import page

    logs.to_stderr(settings.log_format)
    control = open_control(settings)
    made = app.create(control)
    page.mount(made, control)
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    typer.echo(f"Safelight is at http://{name}:{bound.getsockname()[1]} (Ctrl-C stops it)")
    config = uvicorn.Config(
        made,
        http=Numbered,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    # After it has shut down, uvicorn raises the signal again; being stopped is what a server is asked for.
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, _said)
    uvicorn.Server(config).run(sockets=[bound])


def _said(number: int, frame: object) -> None:
    del number, frame


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises InputError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error
    return made
