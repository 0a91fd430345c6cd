"""Serves the documentation site, so that the page links into it. ``make docs`` builds it, and a release contains it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

PREFIX = "/help"

_PACKAGED = Path(__file__).with_name("help")
_CHECKOUT = Path(__file__).parents[4]

_INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def site() -> Path | None:
    """Return the folder of the site: of this package, or where ``make docs`` built it in a checkout. None if there is
    none."""
    built = _CHECKOUT / "build/site" if (_CHECKOUT / "mkdocs.yml").is_file() else _PACKAGED
    return next((folder for folder in (_PACKAGED, built) if (folder / "index.html").is_file()), None)


def policy(text: str) -> str:
    """Return the content security policy of a document: its own scripts are allowed, each by its hash.

    ``text``: the document.
    """
    digests = [hashlib.sha256(script.encode()).digest() for script in _INLINE.findall(text)]
    hashes = "".join(f" 'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'self'{hashes}; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )


class _Site(StaticFiles):
    def file_response(self, *args: object, **kwargs: object) -> Response:
        answer = super().file_response(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        path = Path(str(args[0]))
        if path.suffix == ".html" and answer.status_code == 200:
            text = path.read_text()
            answer = HTMLResponse(text, headers={"Content-Security-Policy": policy(text)})
        answer.headers.update({"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})
        return answer


def mount(app: FastAPI) -> None:
    """Add the site to the application, if there is one."""
    if (folder := site()) is not None:
        app.mount(PREFIX, _Site(directory=folder, html=True), name="help")
