"""The audit log: who changed what on a server. Each method is one transaction."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import select

from safelight.queue.sql_database import SqlDatabase
from safelight.queue.tables import AuditRow


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What somebody changed.

    ``at``: in seconds since 1970.
    ``person``: who; "" on the server's machine, or if the server knew no people.
    ``action``: for example ``people add``, or the method and path of a request.
    ``subject``: what was changed: a name or an identifier.
    ``detail``: more, in words.
    """

    number: int
    at: float
    person: str
    action: str
    subject: str
    detail: str


class AuditTable:
    """The audit log in a database. Entries are only added."""

    def __init__(self, file: SqlDatabase) -> None:
        self._file = file

    def add(self, person: str, action: str, subject: str = "", detail: str = "") -> None:
        """Add an entry."""
        row = AuditRow(at=time.time(), person=person, action=action, subject=subject, detail=detail)
        with self._file.writing() as session:
            session.add(row)

    def entries(self, limit: int = 100, before: int | None = None) -> list[AuditEntry]:
        """Return the newest entries first. ``before``: only those with a smaller number."""
        query = select(AuditRow).order_by(AuditRow.number.desc()).limit(limit)
        if before is not None:
            query = query.where(AuditRow.number < before)
        with self._file.session() as session:
            return [
                AuditEntry(row.number, row.at, row.person, row.action, row.subject, row.detail)
                for row in session.scalars(query)
            ]
