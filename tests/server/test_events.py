"""The stream of server-sent events: its lines, its comments while nothing happens, and its end."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.queue.events import Event, Events
from safelight.queue.person import LOCAL
from safelight.server import event_stream
from safelight.server.apis import native_jobs


def test_an_event_is_one_line_of_json() -> None:
    event = native_jobs._encode(Event("job", "a1", {"prompt": "red\napple\r国"}))
    kind, data, *rest = event.encode().decode().split("\n")
    assert kind == "event: job"
    assert json.loads(data.removeprefix("data: ")) == {"job": "a1", "prompt": "red\napple\r国"}
    assert rest == ["", ""]


def test_comments_show_that_the_connection_is_alive_and_a_closed_one_is_not_listened_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_stream, "ALIVE_SECONDS", 0.02)
    events = Events()
    control: Any = SimpleNamespace(events=events, database=None, dispatcher=None)
    sent: list[dict[str, Any]] = []

    async def client() -> None:
        left = asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if len(sent) == 3:
                events.tell(Event("memory", "", {"free": 1}))
            if b"memory" in message.get("body", b""):
                left.set()

        access = SimpleNamespace(still=lambda _: True)
        http: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(access=access)))
        answer = await native_jobs.JobRoutes(control).events(http, LOCAL)
        await answer({"type": "http", "method": "GET"}, receive, send)

    asyncio.run(asyncio.wait_for(client(), 10))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    bodies = [message["body"] for message in sent[1:]]
    assert bodies[:2] == [b": still here\n\n"] * 2
    assert b'event: memory\ndata: {"job": "", "free": 1}\n\n' in bodies
    assert not events._listeners
