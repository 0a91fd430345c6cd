"""Presets: fields of requests that people saved under names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select

from safelight.queue.people_table import require_fewer
from safelight.queue.person import LOCAL, Person
from safelight.queue.sql_database import SqlDatabase
from safelight.queue.tables import PresetRow


class PresetTable:
    """The presets of one person. Each method is one transaction."""

    def __init__(self, file: SqlDatabase, person: Person = LOCAL) -> None:
        self._file, self._person = file, person

    def of(self, person: Person) -> PresetTable:
        """Return the presets of a person."""
        return PresetTable(self._file, person)

    def all(self) -> dict[str, dict[str, Any]]:
        """Return the fields of each preset, by name."""
        query = select(PresetRow).where(PresetRow.person == self._person.name).order_by(func.lower(PresetRow.name))
        with self._file.session() as session:
            return {row.name: dict(row.fields) for row in session.scalars(query)}

    def store(self, name: str, fields: Mapping[str, Any]) -> None:
        """Store a preset, in place of one with this name."""
        with self._file.writing() as session:
            if session.get(PresetRow, (self._person.name, name)) is None:
                require_fewer(session, PresetRow, self._person.name, "presets")
            session.merge(PresetRow(person=self._person.name, name=name, fields=dict(fields)))

    def delete(self, name: str) -> bool:
        """Delete a preset. Returns whether it existed."""
        with self._file.writing() as session:
            row = session.get(PresetRow, (self._person.name, name))
            if row is not None:
                session.delete(row)
            return row is not None
