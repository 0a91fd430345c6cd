"""The people of a server, with their passwords, API keys and sessions. Each method is one transaction.

Keys and tokens are stored as digests: who reads the database can use none of them.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from safelight.errors import InputError
from safelight.queue import statements
from safelight.queue.person import Person, Role
from safelight.queue.sql_database import SqlDatabase
from safelight.queue.tables import (
    BoardRow,
    ImageRow,
    InputOwnerRow,
    JobRow,
    PersonKeyRow,
    PersonRow,
    PersonSessionRow,
    PresetRow,
)

MOST_OF_A_KIND = 1000
"""Boards, presets and keys that a person may have, of each."""

ANY_SECONDS = 1.0
"""For so long the server believes what it found when it looked whether there are people."""

USED_SECONDS = 60.0
"""When a key was used last is written at most this often."""


@dataclass(frozen=True, slots=True)
class PersonKey:
    """An API key, without the key itself. ``name``: what it is for. Times are in seconds since 1970."""

    id: str
    name: str
    created: float
    used: float | None


class PeopleTable:
    """The people in a database. The server knows people if there is any; the first one is an administrator."""

    def __init__(self, file: SqlDatabase) -> None:
        self._file = file
        self._any = False, 0.0
        self._looking = threading.Lock()

    def any(self, now: bool = False) -> bool:
        """Return whether the server knows people. What another process changes shows after ANY_SECONDS at most.

        ``now``: ask the database.
        """
        with self._looking:
            known = None if now else self.known_any
            if known is None:
                with self._file.connection() as connection:
                    known = connection.execute(statements.ANY_PERSON).first() is not None
                self._any = known, time.monotonic() + ANY_SECONDS
            return known

    @property
    def known_any(self) -> bool | None:
        """What :meth:`any` would return, if the database need not be asked; else None."""
        found, until = self._any
        return found if time.monotonic() < until else None

    def _forget_any(self) -> None:
        # Nobody looks meanwhile, so what they found before the change cannot be kept.
        with self._looking:
            self._any = False, 0.0

    def all(self) -> list[Person]:
        """Return the people by name."""
        with self._file.session() as session:
            return [_person(row) for row in session.scalars(select(PersonRow).order_by(func.lower(PersonRow.name)))]

    def get(self, name: str) -> Person | None:
        """Return a person; None if there is none of this name."""
        with self._file.connection() as connection:
            row = connection.execute(statements.PERSON, {"name": name}).one_or_none()
        return None if row is None else _person(row)

    def password_of(self, name: str) -> str | None:
        """Return the hash of a person's password; None if there is no such person."""
        with self._file.session() as session:
            return session.scalar(select(PersonRow.password).where(PersonRow.name == name))

    def add(self, person: Person, password: str) -> None:
        """Add a person. The first one gets everything that was made before there were people.

        ``password``: its hash.
        Raises InputError if there is a person of this name, or if the first one is no administrator.
        """
        with self._file.writing() as session:
            first = session.scalar(select(PersonRow.name).limit(1)) is None
            if first and person.role != "admin":
                raise InputError(f"{person.name}: the first person must be an administrator (admin)")
            for name in session.scalars(select(PersonRow.name)):
                if name.casefold() == person.name.casefold():
                    raise InputError(f"there is already a person named {name!r}")
            row = PersonRow(
                name=person.name, role=person.role, password=password, weight=person.weight, created=time.time()
            )
            session.add(row)
            session.flush()
            if first:
                for table in (JobRow, ImageRow, BoardRow, PresetRow):
                    session.execute(update(table).where(table.person == "").values(person=person.name))
        self._forget_any()

    def change(
        self, name: str, role: Role | None = None, weight: float | None = None, password: str | None = None
    ) -> Person | None:
        """Change a person. None leaves a value as it is. Returns None if there is no such person.

        ``password``: its hash. A new one ends the person's sessions; keys stay.
        Raises InputError if nobody would be an administrator.
        """
        with self._file.writing() as session:
            row = session.get(PersonRow, name)
            if row is None:
                return None
            if role not in (None, "admin"):
                _require_other_admin(session, row)
            row.role = role or row.role
            row.weight = row.weight if weight is None else weight
            if password is not None:
                row.password = password
                session.execute(delete(PersonSessionRow).where(PersonSessionRow.person == name))
            return _person(row)

    def remove(self, name: str, heir: str = "") -> list[str] | None:
        """Remove a person, their presets, keys and sessions, and cancel their waiting jobs.

        Returns the identifiers of these jobs; None if there is no such person.
        ``heir``: who gets the images and boards; "" leaves them to administrators. The jobs go the same way.
        Raises InputError if there is no such heir, or if others stay and none of them is an administrator.
        """
        with self._file.writing() as session:
            row = session.get(PersonRow, name)
            if row is None:
                return None
            others = session.scalar(select(PersonRow.name).where(PersonRow.name != name).limit(1))
            if others is not None:
                _require_other_admin(session, row)
            if heir and (heir == name or session.get(PersonRow, heir) is None):
                raise InputError(f"there is no person {heir!r} who could get the images of {name}")
            reason = f"{name} was removed"
            waiting = update(JobRow).where(JobRow.person == name, JobRow.state == "queued")
            ended = waiting.values(state="cancelled", ended=time.time(), reason=reason).returning(JobRow.id)
            cancelled = list(session.scalars(ended))
            for table in (JobRow, ImageRow):
                session.execute(update(table).where(table.person == name).values(person=heir))
            _give_boards(session, name, heir)
            for table in (PresetRow, PersonKeyRow, PersonSessionRow, InputOwnerRow):
                session.execute(delete(table).where(table.person == name))
            session.delete(row)
        self._forget_any()
        return cancelled

    def open_session(self, name: str, token: str, seconds: float) -> None:
        """Store a session of a person; those that have expired are removed. ``token``: what its cookie has."""
        now = time.time()
        with self._file.writing() as session:
            session.execute(delete(PersonSessionRow).where(PersonSessionRow.expires < now))
            session.add(PersonSessionRow(digest=digest_of(token), person=name, created=now, expires=now + seconds))

    def close_session(self, token: str) -> None:
        """End a session."""
        with self._file.writing() as session:
            session.execute(delete(PersonSessionRow).where(PersonSessionRow.digest == digest_of(token)))

    def of_session(self, token: str) -> Person | None:
        """Return whose session it is; None if there is none, or it has expired."""
        asked = {"token": digest_of(token), "now": time.time()}
        with self._file.connection() as connection:
            row = connection.execute(statements.PERSON_OF_SESSION, asked).one_or_none()
        return None if row is None else _person(row)

    def keys(self, name: str) -> list[PersonKey]:
        """Return a person's keys, the oldest first."""
        query = select(PersonKeyRow).where(PersonKeyRow.person == name).order_by(PersonKeyRow.created, PersonKeyRow.id)
        with self._file.session() as session:
            return [PersonKey(row.id, row.name, row.created, row.used) for row in session.scalars(query)]

    def add_key(self, person: str, name: str, key: str) -> PersonKey:
        """Store a key of a person."""
        row = PersonKeyRow(
            id=uuid.uuid4().hex, person=person, name=name, digest=digest_of(key), created=time.time(), used=None
        )
        made = PersonKey(row.id, row.name, row.created, None)
        with self._file.writing() as session:
            require_fewer(session, PersonKeyRow, person, "keys")
            session.add(row)
        return made

    def remove_key(self, person: str, key_id: str) -> bool:
        """Remove a key. Returns whether the person had it."""
        with self._file.writing() as session:
            row = session.get(PersonKeyRow, key_id)
            if row is None or row.person != person:
                return False
            session.delete(row)
            return True

    def of_key(self, key: str) -> Person | None:
        """Return whose key it is; None if it is nobody's."""
        with self._file.connection() as connection:
            row = connection.execute(statements.PERSON_OF_KEY, {"key": digest_of(key)}).one_or_none()
        if row is None:
            return None
        if (row.used or 0.0) < time.time() - USED_SECONDS:
            with self._file.writing() as session:
                session.execute(update(PersonKeyRow).where(PersonKeyRow.id == row.key_id).values(used=time.time()))
        return _person(row)


def require_fewer(session: Session, table: type[Any], person: str, what: str) -> None:
    """Raise InputError if a person has as many rows of a table as one may have."""
    if session.scalars(select(func.count()).select_from(table).where(table.person == person)).one() >= MOST_OF_A_KIND:
        raise InputError(f"at most {MOST_OF_A_KIND} {what} are possible; delete some")


def digest_of(secret: str) -> str:
    """Return the digest under which a key or token is stored. They are random, so a plain SHA-256 suffices."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _person(row: Any) -> Person:
    """Return the person of a row of the table of people."""
    return Person(row.name, row.role, row.weight, row.created)


def _require_other_admin(session: Session, row: PersonRow) -> None:
    others = select(PersonRow.name).where(PersonRow.role == "admin", PersonRow.name != row.name).limit(1)
    if row.role == "admin" and session.scalar(others) is None:
        raise InputError(f"{row.name} is the only administrator; make somebody else one first")


def _give_boards(session: Session, before: str, after: str) -> None:
    """Give the boards of one person to another. A board whose name is taken gets a new one."""
    taken = set(session.scalars(select(BoardRow.name).where(BoardRow.person == after)))
    for board in session.scalars(select(BoardRow).where(BoardRow.person == before)):
        name, number = board.name, 2
        while name in taken:
            name, number = f"{board.name} ({number})", number + 1
        board.name, board.person = name, after
        taken.add(name)
