"""``safelight serve``: runs the server."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from safelight import extras, logs
from safelight.cli.common import RootOption, loaded
from safelight.errors import InputError

if TYPE_CHECKING:
    from safelight.assembly.services import Services

EXAMPLES = "Example: `safelight serve`, then http://127.0.0.1:9090 in the browser"

KEEP_ALIVE_SECONDS = 600
"""Seconds. Long, because the server recognises an AUTOMATIC1111 client that set a model by its connection."""


def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 9090 by default, 0 for a free one.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Clients must send this key. Required unless the address is this machine's own.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Compute on the machines of a Ray cluster: its head's address, or auto for this machine's."),
    ] = None,
    root: RootOption = None,
) -> None:
    """Run the server: the page, and the HTTP APIs of Safelight, OpenAI and AUTOMATIC1111."""
    extras.require("server", "`safelight serve`")
    sources = loaded(context, root, host=host, port=port, api_key=api_key)
    settings = sources.settings
    bound = _listening_socket(settings.host, settings.port)

    import uvicorn

    from safelight.assembly.services import open_services
    from safelight.server import app
    from safelight.server.connections import Numbered
    from safelight.server.page import routes
    from safelight.workers.running_server import announced

    logs.to_stderr(settings.log_format)
    control = open_services(settings, sources, cluster or "")
    try:
        _check_protection(control)
    except BaseException:
        control.stop()
        raise
    application = app.create(control)
    routes.mount(application, settings.root_path)
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    typer.echo(f"Safelight is at http://{name}:{bound.getsockname()[1]} (Ctrl-C stops it)")
    config = uvicorn.Config(
        application,
        http=Numbered,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        server_header=False,
        forwarded_allow_ips=list(settings.forwarded_allow_ips),
    )
    server = uvicorn.Server(config)

    def stop(number: int, frame: object) -> None:
        # uvicorn has a handler of its own while it runs. This one counts before that: the server then starts and ends.
        # After its shutdown uvicorn raises the signal again, which changes nothing, because stopping is not an error.
        del number, frame
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with announced(settings.root, settings.host, bound.getsockname()[1]):
        server.run(sockets=[bound])


def _check_protection(control: Services) -> None:
    """Raise InputError if other machines could use the server without a key or a person, or if it has both."""
    from safelight.server.auth import is_loopback

    settings, people = control.settings, control.database.people.any()
    if people and settings.api_key is not None:
        problem = "this server knows people, who have keys of their own; remove the setting api_key"
        raise InputError(f"api_key: {problem} (`safelight users list` names the people)")
    if not is_loopback(settings.host) and not people and settings.api_key is None:
        raise InputError(
            f"--host {settings.host}: other machines can reach this address, so it requires --api-key KEY, or people "
            "(`safelight users add NAME --role admin`)"
        )


def _listening_socket(host: str, port: int) -> socket.socket:
    """Open a socket bound to the address. Raises InputError if that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error
    return bound
