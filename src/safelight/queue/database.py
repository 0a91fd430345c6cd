"""Jobs and images in a database. Several threads may use it; each method is one transaction."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update

from safelight.errors import InputError
from safelight.queue import documents
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
from safelight.queue.tables import ImageRow, JobRow, PersonRow
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

    def accept(self, *jobs: Job, client: str = "", person: str = "", priority: int = 0) -> list[QueuedJob]:
        """Append new jobs to the queue and return them; when one cannot be stored, none is."""
        rows = [
            JobRow(
                id=uuid.uuid4().hex,
                document=job.to_json(),
                model_digest=job.model.digest,
                client=client,
                person=person,
                slot="",
                created=time.time(),
                state="queued",
                priority=priority,
                overtaken=0,
                delayed=0.0,
                attempts=0,
                images=0,
                reason="",
                failure="",
            )
            for job in jobs
        ]
        with self._file.writing() as session:
            known = session.scalar(select(PersonRow.name).limit(1)) is not None
            if known and person and session.get(PersonRow, person) is None:
                raise InputError(f"there is no person {person!r} any more")
            session.add_all(rows)
            session.flush()
            return [_job(row) for row in rows]

    def job(self, job_id: str) -> QueuedJob | None:
        with self._file.session() as session:
            row = session.scalar(select(JobRow).where(JobRow.id == job_id))
            return _job(row) if row is not None else None

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
        with self._file.session() as session:
            return {row.id: _job(row) for row in session.scalars(select(JobRow).where(JobRow.id.in_(ids)))}

    def queued(self, person: str | None = None) -> int:
        """Return the number of jobs that wait; ``person``: only this person's."""
        query = select(func.count()).where(JobRow.state == "queued")
        if person is not None:
            query = query.where(JobRow.person == person)
        with self._file.session() as session:
            return session.scalars(query).one()

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
        columns = (
            JobRow.id,
            JobRow.number,
            JobRow.model_digest,
            JobRow.priority,
            JobRow.overtaken,
            JobRow.delayed,
            JobRow.person,
            JobRow.slot,
        )
        by_age, by_priority = (JobRow.number,), (JobRow.priority.desc(), JobRow.number)
        lowest, highest = func.min(JobRow.priority), func.max(JobRow.priority)
        people = select(JobRow.person, lowest, highest).where(JobRow.state == "queued").group_by(JobRow.person)
        found: set[Waiting] = set()
        with self._file.session() as session:
            for person, least, most in session.execute(people).tuples().all():
                own = select(*columns).where(JobRow.state == "queued", JobRow.person == person).limit(candidates)
                # If all priorities are equal, both orders are the same.
                for by in (by_age,) if least == most else (by_age, by_priority):
                    rows: Sequence[Any] = session.execute(own.order_by(*by)).all()
                    found |= {Waiting(*row) for row in rows}
        return sorted(found, key=lambda job: job.number)

    def start(self, job_id: str, reason: str, slot: str = "") -> QueuedJob | None:
        """Set a queued job to running, and count it as overtaking the person's earlier jobs that still wait.

        Returns the job, or None when it is no longer queued.
        """
        with self._file.writing() as session:
            changed = session.execute(
                update(JobRow)
                .where(JobRow.id == job_id, JobRow.state == "queued")
                .values(state="running", started=time.time(), attempts=JobRow.attempts + 1, reason=reason, slot=slot)
            )
            if not changed.rowcount:  # pyright: ignore[reportAttributeAccessIssue]
                return None
            row = session.scalars(select(JobRow).where(JobRow.id == job_id)).one()
            session.execute(
                update(JobRow)
                .where(JobRow.state == "queued", JobRow.number < row.number, JobRow.person == row.person)
                .values(overtaken=JobRow.overtaken + 1)
            )
            return _job(row)

    def end(
        self,
        job_id: str,
        state: State,
        reason: str = "",
        was: Sequence[State] = ("running",),
        seconds: float = 0.0,
        failure: Failure = "",
    ) -> bool:
        """End a job, and return whether this call ended it: a job ends only once.

        ``was``: the states from which the job may end.
        ``seconds``: for how long it computed; this delayed the person's earlier jobs that still wait.
        """
        values = {"state": state, "ended": time.time(), "reason": reason, "failure": failure}
        return self._leave_state(job_id, was, seconds, values)

    def set_priorities(self, priorities: Mapping[str, int]) -> list[str]:
        """Set the priorities of waiting jobs, by identifier. Returns the identifiers of the jobs that did wait."""
        changed: list[str] = []
        with self._file.writing() as session:
            for job, priority in priorities.items():
                done = session.execute(
                    update(JobRow).where(JobRow.id == job, JobRow.state == "queued").values(priority=priority)
                )
                changed += [job] if done.rowcount else []  # pyright: ignore[reportAttributeAccessIssue]
        return changed

    def put_back(self, job_id: str, reason: str, counts_as_attempt: bool = True, seconds: float = 0.0) -> bool:
        """Queue a running job again, at its old place; return False when it does not run.

        ``counts_as_attempt``: whether this attempt counts.
        ``seconds``: as in :meth:`end`.
        """
        values: dict[str, Any] = {"state": "queued", "reason": reason, "started": None}
        if not counts_as_attempt:
            values["attempts"] = JobRow.attempts - 1
        return self._leave_state(job_id, ("running",), seconds, values)

    def _leave_state(self, job_id: str, was: Sequence[State], seconds: float, values: Mapping[str, Any]) -> bool:
        """Write ``values``, with the new state, to a job in one of the states ``was``. Return whether it was in one.

        ``seconds``: added to the delay of the queued jobs that came before it.
        """
        with self._file.writing() as session:
            changed = session.execute(update(JobRow).where(JobRow.id == job_id, JobRow.state.in_(was)).values(**values))
            if not changed.rowcount:  # pyright: ignore[reportAttributeAccessIssue]
                return False
            if seconds:
                number = select(JobRow.number).where(JobRow.id == job_id).scalar_subquery()
                person = select(JobRow.person).where(JobRow.id == job_id).scalar_subquery()
                session.execute(
                    update(JobRow)
                    .where(JobRow.state == "queued", JobRow.number < number, JobRow.person == person)
                    .values(delayed=JobRow.delayed + seconds)
                )
            return True

    def add_image(self, image: StoredImage) -> StoredImage | None:
        """Add a finished image of a running job to the images of the job's person.

        The caller writes the image's file first.
        Returns the image with its person, or None when the job no longer runs.
        """
        with self._file.writing() as session:
            changed = session.execute(
                update(JobRow).where(JobRow.id == image.job, JobRow.state == "running").values(images=image.place + 1)
            )
            if not changed.rowcount:  # pyright: ignore[reportAttributeAccessIssue]
                return None
            # Its person may have been removed meanwhile, and the job given to another.
            person = session.scalars(select(JobRow.person).where(JobRow.id == image.job)).one()
            owned = replace(image, person=person)
            self.images.insert(session, owned)
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


def _job(row: JobRow) -> QueuedJob:
    request, job, unreadable = documents.parse(row.id, row.document)
    return QueuedJob(
        id=row.id,
        number=row.number,
        request=request,
        model_digest=row.model_digest,
        job=job,
        client=row.client,
        person=row.person,
        slot=row.slot,
        created=row.created,
        state=row.state,  # pyright: ignore[reportArgumentType]
        priority=row.priority,
        overtaken=row.overtaken,
        delayed=row.delayed,
        attempts=row.attempts,
        images=row.images,
        started=row.started,
        ended=row.ended,
        reason=row.reason,
        failure=row.failure,  # pyright: ignore[reportArgumentType]
        unreadable=unreadable,
    )
