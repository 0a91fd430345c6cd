"""Serves the page: static files that speak to the native API, as any client could.

Each address that the page shows (``/gallery/IMAGE``) gets the same document; its script reads the address.
"""

from __future__ import annotations

import mimetypes
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from safelight.server.page import documentation

FILES = Path(__file__).with_name("static")

PREFIX = "/page"
"""The path of the page's own files."""

VIEWS = ("canvas", "gallery", "compare", "models", "settings")

HEADERS = {
    # Nothing comes from another host, nothing in a document is run, and nothing frames the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The browser asks each time whether a file has changed, because another version may run by now.
    "Cache-Control": "no-cache",
}


class _PageFiles(StaticFiles):
    """The page's files, with its headers."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        answer = super().file_response(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        answer.headers.update(HEADERS)
        return answer


def mount(app: FastAPI, root_path: str = "") -> None:
    """Add the page to the application. ``root_path``: the path at which a proxy shows the server."""
    # Some systems say otherwise, and a browser runs no script of another type.
    mimetypes.add_type("text/javascript", ".js")
    documentation.mount(app)
    app.mount(PREFIX, _PageFiles(directory=FILES), name="page")
    text = (FILES / "index.html").read_text().replace(f'"{PREFIX}/', f'"{root_path}{PREFIX}/')

    async def document(_: Request) -> Response:
        return HTMLResponse(text, headers=HEADERS)

    for path in ("/", *(f"/{view}" for view in VIEWS), *(f"/{view}/{{item:path}}" for view in ("gallery", "models"))):
        app.add_route(path, document, methods=["GET", "HEAD"], include_in_schema=False)
