"""Answers with a stream of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse

ALIVE_SECONDS = 15
"""Seconds between two comments in a stream of events. They show clients that the connection is alive."""

LINE_END = "\n"
"""The end of a line in a stream of events."""


def event(name: str, data: str) -> ServerSentEvent:
    """Return an event. ``data``: JSON."""
    return ServerSentEvent(data, event=name, sep=LINE_END)


def answer(events: AsyncIterator[ServerSentEvent]) -> EventSourceResponse:
    """Return the answer that sends events as they come."""
    return EventSourceResponse(events, ping=ALIVE_SECONDS, ping_message_factory=_still_here, sep=LINE_END)


def _still_here() -> ServerSentEvent:
    return ServerSentEvent(comment="still here", sep=LINE_END)
