"""Routes for people: log-in, passwords, keys, who there is, and the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi import Path as InPath
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf
from starlette.responses import JSONResponse, Response

from safelight.assembly.services import Services
from safelight.queue.audit_table import AuditEntry
from safelight.queue.descriptions import tell_job
from safelight.queue.people_table import PersonKey
from safelight.queue.person import Person, Role
from safelight.server import auth
from safelight.server.access import DETAIL, Who
from safelight.server.apis.native_fields import Limit
from safelight.server.gate import NOBODY
from safelight.server.intake import disk_of, limits_of
from safelight.server.passwords import MOST_CHARACTERS, hash_password, is_password, new_key
from safelight.server.people_names import NAME
from safelight.server.problems import RefusedError, documented, found

Name = Annotated[str, InPath(pattern=NAME, description="a person's name")]
KeyId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="a key's identifier")]
Password = Annotated[str, FieldOf(max_length=MOST_CHARACTERS)]
Weight = Annotated[float, FieldOf(ge=0.01, le=100, allow_inf_nan=False)]


class LogIn(BaseModel):
    """A name and its password."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, FieldOf(max_length=64)]
    password: Password


class Me(BaseModel):
    """Who asks.

    ``people``: whether the server knows people. ``name``: "" if nobody has logged in.
    ``max_pixels``, ``max_steps``, ``max_waiting``, ``max_disk``: the person's limits; null for none.
    ``disk``: the size of the person's images and input images, in bytes.
    """

    people: bool
    name: str
    role: Role | None
    max_pixels: int | None = None
    max_steps: int | None = None
    max_waiting: int | None = None
    max_disk: int | None = None
    disk: int = 0


class PersonModel(BaseModel):
    """A person. ``weight``: the share of computing time. ``created``: in seconds since 1970."""

    name: str
    role: Role
    weight: float
    created: float


class PersonToAdd(BaseModel):
    """A new person."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, FieldOf(pattern=NAME)]
    password: Password
    role: Role = "member"
    weight: Weight = 1.0


class PersonChange(BaseModel):
    """What changes of a person. null leaves a value as it is. A new password ends the person's sessions."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = None
    weight: Weight | None = None
    password: Password | None = None


class PasswordChange(BaseModel):
    """The present password and a new one."""

    model_config = ConfigDict(extra="forbid")

    old: Password
    new: Password


class KeyToAdd(BaseModel):
    """What a new key is for."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, FieldOf(min_length=1, max_length=100)]


class NewKey(BaseModel):
    """A new key. It is shown only now: the server stores its digest."""

    id: str
    name: str
    key: str


class PeopleRoutes:
    """The routes for people."""

    def __init__(self, control: Services) -> None:
        self._control, self._people = control, control.database.people

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/me", tags=["people"])(self.me)
        api.post("/login", tags=["people"], response_model=Me, responses=documented(429))(self.log_in)
        api.post("/logout", tags=["people"], status_code=204)(self.log_out)
        api.put("/me/password", tags=["people"], status_code=204, responses=documented(429))(self.change_password)
        api.get("/me/keys", tags=["people"])(self.keys)
        api.post("/me/keys", tags=["people"], status_code=201, responses=documented(409))(self.add_key)
        api.delete("/me/keys/{key_id}", tags=["people"], status_code=204, responses=documented(404))(self.remove_key)
        api.get("/people", tags=["people"])(self.all)
        api.post("/people", tags=["people"], status_code=201)(self.add)
        api.patch("/people/{name}", tags=["people"], responses=documented(404))(self.change)
        api.delete("/people/{name}", tags=["people"], status_code=204, responses=documented(404))(self.remove)
        api.get("/audit", tags=["people"])(self.audit)

    def me(self, who: Who) -> Me:
        """Say who asks, and what they may do."""
        people = self._people.any()
        return Me(people=people, name="", role=None) if who is NOBODY else self._describe(who, people)

    def log_in(self, asked: LogIn, http: HTTPRequest) -> Response:
        """Log in: open a session, whose cookie comes with the answer."""
        if not self._people.any(now=True):
            problem = "this server knows no people; `safelight users add` adds the first one"
            raise RefusedError(422, "invalid_request", problem)
        address = http.client.host if http.client is not None else ""
        try:
            person, token = http.app.state.access.log_in(asked.name, asked.password, address)
        except RefusedError as error:
            if error.status == 401:
                # Further tries are refused unread, and would only fill the log.
                shown = "".join(sign if sign.isprintable() else "?" for sign in asked.name)
                self._control.database.audit.add("", "login refused", shown, address)
            raise
        self._control.database.audit.add(person.name, "login", "", address)
        answer = JSONResponse(self._describe(person, people=True).model_dump())
        answer.headers.append("Set-Cookie", self._cookie(token, http))
        return answer

    def log_out(self, http: HTTPRequest) -> Response:
        """Log out: end the session."""
        self._people.close_session(http.cookies.get(auth.COOKIE, ""))
        answer = Response(status_code=204)
        answer.headers.append("Set-Cookie", self._cookie("", http, 0))
        return answer

    def change_password(self, asked: PasswordChange, who: Who, http: HTTPRequest) -> Response:
        """Change your own password. All other sessions end; keys stay."""
        address = http.client.host if http.client is not None else ""
        http.app.state.access.count_try(who.name, address)
        if not is_password(self._people.password_of(who.name), asked.old):
            raise RefusedError(422, "invalid_request", "old: is not your password", "old")
        self._people.change(who.name, password=hash_password(asked.new))
        answer = Response(status_code=204)
        answer.headers.append("Set-Cookie", self._cookie(http.app.state.access.open_session(who.name), http))
        return answer

    def keys(self, who: Who) -> list[PersonKey]:
        """List your API keys, without the keys themselves."""
        return self._people.keys(who.name)

    def add_key(self, asked: KeyToAdd, who: Who, http: HTTPRequest) -> NewKey:
        """Make an API key for a program. It may do what its person may."""
        if not self._people.any(now=True):
            raise RefusedError(409, "no_people", "this server knows no people, so nobody can have a key")
        if auth.given(http) is not None:
            # Otherwise a thief of one key could make more keys, which outlive it.
            raise RefusedError(403, "forbidden", "a key makes no other keys; log in with your password")
        key = new_key()
        stored = self._people.add_key(who.name, asked.name, key)
        http.scope[DETAIL] = asked.name
        return NewKey(id=stored.id, name=stored.name, key=key)

    def remove_key(self, key_id: KeyId, who: Who) -> Response:
        """Revoke one of your keys."""
        if not self._people.remove_key(who.name, key_id):
            raise RefusedError(404, "not_found", f"there is no key {key_id}")
        return Response(status_code=204)

    def all(self) -> list[PersonModel]:
        """List the people by name."""
        return [_model(person) for person in self._people.all()]

    def add(self, asked: PersonToAdd, http: HTTPRequest) -> PersonModel:
        """Add a person."""
        if not self._people.any(now=True):
            # This would lock out everybody who uses the server now.
            raise RefusedError(
                403, "forbidden", "the first person is added on the server's machine, by `safelight users add`"
            )
        http.scope[DETAIL] = f"{asked.name}, {asked.role}"
        person = Person(asked.name, asked.role, asked.weight)
        self._people.add(person, hash_password(asked.password))
        return _model(found(self._people.get(asked.name), "person", asked.name))

    def change(self, name: Name, asked: PersonChange, http: HTTPRequest) -> PersonModel:
        """Change a person's role, weight or password."""
        hashed = None if asked.password is None else hash_password(asked.password)
        http.scope[DETAIL] = ", ".join(
            f"{what}: {value if what != 'password' else 'new'}"
            for what, value in asked.model_dump(exclude_none=True).items()
        )
        return _model(found(self._people.change(name, asked.role, asked.weight, hashed), "person", name))

    def remove(
        self,
        name: Name,
        who: Who,
        http: HTTPRequest,
        heir: Annotated[str, Query(description="who gets the images and boards; by default, nobody")] = "",
    ) -> Response:
        """Remove a person. Their waiting jobs are cancelled; their images stay, for the heir or for administrators."""
        if name == who.name:
            raise RefusedError(422, "invalid_request", "you cannot remove yourself", "name")
        http.scope[DETAIL] = f"heir: {heir}" if heir else ""
        cancelled = self._people.remove(name, heir)
        if cancelled is None:
            raise RefusedError(404, "not_found", f"there is no person {name}")
        for job in self._control.database.jobs_of(cancelled).values():
            tell_job(job, self._control.events)
        self._control.dispatcher.wake()
        return Response(status_code=204)

    def audit(
        self,
        limit: Limit = 100,
        before: Annotated[int | None, Query(ge=0, le=2**53, description="only entries with a smaller number")] = None,
    ) -> list[AuditEntry]:
        """List who changed what, the newest first."""
        return self._control.database.audit.entries(limit, before)

    def _cookie(self, token: str, http: HTTPRequest, seconds: int = auth.SESSION_SECONDS) -> str:
        return auth.cookie(token, http, self._control.settings.root_path, seconds)

    def _describe(self, person: Person, people: bool) -> Me:
        most = limits_of(self._control, person)
        allowed = {"max_waiting": most.waiting, "max_disk": most.disk}
        allowed |= {name: getattr(most.request, name) for name in ("max_pixels", "max_steps")}
        disk = disk_of(self._control, person.name)
        return Me(people=people, name=person.name, role=person.role, disk=disk, **allowed)


def _model(person: Person) -> PersonModel:
    return PersonModel(name=person.name, role=person.role, weight=person.weight, created=person.created)
