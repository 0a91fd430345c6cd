"""The tables of the database, as SQLAlchemy maps them; ``migrations`` creates them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    """The base class of all tables."""

    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012


class JobRow(Table):
    """A job; its columns are the fields of :class:`safelight.queue.job.QueuedJob`.

    ``document``: a :class:`safelight.request.job.Job` as JSON, or a request of version 1 without its model.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("jobs_by_state", "state", "number"), {"sqlite_autoincrement": True})

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    document: Mapped[dict[str, Any]]
    model_digest: Mapped[str]
    client: Mapped[str]
    created: Mapped[float]
    state: Mapped[str]
    priority: Mapped[int]
    overtaken: Mapped[int]
    delayed: Mapped[float]
    attempts: Mapped[int]
    images: Mapped[int]
    started: Mapped[float | None]
    ended: Mapped[float | None]
    reason: Mapped[str]
    failure: Mapped[str]


class ImageRow(Table):
    """A finished image.

    ``place``: the image's number in its job, from 0.
    ``file``: the name of its file in the folder of images.
    ``width``, ``height``: in pixels.
    ``created``: in seconds since 1970.
    """

    __tablename__ = "images"
    __table_args__ = (UniqueConstraint("job", "place"), Index("images_by_time", "created"))

    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    place: Mapped[int]
    file: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    seed: Mapped[int]
    model: Mapped[str]
    model_digest: Mapped[str]
    pixels_sha256: Mapped[str]
    created: Mapped[float]
    # SQLAlchemy reserves the attribute name ``metadata``.
    image_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
