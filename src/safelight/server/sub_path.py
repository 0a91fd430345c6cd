"""A server that a proxy shows at a path of its own, such as ``https://example.org/safelight``."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from safelight.settings import Settings


class SubPath:
    """Removes the server's own path from requests. A proxy may have removed it already."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, without the server's own path."""
        path: str = scope.get("path", "")
        if path == self._root_path or path.startswith(f"{self._root_path}/"):
            raw = scope["raw_path"].removeprefix(self._root_path.encode()) or b"/"
            scope = {**scope, "path": path.removeprefix(self._root_path) or "/", "raw_path": raw}
        await self._app(scope, receive, send)


def public_address(connection: HTTPConnection, settings: Settings) -> str:
    """Return the server's address as its client knows it, without a slash at its end."""
    return f"{str(connection.base_url).rstrip('/')}{settings.root_path}"
