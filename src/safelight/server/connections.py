"""Connections that can be told apart, for clients that say something once and mean it for what they ask next."""

from __future__ import annotations

import itertools
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_numbers = itertools.count(1)


class Numbered(H11Protocol):
    """Gives each connection a number of its own: ``scope["state"]["connection"]``; addresses and ports come again."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": next(_numbers)}
