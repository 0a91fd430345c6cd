"""Jobs and images in a database. Several threads may use it; each method is one transaction."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.sql.dml import ReturningUpdate

from safelight.errors import InputError, QueueFullError
from safelight.queue import documents, statements
from safelight.queue.audit_table import AuditTable
from safelight.queue.board_table import BoardTable
from safelight.queue.database_file import open_file
from safelight.queue.database_server import Claim, open_server
from safelight.queue.image_table import ImageTable
from safelight.queue.input_owner_table import InputOwnerTable
from safelight.queue.job import ATTEMPTS, Failure, QueuedJob, State
from safelight.queue.order import Waiting
from safelight.queue.people_table import PeopleTable
from safelight.queue.person import LOCAL, Person
from safelight.queue.preset_table import PresetTable
from safelight.queue.sql_database import SqlDatabase
from safelight.queue.stored_image import StoredImage
from safelight.queue.tables import ImageRow, JobRow
from safelight.request.input_pictures import PICTURE_FIELDS, PICTURE_LISTS
from safelight.request.job import Job


class Database:
    """The jobs and images of a server.

    ``folder``: has the SQLite file, unless ``url`` names a database of PostgreSQL.
    ``images``, ``boards``, ``presets``, ``people``, ``audit``, ``input_owners``: its other tables.
    ``migrate``: see :func:`safelight.queue.sql_database.migrate_to_newest`.
    Raises the errors of :func:`open_file` or :func:`open_server`.
    """

    def __init__(self, folder: Path, *, url: str | None = None, migrate: bool = True) -> None:
        self._claim: Claim | None = None
        self._file = open_file(folder, migrate=migrate) if url is None else open_server(url, migrate=migrate)
        self.images = ImageTable(self._file)
        self.boards = BoardTable(self._file)
        self.presets = PresetTable(self._file)
        self.people = PeopleTable(self._file)
        self.audit = AuditTable(self._file)
        self.input_owners = InputOwnerTable(self._file)

    def close(self) -> None:
        """Close all connections, and give the claim back."""
        if self._claim is not None:
            self._claim.close()
        self._file.close()

    def claim(self) -> None:
        """Claim a database of PostgreSQL for a server. A SQLite file belongs to the server that has locked its root.

        Raises InputError if another server uses it.
        """
        if self._file.engine.dialect.name == "postgresql":
            self._claim = Claim(self._file)
            self._file.before_writing = self._claim.check

    @property
    def sql(self) -> SqlDatabase:
        """The database itself, to copy it."""
        return self._file

    def accept(
        self,
        *jobs: Job,
        client: str = "",
        person: str = "",
        priority: int = 0,
        max_queued: int | None = None,
        max_own: int | None = None,
    ) -> list[QueuedJob]:
        """Append new jobs to the queue and return them; when one cannot be stored, none is.

        ``max_queued``: the number of jobs that may wait; ``max_own``: of the person.
        Raises QueueFullError if not all fit.
        """
        queued = [
            QueuedJob(
                id=uuid.uuid4().hex,
                number=0,
                request=job.request,
                model_digest=job.model.digest,
                job=job,
                client=client,
                created=time.time(),
                person=person,
                priority=priority,
            )
            for job in jobs
        ]
        rows = [
            {**{name: getattr(one, name) for name in _OWN_COLUMNS}, "document": job.to_json()}
            for one, job in zip(queued, jobs, strict=True)
        ]
        for one, row, job in zip(queued, rows, jobs, strict=True):
            documents.remember(one.id, row["document"], job)
        with self._file.transaction() as connection:
            known = person and connection.execute(statements.ANY_PERSON).first()
            if known and connection.execute(statements.PERSON, {"name": person}).first() is None:
                raise InputError(f"there is no person {person!r} any more")
            waiting = 0 if max_queued is None else connection.execute(statements.QUEUED).scalar_one()
            if max_queued is not None and waiting + len(jobs) > max_queued:
                raise QueueFullError(waiting)
            own = 0 if max_own is None else connection.execute(statements.QUEUED_OF, {"of": person}).scalar_one()
            if max_own is not None and own + len(jobs) > max_own:
                raise QueueFullError(own, max_own)
            numbers = connection.execute(statements.ADD, rows).scalars().all()
        return [replace(job, number=number) for job, number in zip(queued, numbers, strict=True)]

    def job(self, job_id: str) -> QueuedJob | None:
        with self._file.connection() as connection:
            row = connection.execute(statements.JOB, {"id": job_id}).one_or_none()
        return None if row is None else _job(row)

    def jobs(
        self, states: Sequence[State] = (), limit: int = 100, before: int | None = None, person: Person = LOCAL
    ) -> list[QueuedJob]:
        """Return the newest jobs first.

        ``before``: only jobs with a smaller number than this one.
        ``person``: only jobs that this person sees.
        """
        query = select(JobRow).order_by(JobRow.number.desc()).limit(limit)
        if states:
            query = query.where(JobRow.state.in_(states))
        if before is not None:
            query = query.where(JobRow.number < before)
        if not person.sees_all:
            query = query.where(JobRow.person == person.name)
        with self._file.session() as session:
            return [_job(row) for row in session.scalars(query)]

    def jobs_of(self, ids: Sequence[str]) -> dict[str, QueuedJob]:
        """Return the jobs with these identifiers, by identifier; an unknown identifier is left out."""
        with self._file.connection() as connection:
            rows = connection.execute(statements.JOBS_OF, {"ids": ids}).all()
        return {row.id: _job(row) for row in rows}

    def models_of(self, ids: Sequence[str]) -> list[str]:
        """Return the names of the models of the jobs with these identifiers; an unknown identifier is left out."""
        names = {one: documents.model_of(one) for one in ids}
        if unknown := [one for one, name in names.items() if name is None]:
            with self._file.connection() as connection:
                names |= {one: connection.execute(statements.MODEL_OF, {"id": one}).scalar() for one in unknown}
        return [name for name in names.values() if name is not None]

    def queued(self, person: str | None = None) -> int:
        """Return the number of jobs that wait; ``person``: only this person's."""
        with self._file.connection() as connection:
            if person is None:
                return connection.execute(statements.QUEUED).scalar_one()
            return connection.execute(statements.QUEUED_OF, {"of": person}).scalar_one()

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        with self._file.session() as session:
            rows = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state)).tuples()
            return dict(list(rows))

    def waiting(self, candidates: int) -> list[Waiting]:
        """Return the queued jobs that :mod:`safelight.queue.order` chooses from, in the order of arrival.

        They are, of each person, the oldest ``candidates`` jobs, and the first ``candidates`` by priority and then by
        age.
        """
        found: dict[str, Waiting] = {}
        with self._file.connection() as connection:
            for person, least, most in connection.execute(statements.PRIORITIES).all():
                asked = {"of": person, "most": candidates}
                rows = connection.execute(statements.OLDEST, asked).all()
                # If all priorities are equal, both orders are the same.
                if least != most:
                    rows = [*rows, *connection.execute(statements.FIRST_BY_PRIORITY, asked)]
                found |= {row[0]: Waiting(*row) for row in rows}
        return sorted(found.values(), key=attrgetter("number"))

    def start(self, job_id: str, reason: str, slot: str = "") -> QueuedJob | None:
        """Set a queued job to running, and count it as overtaking the person's earlier jobs that still wait.

        Returns the job, or None when it is no longer queued.
        """
        values = {"of": job_id, "at": time.time(), "why": reason, "where": slot}
        with self._file.transaction() as connection:
            row = connection.execute(statements.START, values).one_or_none()
            if row is None:
                return None
            connection.execute(statements.OVERTAKE, {"before": row.number, "whose": row.person})
        return _job(row)

    def end(
        self,
        job_id: str,
        state: State,
        reason: str = "",
        was: Sequence[State] = ("running",),
        seconds: float = 0.0,
        failure: Failure = "",
        slot: str | None = None,
    ) -> QueuedJob | None:
        """End a job, and return it. None if this call did not end it: a job ends only once.

        ``was``: the states from which the job may end.
        ``slot``: only if this slot has it.
        ``seconds``: for how long it computed; this delayed the person's earlier jobs that still wait.
        """
        values = {"becomes": state, "at": time.time(), "why": reason, "kind": failure, "on": slot}
        return self._leave_state(statements.END, job_id, was, seconds, values)

    def set_priorities(self, priorities: Mapping[str, int]) -> list[QueuedJob]:
        """Set the priorities of waiting jobs, by identifier. Returns the jobs that did wait."""
        with self._file.transaction() as connection:
            every = [
                connection.execute(statements.SET_PRIORITY, {"of": job, "new": priority}).one_or_none()
                for job, priority in priorities.items()
            ]
        return [_job(row) for row in every if row is not None]

    def put_back(
        self,
        job_id: str,
        reason: str,
        counts_as_attempt: bool = True,
        seconds: float = 0.0,
        slot: str | None = None,
    ) -> QueuedJob | None:
        """Queue a running job again, at its old place, and return it; None when it does not run.

        ``slot``: only if it runs on this slot.
        ``counts_as_attempt``: whether this attempt counts.
        ``seconds``: as in :meth:`end`.
        """
        values = {"why": reason, "uncounted": 0 if counts_as_attempt else 1, "on": slot}
        return self._leave_state(statements.PUT_BACK, job_id, ("running",), seconds, values)

    def _leave_state(
        self, statement: ReturningUpdate[Any], job_id: str, was: Sequence[State], seconds: float, values: dict[str, Any]
    ) -> QueuedJob | None:
        """Give a job in one of the states ``was`` another one, and return it; None if it was in none of them.

        ``seconds``: added to the delay of the queued jobs that came before it.
        """
        with self._file.transaction() as connection:
            row = connection.execute(statement, {"of": job_id, "was": list(was), **values}).one_or_none()
            if row is None:
                return None
            if seconds:
                connection.execute(statements.DELAY, {"before": row.number, "whose": row.person, "seconds": seconds})
        return _job(row)

    def add_image(self, image: StoredImage) -> StoredImage | None:
        """Add a finished image of a running job to the images of the job's person.

        The caller writes the image's file first.
        Returns the image with its person, or None when the job no longer runs.
        """
        with self._file.transaction() as connection:
            # Its person may have been removed meanwhile, and the job given to another.
            person = connection.execute(statements.COUNT_IMAGE, {"of": image.job, "made": image.place + 1}).scalar()
            if person is None:
                return None
            owned = replace(image, person=person)
            self.images.insert(connection, owned)
            return owned

    def inputs(self) -> set[str]:
        """Return the digests of all input images that unfinished jobs and stored images name."""
        jobs, images = JobRow.document["request"], ImageRow.image_metadata["request"]
        fields = (*PICTURE_FIELDS, *PICTURE_LISTS)
        found: set[str] = set()
        with self._file.session() as session:
            for query in (
                select(*(jobs[name] for name in fields)).where(JobRow.state.in_(("queued", "running"))),
                select(*(images[name] for name in fields)),
            ):
                rows: Iterable[Sequence[Any]] = session.execute(query)
                for image, mask, references, controls in rows:
                    named = (image, mask, *(references or ()), *(one.get("image") for one in controls or ()))
                    found.update(digest for digest in named if digest)
        return found


def recover(database: Database) -> None:
    """Queue the jobs again that ran when the server stopped; those without a further attempt fail.

    The server calls it once, when it starts.
    """
    for job in database.jobs(("running",), limit=1000):
        if job.attempts < ATTEMPTS:
            database.put_back(job.id, "the server stopped while the job ran; it runs again")
        else:
            reason = f"the server stopped {job.attempts} times while the job ran"
            database.end(job.id, "failed", reason, failure="worker")


def _job(row: Any) -> QueuedJob:
    """Return the job of a row of the table of jobs."""
    request, job, unreadable = documents.parse(row.id, row.document)
    values = {name: getattr(row, name) for name in _OWN_COLUMNS}
    return QueuedJob(**values, number=row.number, request=request, job=job, unreadable=unreadable)


_OWN_COLUMNS = (
    *("id", "model_digest", "client", "person", "slot", "created", "state", "priority", "overtaken", "delayed"),
    *("attempts", "images", "started", "ended", "reason", "failure"),
)
"""Columns whose values are those of :class:`QueuedJob`; the database sets the number."""
