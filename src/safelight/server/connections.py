"""Numbers for connections, by which the server recognises a client that has no user name."""

from __future__ import annotations

import itertools
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_numbers = itertools.count(1)


class Numbered(H11Protocol):
    """Give each connection a unique number, ``scope["state"]["connection"]``.

    Address and port do not suffice, because a later connection can have the same.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": next(_numbers)}
