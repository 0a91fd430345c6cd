"""The boards of a database: named groups of images. Each method is one transaction."""

from __future__ import annotations

import time
import uuid

from sqlalchemy import ColumnElement, func, or_, select, true, update
from sqlalchemy.orm import Session

from safelight.errors import InputError
from safelight.queue.people_table import require_fewer
from safelight.queue.person import LOCAL, Person
from safelight.queue.sql_database import SqlDatabase
from safelight.queue.stored_image import Board
from safelight.queue.tables import BoardRow, ImageRow


class BoardTable:
    """The boards that a person sees: their own, and those that others share. Only its owner changes a board.

    ``person``: whose view this is. An administrator sees and changes all boards.
    """

    def __init__(self, file: SqlDatabase, person: Person = LOCAL) -> None:
        self._file, self._person = file, person

    def seen_by(self, person: Person) -> BoardTable:
        """Return the boards as a person sees them."""
        return BoardTable(self._file, person)

    def all(self) -> list[Board]:
        """Return the boards by name."""
        with self._file.session() as session:
            return _boards(session, _visible(self._person))

    def add(self, name: str) -> Board:
        """Add a board. Raises InputError if the person has one with this name."""
        with self._file.writing() as session:
            _require_free_name(session, name, self._person.name)
            require_fewer(session, BoardRow, self._person.name, "boards")
            row = BoardRow(id=uuid.uuid4().hex, name=name, created=time.time(), person=self._person.name, shared=False)
            session.add(row)
            return Board(row.id, row.name, row.created, row.person)

    def change(self, board_id: str, name: str | None = None, shared: bool | None = None) -> Board | None:
        """Rename a board, or share it or not. None leaves a value as it is. Returns None if there is no such board.

        Raises InputError for the name of another board of its owner.
        """
        with self._file.writing() as session:
            row = self._own(session, board_id)
            if row is None:
                return None
            if name is not None and row.name != name:
                _require_free_name(session, name, row.person)
                row.name = name
            row.shared = row.shared if shared is None else shared
            session.flush()
            return _boards(session, BoardRow.id == board_id)[0]

    def delete(self, board_id: str) -> bool:
        """Delete a board. Its images stay, on no board. Returns whether it existed."""
        with self._file.writing() as session:
            row = self._own(session, board_id)
            if row is not None:
                session.execute(update(ImageRow).where(ImageRow.board == board_id).values(board=None))
                session.delete(row)
            return row is not None

    def _own(self, session: Session, board_id: str) -> BoardRow | None:
        row = session.get(BoardRow, board_id)
        return row if row is not None and self._person.owns(row.person) else None


def _visible(person: Person) -> ColumnElement[bool]:
    """Return the condition of the boards that a person sees."""
    return true() if person.sees_all else or_(BoardRow.person == person.name, BoardRow.shared)


def _boards(session: Session, which: ColumnElement[bool]) -> list[Board]:
    newest = (
        select(ImageRow.id)
        .where(ImageRow.board == BoardRow.id, ImageRow.trashed.is_(None))
        .order_by(ImageRow.created.desc(), ImageRow.number.desc())
        .limit(1)
        .scalar_subquery()
    )
    count = select(func.count()).where(ImageRow.board == BoardRow.id, ImageRow.trashed.is_(None)).scalar_subquery()
    columns = BoardRow.id, BoardRow.name, BoardRow.created, BoardRow.person, BoardRow.shared, count, newest
    query = select(*columns).where(which).order_by(func.lower(BoardRow.name), BoardRow.person)
    return [Board(*row[:6], cover=row[6] or "") for row in session.execute(query).tuples()]


def _require_free_name(session: Session, name: str, person: str) -> None:
    if session.scalar(select(BoardRow.id).where(BoardRow.name == name, BoardRow.person == person)):
        raise InputError(f"there is already a board {name!r}")
