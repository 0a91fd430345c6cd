"""The access check, which comes before all routes: other sites' pages, who asks, what they may, the body's size."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight.assembly.services import Services
from safelight.errors import StorageError
from safelight.logs import Log
from safelight.queue.person import LOCAL, Person
from safelight.server import auth, bridge, problems
from safelight.server.access import DETAIL, SCOPE, Access
from safelight.server.problems import Problem
from safelight.server.rights import rule_of

_log = Log(__name__)

KNOWN = 200
"""How many methods and paths are remembered to have a route."""

BASIC = {"WWW-Authenticate": "Basic"}


NOBODY = Person("", "guest")
"""Who sends a request to an open route without having logged in."""

SEND_KEY = "this server needs its API key, as a bearer token or as the password of basic authentication"

LOG_IN = "log in, or send a key of yours as a bearer token or as the password of basic authentication"


def _is_api(scope: Scope) -> bool:
    """Return whether a path belongs to an API. All others are the page's files, which say nothing about anybody."""
    path: str = scope["path"]
    return any(path == api or path.startswith(f"{api}/") for api in scope["app"].state.apis)


def _unknown(scope: Scope) -> tuple[int, Problem] | None:
    """Return the error for a path below an API that has no route, or none with this method.

    Without this check the framework would answer such a request in a form of its own.
    """
    path: str = scope["path"]
    if not _is_api(scope):
        return None
    # Mounted parts match every path below them.
    found = {route.matches(scope)[0] for route in scope["app"].routes if not isinstance(route, Mount)}
    if Match.FULL in found:
        return None
    if Match.PARTIAL in found:
        return 405, Problem(error="method_not_allowed", message=f"{path} does not support {scope.get('method')}")
    return 404, Problem(error="not_found", message=f"there is no {path}")


def _is_html(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in headers)


class Gate:
    """The access check. It stores who asks in the request's scope, and writes the audit log."""

    def __init__(self, app: ASGIApp, control: Services, access: Access) -> None:
        self._app, self._access, self._audit = app, access, control.database.audit
        self._max_bytes, self._root_path = control.settings.max_body_bytes, control.settings.root_path
        self._origins = control.settings.allow_origins
        self._known: set[tuple[str, str | None, str | None, str]] = set()
        self._exposed = not auth.is_loopback(control.settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        try:
            if self._access.known_people is False:
                # The check does not ask the database, so another thread would take longer than the check itself.
                person = self._check(connection, False)
            else:
                person = await bridge.run(self._check, connection)
        except StorageError as error:
            # The database says who may do what. Without it, only what is open to everybody can be answered.
            rule = rule_of(scope.get("method", "GET"), scope["path"])
            person = NOBODY if rule.role is None else (507, Problem(error="storage", message=str(error)))
        if not isinstance(person, Person):
            await self._refuse(connection, *person, receive=receive, send=send)
            return
        scope[SCOPE], scope[DETAIL] = person, ""
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

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] < 400 and rule_of(scope["method"], scope["path"]).audited:
                    await bridge.run(self._write_audit, scope)
                message["headers"] = [*message["headers"], *self._cookies(connection, message["headers"])]
            await send(message)

        await self._app(scope, receive_limited, send_more)

    async def _refuse(
        self, connection: HTTPConnection, status: int, problem: Problem, receive: Receive, send: Send
    ) -> None:
        if connection.scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": problem.message[:100]})
            return
        # A browser asks for name and password then. Where there are people, the page does.
        headers = BASIC if status == 401 and self._access.has_key else None
        await problems.answer(connection.url.path, status, problem, headers)(connection.scope, receive, send)

    def _check(self, connection: HTTPConnection, people: bool | None = None) -> Person | tuple[int, Problem]:
        """Return who asks, or why the request is refused. For an open route, this may be a person without rights.

        ``people``: whether there are people; None to ask the database.
        """
        scope = connection.scope
        if any(unicodedata.category(sign) == "Cc" for sign in scope["path"]):
            # A route's pattern may match before a line end, and this check would not.
            return 400, Problem(error="bad_request", message=f"the path {scope['path']!r} has a control character")
        people = self._access.knows_people() if people is None else people
        protected = people or self._access.has_key
        foreign = auth.from_elsewhere(connection, protected, self._origins)
        if foreign is not None:
            return 403, Problem(error="forbidden", message=foreign)
        rule = rule_of(scope.get("method", "GET"), scope["path"])
        if self._exposed and not protected and rule.role is not None:
            message = "this server has neither a key nor people any more, and other machines can reach it; restart it"
            return 403, Problem(error="forbidden", message=message)
        person = self._access.identify(connection, people)
        if person is None:
            if rule.role is not None and not (people and not _is_api(scope)):
                return 401, Problem(error="unauthorized", message=LOG_IN if people else SEND_KEY)
            person = NOBODY
        elif (unknown := self._unknown(scope)) is not None:
            return unknown
        elif rule.role is not None and _is_api(scope) and not person.may(rule.role):
            needed = "administrators" if rule.role == "admin" else "members"
            return 403, Problem(
                error="forbidden", message=f"only {needed} may do this; {person.name} is a {person.role}"
            )
        length = connection.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            return 413, self._too_large()
        return person

    def _unknown(self, scope: Scope) -> tuple[int, Problem] | None:
        """Return :func:`_unknown` of a request. Comparing a path with every route takes long, so it is remembered."""
        asked = scope["type"], scope.get("method"), scope.get("root_path"), scope["path"]
        if asked in self._known:
            return None
        unknown = _unknown(scope)
        if unknown is None:
            if len(self._known) >= KNOWN:
                # Most paths name an image, and are asked for once. What is asked for again and again soon returns.
                self._known.clear()
            self._known.add(asked)
        return unknown

    def _cookies(self, connection: HTTPConnection, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the header with a session's cookie, for a page of a server with one key for everybody.

        A browser does not send the key with the page's own requests, but it sends the cookie.
        """
        sessions = self._access.sessions
        if sessions is None or not _is_html(headers) or connection.scope[SCOPE] != LOCAL:
            return []
        return [(b"set-cookie", auth.cookie(sessions.token(), connection, self._root_path).encode())]

    def _write_audit(self, scope: Scope) -> None:
        person: Person = scope[SCOPE]
        try:
            self._audit.add(person.name, f"{scope['method']} {scope['path']}", detail=scope[DETAIL])
        except StorageError as error:
            _log.warning("the audit log could not be written", who=person.name, what=scope["path"], why=str(error))

    def _too_large(self) -> Problem:
        return Problem(error="too_large", message=f"the body may have at most {self._max_bytes} bytes (max_body_bytes)")
