"""Who sends a request: a person with a session or a key, or the one user of a server that knows no people."""

from __future__ import annotations

import hmac
import secrets
from typing import Annotated

from fastapi import Depends
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import HTTPConnection

from safelight.queue.database import Database
from safelight.queue.person import LOCAL, Person
from safelight.server import auth
from safelight.server.passwords import is_password
from safelight.server.problems import RefusedError
from safelight.settings import Settings

SCOPE = "safelight.person"
"""The key of the ASGI scope under which the access check stores who sends the request."""

DETAIL = "safelight.detail"
"""The key of the ASGI scope under which a route stores what the audit log says besides method and path."""

OF_NAME = RateLimitItemPerMinute(10, 5)
"""Tries to log in with one name from one address, since the last one that succeeded."""

OF_ADDRESS = RateLimitItemPerMinute(50, 5)
"""Tries to log in from one address."""


def person_of(connection: HTTPConnection) -> Person:
    """Return who sends a request that passed the access check."""
    return connection.scope[SCOPE]


async def _who(connection: HTTPConnection) -> Person:
    # FastAPI would call a plain function in another thread, which takes longer than the function.
    return person_of(connection)


Who = Annotated[Person, Depends(_who)]
"""Who sends the request, as an argument of a route."""


class Access:
    """Finds out who sends a request. Several threads may use it.

    ``settings``: ``api_key`` is the one key of a server that knows no people, and means nothing where there are people.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._people = database.people
        key = settings.api_key
        self._key = None if key is None else key.get_secret_value()
        self.sessions = auth.Sessions(settings.root, self._key) if self._key is not None else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def knows_people(self) -> bool:
        """Return whether people must log in."""
        return self._people.any()

    @property
    def known_people(self) -> bool | None:
        """What :meth:`knows_people` would return, if the database need not be asked; else None."""
        return self._people.known_any

    @property
    def has_key(self) -> bool:
        """Whether the server has a key for everybody."""
        return self._key is not None

    def identify(self, connection: HTTPConnection, people: bool) -> Person | None:
        """Return who sends a request; None if it has no valid key and no session.

        ``people``: what :meth:`knows_people` returned.
        """
        sent, cookie = auth.given(connection), connection.cookies.get(auth.COOKIE, "")
        if people:
            if sent is not None:
                return self._people.of_key(sent)
            return self._people.of_session(cookie) if cookie else None
        if self._key is None:
            return LOCAL
        if sent is not None and hmac.compare_digest(sent.encode(), self._key.encode()):
            return LOCAL
        return LOCAL if self.sessions is not None and self.sessions.holds(cookie) else None

    def still(self, connection: HTTPConnection) -> bool:
        """Return whether who sent a request, such as one for a stream of events, may still do what they might then."""
        now = self.identify(connection, self.knows_people())
        before = person_of(connection)
        return now is not None and (now.name, now.role) == (before.name, before.role)

    def log_in(self, name: str, password: str, address: str) -> tuple[Person, str]:
        """Check a password, and open a session. Return the person and the session's token.

        Raises RefusedError: 401 if name or password is wrong, without saying which; 429 after many tries.
        """
        self.count_try(name, address)
        person = self._people.get(name)
        if not is_password(None if person is None else self._people.password_of(name), password) or person is None:
            raise RefusedError(401, "unauthorized", "the name or the password is wrong")
        self._limiter.clear(OF_NAME, name.lower(), address)
        return person, self.open_session(name)

    def count_try(self, name: str, address: str) -> None:
        """Count a try to give a password. Raises RefusedError (429) after many of them."""
        of_address = self._limiter.hit(OF_ADDRESS, address)
        if not (of_address and self._limiter.hit(OF_NAME, name.lower(), address)):
            raise RefusedError(429, "too_many_tries", "too many tries with a password; wait five minutes")

    def open_session(self, name: str) -> str:
        """Open a session of a person, and return its token."""
        token = secrets.token_urlsafe(32)
        self._people.open_session(name, token, auth.SESSION_SECONDS)
        return token
