"""The tests of the queue run on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import postgres

from safelight.queue import database
from safelight.queue.database_server import open_server
from safelight.queue.sql_database import SqlDatabase

BOTH = ("test_database.py", "test_image_table.py", "test_people_table.py", "test_image_store.py")
"""Files whose tests are about databases."""


@pytest.fixture(autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``sqlite`` or ``postgresql``: where ``Database(folder)`` stores. Each folder has a database of its own."""
    asked: str = getattr(request, "param", "sqlite")
    if asked == "postgresql":
        folders: dict[Path, str] = {}

        def open_in_place(folder: Path, *, migrate: bool = True) -> SqlDatabase:
            url = folders.setdefault(folder, "") or postgres.cluster().new()
            folders[folder] = url
            return open_server(url, migrate=migrate)

        monkeypatch.setattr(database, "open_file", open_in_place)
    return asked


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of a database twice, unless it is about SQLite's file."""
    here = Path(metafunc.module.__file__ or "")
    if here.name not in BOTH or here.parent != Path(__file__).parent:
        return
    if metafunc.definition.get_closest_marker("sqlite") is not None:
        return
    both = ["sqlite", pytest.param("postgresql", marks=postgres.needs_postgres)]
    metafunc.parametrize("kind", both, indirect=True)


_: Callable[..., object] = kind
