"""The options of each client. A1111's clients set an option once, and expect it to hold for their next requests.

A client is identified by its user name (basic authentication), or else by its connection. A new connection gets the
options that earlier connections from its address have set, if those agree. If they differ, the server answers with an
error that asks the client to name its choice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HTTPRequest

from safelight.server import auth
from safelight.server.access import person_of
from safelight.server.problems import RefusedError

CHECKPOINT = "sd_model_checkpoint"

CLIENTS = 1000
"""Clients whose options are stored; the least recently used is removed first."""


@dataclass(frozen=True, slots=True)
class Client:
    """The client of an HTTP request.

    ``key``: the client's identity: its user name, or its connection.
    ``address``: from which it connects.
    ``person``: who sends its requests.
    ``named``: it has a user name; then options from its address do not apply to it.
    """

    key: str
    address: str
    person: str
    named: bool


def client_of(http: HTTPRequest) -> Client:
    """Return the client of an HTTP request."""
    address = http.client.host if http.client is not None else ""
    person = person_of(http).name
    name = http.headers.get("authorization", "")
    named = name.lower().startswith("basic ") and auth.given(http) is not None
    connection = http.scope.get("state", {}).get("connection", address)
    key = f"{person} name {name}" if named else f"{person} connection {connection}"
    return Client(key, address, person, named)


class Clients:
    """The options by client. Several threads may use it."""

    def __init__(self) -> None:
        self._set: OrderedDict[str, tuple[Client, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def options(self, client: Client) -> dict[str, Any]:
        """Return the options that the client has set."""
        with self._lock:
            if client.key in self._set:
                self._set.move_to_end(client.key)
            return dict(self._set.get(client.key, (client, {}))[1])

    def set(self, client: Client, options: dict[str, Any]) -> None:
        """Add to the options of a client. Empty options are not stored, so that they evict no other client."""
        if not options:
            return
        with self._lock:
            before = self._set.get(client.key, (client, dict[str, Any]()))[1]
            self._set[client.key] = client, {**before, **options}
            self._set.move_to_end(client.key)
            while len(self._set) > CLIENTS:
                self._set.popitem(last=False)

    def option(self, client: Client, name: str) -> Any:
        """Return the value that the client has set, or else the one from its address, or else None.

        Raises RefusedError when other connections from its address have set different values.
        """
        own = self.options(client).get(name)
        if own is not None or client.named:
            return own
        with self._lock:
            others = {
                options[name]
                for other, options in self._set.values()
                if not other.named
                and (other.address, other.person) == (client.address, client.person)
                and name in options
            }
        if len(others) > 1:
            chosen = ", ".join(sorted(map(str, others)))
            message = (
                f"several clients at this address have set different {name} ({chosen}), and this connection has set "
                f"none; send override_settings.{name}, or give each client a user name"
            )
            raise RefusedError(
                409, "which_model" if name == CHECKPOINT else "which_option", message, "override_settings"
            )
        return next(iter(others), None)
