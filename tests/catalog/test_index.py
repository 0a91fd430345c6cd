"""The index of records: always what the folder holds, and quick."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from safelight.catalog import index, records
from safelight.catalog.index import Index
from safelight.catalog.index_file import IndexFile
from safelight.catalog.library import Library
from safelight.errors import CorruptFileError


@pytest.fixture
def home(tiny: Path, tmp_path: Path) -> Path:
    library = Library(tmp_path / "home")
    for name in ("a", "b"):
        library.add(tiny / f"{name}.safetensors", name)
    return library.root


def opened(home: Path, reads: list[Path]) -> Index:
    def read(path: Path):
        reads.append(path)
        return records.read(path)

    return Index(home / "models", read, IndexFile(home / "index.db"))


def test_a_second_process_reads_no_record(home: Path) -> None:
    reads: list[Path] = []
    first = opened(home, reads).cards()
    assert list(first) == ["a", "b"]
    (home / "index.db").unlink()
    assert dict(opened(home, reads).cards()) == dict(first)
    count = len(reads)
    assert dict(opened(home, reads).cards()) == dict(first)
    assert len(reads) == count


def test_changes_are_seen_whoever_makes_them(home: Path, tiny: Path) -> None:
    reads: list[Path] = []
    ours, other = opened(home, reads), Library(home)
    assert set(ours.cards()) == {"a", "b"}
    for number in range(30):
        name = f"m{number}"
        other.add(tiny / "v2.safetensors", name)
        assert name in ours.cards()
        other.remove(name)
        assert name not in ours.cards()
        assert ours.get(name) is None


def test_another_content_under_the_same_name_is_seen(home: Path, tiny: Path) -> None:
    ours, other = opened(home, []), Library(home)
    seen = {ours.cards()["a"].digest}
    for form in ("b", "v2"):
        other.remove("a")
        other.add(tiny / f"{form}.safetensors", "a")
        assert ours.cards()["a"].digest == other.get("a").digest
        seen.add(ours.cards()["a"].digest)
    assert len(seen) == 3


@pytest.mark.parametrize("spoiled", [b"", b"not a database at all" * 100, None])
def test_what_is_wrong_with_the_cache_costs_nothing_but_time(spoiled: bytes | None, home: Path) -> None:
    reads: list[Path] = []
    right = dict(opened(home, reads).cards())
    cache = home / "index.db"
    if spoiled is not None:
        cache.write_bytes(spoiled)
    else:
        with sqlite3.connect(cache) as database:
            database.execute("UPDATE records SET card = '{}'")
    (home / "models/b.json").touch()
    for _ in range(2):
        assert {n: c.digest for n, c in opened(home, reads).cards().items()} == {n: c.digest for n, c in right.items()}


def test_a_damaged_record_is_a_card_with_its_problem(home: Path) -> None:
    record = home / "models/a.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "name": "other"}))
    found = opened(home, []).cards()
    assert "checksum" in found["a"].problem
    with pytest.raises(CorruptFileError, match="checksum"):
        opened(home, []).get("a")
    library = Library(home)
    assert [error.path for error in library.damaged()] == [record]
    library.remove("a")
    assert not record.exists()


def test_states_of_files(home: Path, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    shutil.copy(tiny / "a.safetensors", path)
    library = Library(home)
    library.add(path)

    def state() -> str:
        return next(card for card in library.cards() if card.name == "m").state()

    assert state() == "there"
    os.utime(path, (1, 1))
    assert state() == "changed"
    path.unlink()
    assert state() == "gone"


def test_many_records_are_listed_at_once(home: Path) -> None:
    """After the first look each further one costs a look at the folder's time."""
    values = json.loads((home / "models/a.json").read_text())
    values.pop("checksum")
    for number in range(300):
        text = records.encoded({**values, "name": f"n{number}"})
        (home / f"models/n{number}.json").write_bytes(text)
    ours = opened(home, [])
    assert len(ours.cards()) == 302
    time.sleep(2 * index.SETTLED_SECONDS)
    ours.cards()
    start = time.perf_counter()
    for _ in range(100):
        ours.cards()
    assert (time.perf_counter() - start) / 100 < 0.001
