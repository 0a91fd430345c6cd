"""Clients that say once what they want and mean it for what they ask next, and whose options those are.

A client is told apart by the name that it gives (basic authentication), else by its connection. One that comes on a new
connection gets what its address set before, if all connections of that address agree; if they do not, it is asked to
name what it wants.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HTTPRequest

from safelight.server import auth
from safelight.server.problems import RefusedError

CHECKPOINT = "sd_model_checkpoint"

CLIENTS = 1000
"""Whose options are remembered; the one unheard for longest is forgotten first."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks. ``key`` tells clients apart. ``named``: it gave a name, so that its address says nothing about it."""

    key: str
    address: str
    named: bool


def client_of(http: HTTPRequest) -> Client:
    """The client of a request."""
    address = http.client.host if http.client is not None else ""
    name = http.headers.get("authorization", "")
    named = name.lower().startswith("basic ") and auth.given(http) is not None
    key = f"name {name}" if named else f"connection {http.scope.get('state', {}).get('connection', address)}"
    return Client(key, address, named)


class Clients:
    """Options by client. Safe to be used by several threads."""

    def __init__(self) -> None:
        self._set: OrderedDict[str, tuple[Client, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def options(self, client: Client) -> dict[str, Any]:
        """What the client has set."""
        with self._lock:
            if client.key in self._set:
                self._set.move_to_end(client.key)
            return dict(self._set.get(client.key, (client, {}))[1])

    def set(self, client: Client, options: dict[str, Any]) -> None:
        """Remember them, beside what it has set before. Who sets nothing takes nobody's place."""
        if not options:
            return
        with self._lock:
            before = self._set.get(client.key, (client, dict[str, Any]()))[1]
            self._set[client.key] = client, {**before, **options}
            self._set.move_to_end(client.key)
            while len(self._set) > CLIENTS:
                self._set.popitem(last=False)

    def option(self, client: Client, name: str) -> Any:
        """What holds for a client: what it has set, else what its address has; None for nothing. Raises RefusedError
        when its address has set several on connections of which none is this one."""
        own = self.options(client).get(name)
        if own is not None or client.named:
            return own
        with self._lock:
            others = {
                options[name]
                for other, options in self._set.values()
                if not other.named and other.address == client.address and name in options
            }
        if len(others) > 1:
            chosen = ", ".join(sorted(map(str, others)))
            message = (
                f"several clients at this address chose different {name} ({chosen}), and this connection is of none "
                f"of them; give override_settings.{name}, or give each client a user name"
            )
            raise RefusedError(
                409, "which_model" if name == CHECKPOINT else "which_option", message, "override_settings"
            )
        return next(iter(others), None)
