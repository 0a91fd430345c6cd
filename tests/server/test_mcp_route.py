"""A session of the Model Context Protocol belongs to the person who began it, until it ends."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from safelight.queue.person import Person
from safelight.server.access import SCOPE
from safelight.server.mcp_route import SESSION, ProtocolRoute
from safelight.server.problems import RefusedError
from safelight.settings import Settings


async def library(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as the protocol's library does: a POST without a session begins one."""
    begins = scope["method"] == "POST" and SESSION not in Request(scope).headers
    await Response(headers={SESSION: "one"} if begins else {})(scope, receive, send)


def test_a_session_is_of_one_person_and_is_forgotten_when_it_ends() -> None:
    async def run() -> None:
        route = ProtocolRoute(FastAPI(), Settings())
        route._inner = library

        async def ask(method: str, name: str, session: str = "") -> None:
            async def send(message: Message) -> None:
                del message

            async def receive() -> Message:
                return {"type": "http.request", "body": b""}

            headers = [(SESSION.encode(), session.encode())] if session else []
            scope = {
                "type": "http",
                "method": method,
                "path": "/mcp",
                "server": ("127.0.0.1", 9090),
                "headers": headers,
                SCOPE: Person(name, "member"),
            }
            await route(scope, receive, send)

        await ask("POST", "ann")
        await ask("POST", "ann", "one")
        with pytest.raises(RefusedError, match="no such session"):
            await ask("DELETE", "bob", "one")
        assert route._persons == {"one": "ann"}
        await ask("DELETE", "ann", "one")
        assert route._persons == {}

    asyncio.run(run())
