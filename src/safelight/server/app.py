"""The HTTP application: its APIs, the access check, and the answers to errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight.assembly.services import Services
from safelight.logs import Log
from safelight.server import auth, bridge, mcp_route, problems
from safelight.server.apis import a1111, added, native, openai
from safelight.server.metrics import Metrics
from safelight.server.problems import Problem
from safelight.version import VERSION

_log = Log(__name__)

DESCRIPTION = """Images from Stable Diffusion checkpoints. The same request gives the same pixels, whichever images came
before. `/api/v1` is Safelight's own API, `/v1` is OpenAI's, and `/sdapi/v1` is AUTOMATIC1111's. `/mcp` serves the Model
Context Protocol."""


def create(control: Services) -> FastAPI:
    """Create the application for an open ``control``; the application starts and stops it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await bridge.run(control.start)
        try:
            yield
        finally:
            await protocol.stop()
            await bridge.run(control.stop)

    app = FastAPI(
        title="Safelight",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )
    problems.install(app)
    for router in (native.router(control), openai.router(control), a1111.router(control), Metrics(control).router()):
        app.include_router(router)
    more = list(added.routers(control, (*APIS, PAGE)))
    for router in more:
        app.include_router(router)
    app.state.apis = (*APIS, *(router.prefix for router in more))
    protocol = mcp_route.add_to(app, control)
    app.add_middleware(_Gate, control=control)
    if control.settings.allow_origins:
        # It answers the browser's question before a request, which has no key, so it comes before the gate.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(control.settings.allow_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            allow_credentials=True,
        )

    def describe() -> dict[str, object]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
            schema["components"]["schemas"] |= problems.schemas(Problem, openai.OpenAIError, a1111.A1111Error)
            schema["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            }
            schema["security"] = [{}, {"bearer": []}, {"basic": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe
    return app


def _unknown(scope: Scope) -> tuple[int, Problem] | None:
    """Return the error for a path below an API that has no route, or none with this method.

    Without this check the framework would answer such a request in a form of its own.
    """
    path: str = scope["path"]
    if not any(path == api or path.startswith(f"{api}/") for api in scope["app"].state.apis):
        return None
    # Mounted parts match every path below them.
    found = {route.matches(scope)[0] for route in scope["app"].routes if not isinstance(route, Mount)}
    if Match.FULL in found:
        return None
    if Match.PARTIAL in found:
        return 405, Problem(error="method_not_allowed", message=f"{path} does not support {scope.get('method')}")
    return 404, Problem(error="not_found", message=f"there is no {path}")


APIS = ("/api", "/v1", "/sdapi", "/controlnet", "/internal", "/mcp", "/docs", "/redoc", "/openapi.json", "/metrics")
"""Paths of the built-in APIs; the page has no path below them."""

PAGE = "/page"
"""The path of the page's own files."""


def _is_html(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in headers)


class _Gate:
    """The access check, which comes before all routes: pages of other sites, the API key, and the size of the body."""

    def __init__(self, app: ASGIApp, control: Services) -> None:
        self._app = app
        key = control.settings.api_key
        self._key = key.get_secret_value() if key is not None else None
        self._sessions = auth.Sessions(control.settings.root, self._key) if self._key is not None else None
        self._max_bytes = control.settings.max_body_bytes
        self._origins = control.settings.allow_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        refusal = self._refuse(connection) or _unknown(scope)
        if refusal is not None:
            status, problem = refusal
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": problem.message[:100]})
                return
            headers = {"WWW-Authenticate": "Basic"} if status == 401 else None
            await problems.answer(connection.url.path, status, problem, headers)(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    # FastAPI passes this exception on; it would report any other as an unreadable body.
                    raise HTTPException(413, self._too_large().message)
            return message

        async def send_with_cookie(message: Message) -> None:
            starts = message["type"] == "http.response.start"
            if self._sessions is not None and starts and _is_html(message["headers"]):
                # A browser does not send the key with the page's own requests and websocket, but it sends the cookie.
                cookie = f"{auth.COOKIE}={self._sessions.token()}; HttpOnly; SameSite=Strict; Path=/"
                cookie += f"; Max-Age={auth.SESSION_SECONDS}" + ("; Secure" if auth.secure(connection) else "")
                message["headers"] = [*message["headers"], (b"set-cookie", cookie.encode())]
            await send(message)

        await self._app(scope, receive_limited, send_with_cookie)

    def _refuse(self, connection: HTTPConnection) -> tuple[int, Problem] | None:
        foreign = auth.from_elsewhere(connection, self._key, self._origins)
        if foreign is not None:
            return 403, Problem(error="forbidden", message=foreign)
        if not auth.allowed(connection, self._key, self._sessions):
            message = "this server needs its API key, as a bearer token or as the password of basic authentication"
            return 401, Problem(error="unauthorized", message=message)
        length = connection.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            return 413, self._too_large()
        return None

    def _too_large(self) -> Problem:
        return Problem(error="too_large", message=f"the body may have at most {self._max_bytes} bytes (max_body_bytes)")
