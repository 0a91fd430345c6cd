"""The SQL statements that each job and each request needs, built once. Their named values are in the docstring of each.

SQLAlchemy takes several times longer to build a statement, or to run one by its ORM, than SQLite takes to execute it.
"""

from __future__ import annotations

from typing import cast

from sqlalchemy import Table, bindparam, func, insert, select, update

from safelight.queue.tables import ImageRow, JobRow, PersonKeyRow, PersonRow, PersonSessionRow

JOBS, IMAGES, _PEOPLE, _SESSIONS, _KEYS = (
    cast("Table", row.__table__) for row in (JobRow, ImageRow, PersonRow, PersonSessionRow, PersonKeyRow)
)
_job, _is_queued = JOBS.c, JOBS.c.state == "queued"

ADD = insert(JOBS).returning(JOBS.c.number, sort_by_parameter_order=True)
"""Append jobs, in the order of their values."""

ANY_PERSON = select(_PEOPLE.c.name).limit(1)
"""The name of a person, if there is any."""

PERSON = select(_PEOPLE).where(_PEOPLE.c.name == bindparam("name"))
"""The person ``name``."""

PERSON_OF_SESSION = (
    select(_PEOPLE)
    .join(_SESSIONS, _SESSIONS.c.person == _PEOPLE.c.name)
    .where(_SESSIONS.c.digest == bindparam("token"), _SESSIONS.c.expires > bindparam("now"))
)
"""The person of the session whose token has the digest ``token``, if it has not expired at ``now``."""

PERSON_OF_KEY = (
    select(_PEOPLE, _KEYS.c.id.label("key_id"), _KEYS.c.used)
    .join(_KEYS, _KEYS.c.person == _PEOPLE.c.name)
    .where(_KEYS.c.digest == bindparam("key"))
)
"""The person of the key with the digest ``key``, the key's identifier, and when it was used."""

JOB = select(JOBS).where(_job.id == bindparam("id"))
"""The job with the identifier ``id``."""

JOBS_OF = select(JOBS).where(_job.id.in_(bindparam("ids", expanding=True)))
"""The jobs with the identifiers ``ids``."""

MODEL_OF = select(_job.document[("request", "model")].as_string()).where(_job.id == bindparam("id"))
"""The name of the model of the job ``id``."""

QUEUED = select(func.count()).where(_is_queued)
"""The number of queued jobs."""

QUEUED_OF = QUEUED.where(_job.person == bindparam("of"))
"""The number of queued jobs of the person ``of``."""

PRIORITIES = (
    select(_job.person, func.min(_job.priority), func.max(_job.priority)).where(_is_queued).group_by(_job.person)
)
"""Each person with queued jobs, and their lowest and highest priority."""

_WAITING = (
    select(
        *(_job.id, _job.number, _job.model_digest, _job.priority),
        *(_job.overtaken, _job.delayed, _job.person, _job.slot),
    )
    .where(_is_queued, _job.person == bindparam("of"))
    .limit(bindparam("most", type_=_job.number.type))
)

OLDEST = _WAITING.order_by(_job.number)
"""The ``most`` oldest queued jobs of the person ``of``, with the columns of :class:`safelight.queue.order.Waiting`."""

FIRST_BY_PRIORITY = _WAITING.order_by(_job.priority.desc(), _job.number)
"""The same by priority, and then by age."""

START = (
    update(JOBS)
    .where(_job.id == bindparam("of"), _is_queued)
    .values(
        state="running",
        started=bindparam("at"),
        attempts=_job.attempts + 1,
        reason=bindparam("why"),
        slot=bindparam("where"),
    )
    .returning(JOBS)
)
"""Set the queued job ``of`` to running in the slot ``where``. Returns it, if it was queued."""

_EARLIER = update(JOBS).where(
    _is_queued, _job.number < bindparam("before"), _job.person == bindparam("whose", type_=_job.person.type)
)

OVERTAKE = _EARLIER.values(overtaken=_job.overtaken + 1)
"""Count that a job overtook those of the person ``whose`` with a smaller number than ``before``."""

DELAY = _EARLIER.values(delayed=_job.delayed + bindparam("seconds", type_=_job.delayed.type))
"""Add ``seconds`` to the delay of the same jobs."""

_LEAVE = update(JOBS).where(
    _job.id == bindparam("of"),
    _job.state.in_(bindparam("was", expanding=True)),
    _job.slot == func.coalesce(bindparam("on", type_=_job.slot.type), _job.slot),
)
"""``on``: only if this slot has the job; None for any."""

END = _LEAVE.values(
    state=bindparam("becomes"), ended=bindparam("at"), reason=bindparam("why"), failure=bindparam("kind")
).returning(JOBS)
"""Set the job ``of``, if its state is one of ``was``, to the state ``becomes``. Returns it, if it was."""

PUT_BACK = _LEAVE.values(
    state="queued",
    started=None,
    reason=bindparam("why"),
    attempts=_job.attempts - bindparam("uncounted", type_=_job.attempts.type),
).returning(JOBS)
"""Queue the job ``of`` again, if its state is one of ``was``, with ``uncounted`` attempts less. Returns it."""

SET_PRIORITY = (
    update(JOBS).where(_job.id == bindparam("of"), _is_queued).values(priority=bindparam("new")).returning(JOBS)
)
"""Set the priority of the queued job ``of`` to ``new``. Returns it."""

COUNT_IMAGE = (
    update(JOBS)
    .where(_job.id == bindparam("of"), _job.state == "running")
    .values(images=bindparam("made"))
    .returning(_job.person)
)
"""Set the number of finished images of the running job ``of``. Returns its person, if it runs."""

ADD_IMAGE = insert(IMAGES).returning(IMAGES.c.number)
"""Add an image."""
