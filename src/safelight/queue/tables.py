"""The tables of the database, as SQLAlchemy maps them; ``migrations`` creates them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    """The base class of all tables."""

    # SQLite's integers have 8 bytes anyway, and only its type INTEGER counts up by itself.
    type_annotation_map = {dict[str, Any]: JSON, int: BigInteger().with_variant(Integer, "sqlite")}  # noqa: RUF012


class JobRow(Table):
    """A job; its columns are the fields of :class:`safelight.queue.job.QueuedJob`.

    ``document``: a :class:`safelight.request.job.Job` as JSON, or a request of version 1 without its model.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_state", "state", "number"),
        Index("jobs_by_person", "state", "person", "number"),
        Index("jobs_by_priority", "state", "person", text("priority DESC"), "number"),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    document: Mapped[dict[str, Any]]
    model_digest: Mapped[str]
    client: Mapped[str]
    person: Mapped[str]
    slot: Mapped[str]
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
    """An image; its columns are the fields of :class:`safelight.queue.stored_image.StoredImage`.

    ``number``: the order in which images were added.
    """

    __tablename__ = "images"
    __table_args__ = (
        UniqueConstraint("job", "place"),
        Index("images_by_time", "trashed", "created", "number"),
        *(
            Index(f"images_by_{name}", column, "trashed", "created", "number")
            for name, column in (
                *(("model", "model"), ("board", "board"), ("seed", "seed"), ("program", "program")),
                *(("star", "starred"), ("person", "person")),
            )
        ),
        Index("images_by_file", "file"),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    place: Mapped[int]
    file: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    seed: Mapped[int | None]
    model: Mapped[str]
    model_digest: Mapped[str]
    pixels_sha256: Mapped[str]
    created: Mapped[float]
    program: Mapped[str]
    prompt: Mapped[str]
    negative: Mapped[str]
    imported: Mapped[bool]
    starred: Mapped[bool]
    board: Mapped[str | None] = mapped_column(ForeignKey("boards.id"))
    trashed: Mapped[float | None]
    same: Mapped[bool | None]
    person: Mapped[str]
    bytes: Mapped[int]
    # SQLAlchemy reserves the attribute name ``metadata``.
    image_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")


class BoardRow(Table):
    """A board of images; its columns are the fields of :class:`safelight.queue.stored_image.Board`."""

    __tablename__ = "boards"
    __table_args__ = (UniqueConstraint("person", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    created: Mapped[float]
    person: Mapped[str]
    shared: Mapped[bool]


class ImageLoraRow(Table):
    """An image used a LoRA. ``image``: its number."""

    __tablename__ = "image_loras"
    __table_args__ = (Index("image_loras_by_image", "image"),)

    lora: Mapped[str] = mapped_column(primary_key=True)
    image: Mapped[int] = mapped_column(ForeignKey("images.number"), primary_key=True)


class ImageTagRow(Table):
    """An image has a tag. ``image``: its number."""

    __tablename__ = "image_tags"
    __table_args__ = (Index("image_tags_by_image", "image"),)

    tag: Mapped[str] = mapped_column(primary_key=True)
    image: Mapped[int] = mapped_column(ForeignKey("images.number"), primary_key=True)


class PresetRow(Table):
    """Fields of a request that somebody saved under a name. ``fields``: as JSON."""

    __tablename__ = "presets"

    person: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    fields: Mapped[dict[str, Any]]


class PersonRow(Table):
    """A person: see :class:`safelight.queue.person.Person`. ``password``: the Argon2 hash of their password."""

    __tablename__ = "people"

    name: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    password: Mapped[str]
    weight: Mapped[float]
    created: Mapped[float]


class PersonKeyRow(Table):
    """An API key. ``name``: what it is for. ``digest``: the SHA-256 of the key. ``used``: when it was used last."""

    __tablename__ = "person_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    person: Mapped[str] = mapped_column(ForeignKey("people.name"))
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    created: Mapped[float]
    used: Mapped[float | None]


class PersonSessionRow(Table):
    """A browser in which somebody has logged in. ``digest``: the SHA-256 of its token."""

    __tablename__ = "person_sessions"

    digest: Mapped[str] = mapped_column(primary_key=True)
    person: Mapped[str] = mapped_column(ForeignKey("people.name"))
    created: Mapped[float]
    expires: Mapped[float]


class AuditRow(Table):
    """What somebody changed. Its columns are the fields of :class:`safelight.queue.audit_table.AuditEntry`."""

    __tablename__ = "audit"
    __table_args__ = ({"sqlite_autoincrement": True},)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[float]
    person: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[str]


class InputOwnerRow(Table):
    """A person has sent an input image. ``digest``: of its content."""

    __tablename__ = "input_owners"

    digest: Mapped[str] = mapped_column(primary_key=True)
    person: Mapped[str] = mapped_column(primary_key=True)
