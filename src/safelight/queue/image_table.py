"""The images of a server in its database: lists, search, stars, tags and the trash.

Several threads may use it; each method is one transaction.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, func, insert, or_, select, true, update
from sqlalchemy.orm import Session

from safelight.errors import InputError
from safelight.queue import statements
from safelight.queue.person import LOCAL, Person
from safelight.queue.sql_database import SqlDatabase
from safelight.queue.stored_image import NO_BOARD, Facets, ImageChange, ImageFilter, ImagePage, StoredImage
from safelight.queue.tables import BoardRow, ImageLoraRow, ImageRow, ImageTagRow
from safelight.queue.text_index import TextIndex

AT_ONCE = 500
"""Images of one SQL statement; SQLite limits the number of its variables."""


ALL = ImageFilter()


class ImageTable:
    """The images that a person sees: their own, and those on boards that others share. Only its owner changes an image.

    ``person``: whose view this is. An administrator sees and changes all images.
    """

    def __init__(self, file: SqlDatabase, person: Person = LOCAL) -> None:
        self._file, self._person = file, person
        self._own: ColumnElement[bool] = true() if person.sees_all else ImageRow.person == person.name
        shared = select(BoardRow.id).where(BoardRow.shared)
        shown = ImageRow.board.in_(shared) & ImageRow.trashed.is_(None)
        self._visible = true() if person.sees_all else or_(self._own, shown)

    def seen_by(self, person: Person) -> ImageTable:
        """Return the images as a person sees them."""
        return ImageTable(self._file, person)

    def insert(self, connection: Connection, image: StoredImage) -> None:
        """Add an image within a transaction. The caller writes the image's file first."""
        values = {name: getattr(image, name) for name in _COLUMNS}
        more = {"job": image.job or None, "board": image.board or None, "metadata": image.metadata}
        number = connection.execute(statements.ADD_IMAGE, {**values, **more}).scalar_one()
        loras, tags = dict.fromkeys(image.loras), dict.fromkeys(image.tags)
        if loras:
            connection.execute(insert(ImageLoraRow), [{"image": number, "lora": lora} for lora in loras])
        if tags:
            connection.execute(insert(ImageTagRow), [{"image": number, "tag": tag} for tag in tags])
        self._file.texts.write(connection, number, _texts(image, loras, tags))

    def add_imported(self, images: Iterable[StoredImage]) -> int:
        """Add images that other programs or people have stored. Leaves out those whose file is known; returns the rest.

        The files stay where they are.
        """
        added = 0
        with self._file.transaction() as connection:
            for image in images:
                if not connection.scalar(select(ImageRow.number).where(ImageRow.file == image.file)):
                    self.insert(connection, image)
                    added += 1
        return added

    def known_files(self, files: Sequence[str]) -> set[str]:
        """Return those of these files that belong to an image."""
        found: set[str] = set()
        with self._file.session() as session:
            for part in _parts(files):
                found.update(session.scalars(select(ImageRow.file).where(ImageRow.file.in_(part))))
        return found

    def get(self, image_id: str) -> StoredImage | None:
        """Return an image, also if it is in the trash."""
        found = self.get_all([image_id])
        return found[0] if found else None

    def get_all(self, ids: Sequence[str]) -> list[StoredImage]:
        """Return images in the order of their identifiers; unknown identifiers are left out."""
        found: dict[str, StoredImage] = {}
        with self._file.session() as session:
            for part in _parts(ids):
                for image in _read(session, select(ImageRow).where(ImageRow.id.in_(part), self._visible)):
                    found[image.id] = image
        return [found[one] for one in dict.fromkeys(ids) if one in found]

    def of_job(self, job_id: str) -> list[StoredImage]:
        """Return the images of a job in their order, without those in the trash."""
        query = select(ImageRow).where(ImageRow.job == job_id, ImageRow.trashed.is_(None), self._visible)
        query = query.order_by(ImageRow.place)
        with self._file.session() as session:
            return _read(session, query)

    def page(self, wanted: ImageFilter = ALL, limit: int = 100, cursor: str = "") -> ImagePage:
        """Return the newest images that a filter lets through.

        ``cursor``: that of an earlier page. Images that are added or removed meanwhile neither skip nor repeat others.
        Raises InputError for a cursor that no page had.
        """
        query = self._filtered(select(ImageRow), wanted)
        if cursor:
            created, number = _read_cursor(cursor)
            query = query.where(
                (ImageRow.created < created) | ((ImageRow.created == created) & (ImageRow.number < number))
            )
        query = query.order_by(ImageRow.created.desc(), ImageRow.number.desc()).limit(limit + 1)
        with self._file.session() as session:
            rows = list(session.scalars(query))
            more = len(rows) > limit
            rows = rows[:limit]
            after = f"{rows[-1].created!r}-{rows[-1].number}" if more and rows else ""
            return ImagePage(_images(session, rows), after)

    def count(self, wanted: ImageFilter = ALL) -> int:
        """Return how many images a filter lets through."""
        with self._file.session() as session:
            return session.scalars(self._filtered(select(func.count()).select_from(ImageRow), wanted)).one()

    def ids(self, wanted: ImageFilter) -> list[str]:
        """Return the identifiers of all images that a filter lets through, the newest first."""
        query = self._filtered(select(ImageRow.id), wanted)
        query = query.order_by(ImageRow.created.desc(), ImageRow.number.desc())
        with self._file.session() as session:
            return list(session.scalars(query))

    def bytes_of(self, person: str) -> int:
        """Return the size of the files of a person's images, also of those in the trash, in bytes."""
        with self._file.session() as session:
            return int(session.scalars(select(func.sum(ImageRow.bytes)).where(ImageRow.person == person)).one() or 0)

    def facets(self) -> Facets:
        """Return the values by which images can be filtered."""
        # SQLite would look for this column alone by an index. As a term it is read from the index of each column.
        shown = func.coalesce(ImageRow.trashed, 0.0) == 0.0
        # Few images are in the trash, so to leave these out is quicker than to look up all others.
        in_trash = select(ImageRow.number).where(ImageRow.trashed.is_not(None))
        of_image = {
            "loras": (ImageLoraRow.lora, ImageLoraRow.image),
            "tags": (ImageTagRow.tag, ImageTagRow.image),
        }
        with self._file.session() as session:
            found: dict[str, dict[str, int]] = {}
            for name, column in (("models", ImageRow.model), ("programs", ImageRow.program)):
                query = select(column, func.count()).where(shown, self._visible).group_by(column)
                found[name] = _counts(session.execute(query).tuples())
            for name, (column, image) in of_image.items():
                query = select(column, func.count()).where(image.not_in(in_trash)).group_by(column)
                if not self._person.sees_all:
                    query = query.where(image.in_(select(ImageRow.number).where(self._visible)))
                found[name] = _counts(session.execute(query).tuples())
        return Facets(**found)

    def change(self, ids: Sequence[str], change: ImageChange) -> list[str]:
        """Change all of these images, or none. Returns the identifiers of the person's images, in the given order.

        Raises InputError if the person has no such board.
        """
        values: dict[str, Any] = {}
        if change.starred is not None:
            values["starred"] = change.starred
        if change.board is not None:
            values["board"] = None if change.board == NO_BOARD else change.board
        found: set[str] = set()
        with self._file.writing() as session:
            if values.get("board"):
                board = session.get(BoardRow, values["board"])
                if board is None or not self._person.owns(board.person):
                    raise InputError(f"there is no board {change.board}")
            for part in _parts(ids):
                rows = select(ImageRow.number, ImageRow.id).where(ImageRow.id.in_(part), self._own)
                numbers = dict(list(session.execute(rows).tuples()))
                found.update(numbers.values())
                here = ImageRow.number.in_(numbers)
                if values:
                    session.execute(update(ImageRow).where(here).values(**values))
                if change.trashed is not None:
                    # What is in the trash already keeps its time there.
                    moves = here & (ImageRow.trashed.is_(None) == change.trashed)
                    now = time.time() if change.trashed else None
                    session.execute(update(ImageRow).where(moves).values(trashed=now))
                if change.add_tags or change.remove_tags:
                    _change_tags(session, list(numbers), change, self._file.texts)
        return [one for one in dict.fromkeys(ids) if one in found]

    def store_check(self, image_id: str, same: bool) -> None:
        """Store whether a fresh process made the same pixels of an image of the person."""
        with self._file.writing() as session:
            session.execute(update(ImageRow).where(ImageRow.id == image_id, self._own).values(same=same))

    def own(self, ids: Sequence[str]) -> list[StoredImage]:
        """Return those of these images that the person may change."""
        return [image for image in self.get_all(ids) if self._person.owns(image.person)]

    def delete(self, ids: Sequence[str]) -> set[str]:
        """Delete the rows of images, not their files. Returns the images that were there until now."""
        deleted: set[str] = set()
        with self._file.writing() as session:
            for part in _parts(ids):
                numbers = list(session.scalars(select(ImageRow.number).where(ImageRow.id.in_(part), self._own)))
                for table in (ImageTagRow, ImageLoraRow):
                    session.execute(delete(table).where(table.image.in_(numbers)))
                self._file.texts.remove(session.connection(), numbers)
                gone = delete(ImageRow).where(ImageRow.number.in_(numbers)).returning(ImageRow.id)
                deleted.update(session.scalars(gone))
        return deleted

    def trashed_before(self, until: float) -> list[str]:
        """Return the images that were moved to the trash before a time."""
        with self._file.session() as session:
            return list(session.scalars(select(ImageRow.id).where(ImageRow.trashed < until)))

    def files(self) -> set[str]:
        """Return the files of all images, also of those in the trash."""
        with self._file.session() as session:
            return set(session.scalars(select(ImageRow.file)))

    def _filtered(self, query: Select[Any], wanted: ImageFilter) -> Select[Any]:
        query = _filtered(query.where(self._visible), wanted)
        return query.where(self._file.texts.finds(wanted.search)) if wanted.search else query


_COLUMNS = (
    *("id", "place", "file", "width", "height", "seed", "model", "model_digest", "pixels_sha256", "created"),
    *("prompt", "negative", "program", "imported", "starred", "trashed", "same", "person", "bytes"),
)
"""Columns whose values are those of :class:`StoredImage`."""


def _parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[at : at + AT_ONCE] for at in range(0, len(values), AT_ONCE))


def _counts(rows: Iterable[tuple[str, int]]) -> dict[str, int]:
    return dict(sorted((row for row in rows if row[0]), key=lambda row: (-row[1], row[0])))


def _read_cursor(cursor: str) -> tuple[float, int]:
    created, _, number = cursor.rpartition("-")
    try:
        found = float(created), int(number)
        if not (math.isfinite(found[0]) and 0 <= found[1] < 1 << 63):
            raise ValueError
        return found
    except ValueError as error:
        raise InputError(f"cursor {cursor!r} is not one that a list of images had") from error


def _filtered(query: Select[Any], wanted: ImageFilter) -> Select[Any]:
    query = query.where(ImageRow.trashed.is_not(None) if wanted.trashed else ImageRow.trashed.is_(None))
    exact = {
        ImageRow.model: wanted.model or None,
        ImageRow.program: wanted.program or None,
        ImageRow.seed: wanted.seed,
        ImageRow.starred: wanted.starred,
        ImageRow.person: wanted.person,
    }
    for column, value in exact.items():
        if value is not None:
            query = query.where(column == value)
    if wanted.board:
        query = query.where(ImageRow.board.is_(None) if wanted.board == NO_BOARD else ImageRow.board == wanted.board)
    if wanted.after is not None:
        query = query.where(ImageRow.created >= wanted.after)
    if wanted.before is not None:
        query = query.where(ImageRow.created < wanted.before)
    if wanted.tag:
        query = query.where(ImageRow.number.in_(select(ImageTagRow.image).where(ImageTagRow.tag == wanted.tag)))
    if wanted.lora:
        query = query.where(ImageRow.number.in_(select(ImageLoraRow.image).where(ImageLoraRow.lora == wanted.lora)))
    return query


def _read(session: Session, query: Select[Any]) -> list[StoredImage]:
    rows: list[ImageRow] = list(session.scalars(query))
    return _images(session, rows)


def _images(session: Session, rows: Sequence[ImageRow]) -> list[StoredImage]:
    """Return rows as images, with their LoRAs and tags."""
    loras: Mapping[int, list[str]] = defaultdict(list)
    tags: Mapping[int, list[str]] = defaultdict(list)
    numbers = [row.number for row in rows]
    for at in range(0, len(numbers), AT_ONCE):
        part = numbers[at : at + AT_ONCE]
        used = select(ImageLoraRow.image, ImageLoraRow.lora).where(ImageLoraRow.image.in_(part))
        for number, lora in session.execute(used.order_by(ImageLoraRow.lora)).tuples():
            loras[number].append(lora)
        given = select(ImageTagRow.image, ImageTagRow.tag).where(ImageTagRow.image.in_(part))
        for number, tag in session.execute(given.order_by(ImageTagRow.tag)).tuples():
            tags[number].append(tag)
    return [
        StoredImage(
            **{name: getattr(row, name) for name in _COLUMNS},
            job=row.job or "",
            board=row.board or "",
            metadata=dict(row.image_metadata),
            loras=tuple(loras[row.number]),
            tags=tuple(tags[row.number]),
        )
        for row in rows
    ]


def index_texts(session: Session, row: ImageRow, texts: TextIndex) -> None:
    """Write an image's texts into the full-text index, in place of earlier ones."""
    loras = session.scalars(select(ImageLoraRow.lora).where(ImageLoraRow.image == row.number))
    tags = session.scalars(select(ImageTagRow.tag).where(ImageTagRow.image == row.number))
    texts.write(session.connection(), row.number, _texts(row, loras, tags))


def _texts(image: ImageRow | StoredImage, loras: Iterable[str], tags: Iterable[str]) -> tuple[str, ...]:
    """Return the texts by which an image is found, in the order of :data:`safelight.queue.text_index.COLUMNS`."""
    file = image.file.replace("\\", "/").rpartition("/")[2] if image.imported else ""
    return image.prompt, " ".join((image.model, *loras)), " ".join(tags), file


def _change_tags(session: Session, numbers: Sequence[int], change: ImageChange, texts: TextIndex) -> None:
    if change.remove_tags:
        gone = ImageTagRow.image.in_(numbers) & ImageTagRow.tag.in_(change.remove_tags)
        session.execute(delete(ImageTagRow).where(gone))
    for tag in dict.fromkeys(change.add_tags):
        have = set(session.scalars(select(ImageTagRow.image).where(ImageTagRow.tag == tag)))
        new = [{"image": number, "tag": tag} for number in numbers if number not in have]
        if new:
            session.execute(insert(ImageTagRow), new)
    for row in session.scalars(select(ImageRow).where(ImageRow.number.in_(numbers))):
        index_texts(session, row, texts)
