"""The HTTP application: its APIs, the access check, and the answers to errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from safelight.assembly.services import Services
from safelight.logs import Log
from safelight.server import access, bridge, mcp_route, problems, rights
from safelight.server.apis import a1111, added, native, openai
from safelight.server.gate import Gate
from safelight.server.metrics import Metrics
from safelight.server.problems import Problem
from safelight.server.sub_path import SubPath
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
    protocol = mcp_route.add_to(app, control.settings)
    app.state.access = access.Access(control.settings, control.database)
    app.add_middleware(Gate, control=control, access=app.state.access)
    if control.settings.root_path:
        app.add_middleware(SubPath, root_path=control.settings.root_path)
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
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    operation["x-role"] = rights.rule_of(method.upper(), path).role or "open"
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe
    return app


APIS = ("/api", "/v1", "/sdapi", "/controlnet", "/internal", "/mcp", "/docs", "/redoc", "/openapi.json", "/metrics")
"""Paths of the built-in APIs; the page has no path below them."""

PAGE = "/page"
"""The path of the page's own files."""
