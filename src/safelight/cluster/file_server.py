"""Serves the files of models to the machines of a cluster, in ranges, and nothing else."""

from __future__ import annotations

import hmac
import os
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

CERTIFICATE, KEY, AUTHORITY = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"
"""Ray's own variables for TLS. If they are set, these files travel over TLS, too."""


class FileServer:
    """Serves files that were allowed, to clients that send a token. ``host``: the address that machines reach."""

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        self._allowed: set[str] = set()
        self._lock = threading.Lock()
        bound = socket.socket()
        bound.bind((host, 0))
        secure = tls()
        self.url = f"{'https' if secure else 'http'}://{host}:{bound.getsockname()[1]}"
        app = Starlette(routes=[Route("/file", self._file, methods=["GET"])])
        more = {"ssl_certfile": os.environ[CERTIFICATE], "ssl_keyfile": os.environ[KEY]} if secure else {}
        config = uvicorn.Config(app, log_level="warning", server_header=False, **more)  # pyright: ignore[reportArgumentType]
        self._server = uvicorn.Server(config)
        # In another thread than the main one, uvicorn leaves signals alone.
        self._thread = threading.Thread(
            target=self._server.run, args=([bound],), name="safelight-cluster-files", daemon=True
        )
        self._thread.start()

    def allow(self, paths: Iterable[str]) -> None:
        """Let machines fetch these files."""
        with self._lock:
            self._allowed.update(paths)

    def stop(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(10)

    async def _file(self, request: Request) -> Response:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), self._token.encode()):
            return Response("the token is wrong", 401)
        path = request.query_params.get("path", "")
        with self._lock:
            allowed = path in self._allowed
        if not allowed or not Path(path).is_file():
            return Response("there is no such file", 404)
        return FileResponse(path)


def tls() -> bool:
    """Return whether Ray uses TLS, by its own variables."""
    return os.environ.get("RAY_USE_TLS", "0") == "1" and CERTIFICATE in os.environ and KEY in os.environ
