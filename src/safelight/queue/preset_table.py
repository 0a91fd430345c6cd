"""Presets: fields of requests that people saved under names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select

from safelight.queue.database_file import DatabaseFile
from safelight.queue.tables import PresetRow


class PresetTable:
    """The presets in a database. Each method is one transaction."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file

    def all(self) -> dict[str, dict[str, Any]]:
        """Return the fields of each preset, by name."""
        with self._file.session() as session:
            rows = session.scalars(select(PresetRow).order_by(func.lower(PresetRow.name)))
            return {row.name: dict(row.fields) for row in rows}

    def store(self, name: str, fields: Mapping[str, Any]) -> None:
        """Store a preset, in place of one with this name."""
        with self._file.writing() as session:
            session.merge(PresetRow(name=name, fields=dict(fields)))

    def delete(self, name: str) -> bool:
        """Delete a preset. Returns whether it existed."""
        with self._file.writing() as session:
            row = session.get(PresetRow, name)
            if row is not None:
                session.delete(row)
            return row is not None
