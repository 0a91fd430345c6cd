"""The route ``/mcp``: the Model Context Protocol over HTTP, if the extra ``mcp`` is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight import extras
from safelight.server.access import person_of
from safelight.server.problems import RefusedError
from safelight.server.sub_path import public_address
from safelight.settings import Settings

if TYPE_CHECKING:
    import httpx
    from mcp.server.mcpserver import MCPServer

PATH = "/mcp"

SESSION = "mcp-session-id"
"""The header that names a session. It belongs to the person who began it."""

WHO = ("authorization", "cookie")
"""The headers that say who sends a request."""

ADDRESS = "x-safelight-address"
"""A header that only this route sets: the server's address as the client knows it, for the URLs of images."""


class ProtocolRoute:
    """Serves the protocol. Its library takes a second to import, so that happens at the first request."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._inner: ASGIApp | None = None
        self._starting = asyncio.Lock()
        self._stop = asyncio.Event()
        self._persons: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises RefusedError without the extra."""
        async with self._starting:
            if self._inner is None and "mcp" not in extras.installed():
                raise RefusedError(404, "not_found", "the Model Context Protocol needs the extra mcp: safelight[mcp]")
            inner = self._inner or await self._start()
        person = person_of(HTTPConnection(scope)).name
        asked = Headers(scope=scope).get(SESSION)
        if asked is not None and self._persons.get(asked, person) != person:
            raise RefusedError(404, "not_found", "there is no such session")

        async def send_and_remember(message: Message) -> None:
            if message["type"] == "http.response.start":
                made = Headers(raw=message["headers"]).get(SESSION)
                if made is not None:
                    self._persons[made] = person
                if scope["method"] == "DELETE" and asked is not None and message["status"] < 300:
                    self._persons.pop(asked, None)
            await send(message)

        address = public_address(HTTPConnection(scope), self._settings)
        headers = [(name, value) for name, value in scope["headers"] if name != ADDRESS.encode()]
        headers.append((ADDRESS.encode(), address.encode()))
        await inner({**scope, "headers": headers}, receive, send_and_remember)

    async def stop(self) -> None:
        """End all sessions."""
        self._stop.set()
        if self._task is not None:
            await self._task

    async def _start(self) -> ASGIApp:
        from mcp.server.transport_security import TransportSecuritySettings

        server = self._server()
        # The application's own check of hosts, origins and the key comes before this route.
        security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        app: Any = server.streamable_http_app(streamable_http_path=PATH, transport_security=security)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(server, ready))
        await ready
        self._inner = app
        return app

    def _server(self) -> MCPServer:
        import httpx

        from safelight.server.mcp_tools import make_server

        def connect(caller: Mapping[str, str] | None) -> httpx.AsyncClient:
            # The tools call this server's own API, within this process, as the person who calls the tool.
            given = {name.lower(): value for name, value in (caller or {}).items()}
            headers = {name: given[name] for name in WHO if name in given}
            address = given.get(ADDRESS, "http://127.0.0.1")
            transport = httpx.ASGITransport(self._app)
            return httpx.AsyncClient(transport=transport, base_url=address, headers=headers, timeout=None)

        return make_server(connect, paths=False)

    async def _run(self, server: MCPServer, ready: asyncio.Future[None]) -> None:
        """Hold the sessions until :meth:`stop`. The same task must begin and end that."""
        async with server.session_manager.run():
            ready.set_result(None)
            await self._stop.wait()


def add_to(app: FastAPI, settings: Settings) -> ProtocolRoute:
    """Add the route."""
    route = ProtocolRoute(app, settings)
    app.router.routes.append(Route(PATH, route, methods=["GET", "POST", "DELETE"], include_in_schema=False))
    return route
