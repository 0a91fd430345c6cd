"""Lists of images: search, filters, boards, stars, tags, the trash, and pages that skip nothing."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from safelight.errors import InputError, UnreadableFileError
from safelight.queue import database_file
from safelight.queue.database import Database
from safelight.queue.image_table import ImageTable
from safelight.queue.search_text import search_expression
from safelight.queue.stored_image import NO_BOARD, ImageChange, ImageFilter, StoredImage


@pytest.fixture
def database(tmp_path: Path) -> Generator[Database]:
    made = Database(tmp_path)
    yield made
    made.close()


@pytest.fixture
def table(database: Database) -> ImageTable:
    return database.images


def made(number: int, **more: object) -> StoredImage:
    start = StoredImage(
        f"{number:032x}", "", 0, f"/pictures/{number}.png", 8, 8, number, "m", "", "", float(number), {"a": number}
    )
    return replace(start, imported=True, **more)


def ids(table: ImageTable, **wanted: object) -> list[int]:
    found = [int(one, 16) for one in table.ids(ImageFilter(**wanted))]
    assert table.count(ImageFilter(**wanted)) == len(found)
    assert [int(one.id, 16) for one in table.page(ImageFilter(**wanted), 1000).images] == found
    return found


def test_images_are_found_by_what_they_are(table: ImageTable) -> None:
    table.add_imported(
        [
            made(1, prompt="a red fox, snow", model="sdxl", loras=("ink", "detail"), program="A1111"),
            made(2, prompt="Café at night", model="flux", tags=("keep",)),
            made(3, prompt="一只红色的狐狸", model="flux", loras=("ink",)),
            made(4, prompt="foxglove", negative="snow", starred=True),
        ]
    )
    assert ids(table) == [4, 3, 2, 1]
    assert ids(table, search="fox") == [4, 1]
    assert ids(table, search='"red fox"') == [1]
    assert ids(table, search='"fox"') == [1]
    assert ids(table, search='"fox red"') == []
    assert ids(table, search="cafe NIGHT") == [2]
    assert ids(table, search="红色") == [3]
    assert ids(table, search="狐狸 flux") == [3]
    assert ids(table, search="色狐") == []
    assert ids(table, search="ink") == [3, 1]
    assert ids(table, search="keep") == [2]
    assert ids(table, search="snow") == [1]
    assert ids(table, search="4.png") == [4]
    assert ids(table, search="-- ()") == []
    assert ids(table, model="flux") == [3, 2]
    assert ids(table, model="flux", lora="ink") == [3]
    assert ids(table, tag="keep") == [2]
    assert ids(table, starred=True) == [4]
    assert ids(table, starred=False, program="A1111") == [1]
    assert ids(table, seed=3) == [3]
    assert ids(table, after=2.0, before=4.0) == [3, 2]
    facets = table.facets()
    assert (dict(facets.models), dict(facets.loras)) == ({"flux": 2, "m": 1, "sdxl": 1}, {"ink": 2, "detail": 1})
    assert (dict(facets.tags), dict(facets.programs)) == ({"keep": 1}, {"Safelight": 3, "A1111": 1})


@pytest.mark.sqlite
@given(st.text())
@settings(deadline=None)
def test_every_search_is_one_that_the_database_understands(search: str) -> None:
    expression = search_expression(search)
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE VIRTUAL TABLE t USING fts5(a, tokenize = 'unicode61 remove_diacritics 2')")
        connection.execute("INSERT INTO t VALUES (?)", ("x",))
        if expression:
            connection.execute("SELECT rowid FROM t WHERE t MATCH ?", (expression,)).fetchall()


def test_tags_can_be_searched_as_soon_as_they_are_there(table: ImageTable) -> None:
    table.add_imported([made(1), made(2)])
    both = [made(1).id, made(2).id, "unknown"]
    assert table.change(both, ImageChange(add_tags=("good one", "x"))) == both[:2]
    assert table.change(both[:1], ImageChange(add_tags=("x",), remove_tags=("good one",))) == both[:1]
    assert ids(table, search="good") == [2]
    assert ids(table, tag="x") == [2, 1]
    assert [one.tags for one in table.get_all(both)] == [("x",), ("good one", "x")]


def test_an_image_is_on_one_board_or_on_none(database: Database) -> None:
    table, boards = database.images, database.boards
    table.add_imported([made(n) for n in range(4)])
    cats, dogs = boards.add("cats"), boards.add("Dogs")
    table.change([made(1).id, made(2).id], ImageChange(board=cats.id))
    table.change([made(2).id], ImageChange(board=dogs.id, starred=True))
    assert ids(table, board=cats.id) == [1]
    assert ids(table, board=dogs.id, starred=True) == [2]
    assert ids(table, board=NO_BOARD) == [3, 0]
    assert [(one.name, one.images, one.cover) for one in boards.all()] == [
        ("cats", 1, made(1).id),
        ("Dogs", 1, made(2).id),
    ]
    with pytest.raises(InputError, match="already a board 'cats'"):
        boards.change(dogs.id, "cats")
    renamed = boards.change(cats.id, "cats and more")
    assert renamed is not None
    assert (renamed.name, renamed.images) == ("cats and more", 1)
    with pytest.raises(InputError, match="no board"):
        table.change([made(3).id], ImageChange(board="f" * 32, starred=True))
    assert ids(table, starred=True) == [2]
    assert boards.delete(cats.id)
    assert not boards.delete(cats.id)
    assert boards.change(cats.id, "x") is None
    assert ids(table, board=NO_BOARD) == [3, 1, 0]


def test_the_trash_hides_images_and_gives_them_back(table: ImageTable) -> None:
    table.add_imported([made(1, tags=("t",)), made(2)])
    before = time.time()
    table.change([made(1).id], ImageChange(trashed=True))
    assert ids(table) == [2]
    assert ids(table, trashed=True) == [1]
    assert not table.facets().tags
    (first,) = table.get_all([made(1).id])
    assert first.trashed is not None
    assert first.trashed >= before
    # Once more: it keeps its time there.
    table.change([made(1).id, made(2).id], ImageChange(trashed=True))
    assert table.get(first.id) == first
    assert table.trashed_before(before) == []
    assert set(table.trashed_before(time.time() + 1)) == {made(1).id, made(2).id}
    table.change([made(1).id], ImageChange(trashed=False))
    assert ids(table) == [1]
    table.delete([made(1).id, made(2).id])
    assert ids(table) == ids(table, trashed=True) == []
    # Nothing of them is left in the index.
    table.add_imported([made(3)])
    assert ids(table, search="t") == []


def test_a_list_skips_and_repeats_nothing_while_images_come_and_go(table: ImageTable) -> None:
    """Many have the same time, because files that were copied together have."""
    chance = random.Random(7)
    stays = [made(n, created=float(n // 10)) for n in range(200)]
    table.add_imported(chance.sample(stays, 200))
    seen: list[str] = []
    cursor, number = "", 1000
    while True:
        page = table.page(limit=7, cursor=cursor)
        seen += [image.id for image in page.images]
        number += 1
        table.add_imported([made(number, created=chance.choice([0.0, 5.0, 99.0]))])
        goes = chance.choice(seen)
        table.change([goes], ImageChange(trashed=True))
        cursor = page.next
        if not cursor:
            break
    assert len(seen) == len(set(seen))
    assert set(seen) >= {image.id for image in stays}
    with pytest.raises(InputError, match="cursor 'x-1'"):
        table.page(cursor="x-1")


def test_an_imported_file_is_added_once(table: ImageTable) -> None:
    assert table.add_imported([made(1), made(2)]) == 2
    assert table.add_imported([replace(made(1), id="f" * 32), made(3)]) == 1
    assert table.known_files([made(1).file, "/other"]) == {made(1).file}


@pytest.mark.sqlite
def test_a_database_without_boards_is_migrated_with_its_images(tmp_path: Path) -> None:
    """Also if an earlier attempt ended anywhere."""
    request = {"prompt": "红 fox", "negative": "blur", "loras": [{"name": "ink", "strength": 1}, {"name": "ink"}]}
    config = Config()
    config.set_main_option("script_location", str(Path(database_file.__file__).with_name("migrations")))
    with create_engine(f"sqlite:///{tmp_path / database_file.FILE}").begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
    with sqlite3.connect(tmp_path / database_file.FILE) as other:
        other.execute(
            "INSERT INTO jobs (id, document, model_digest, client, created, state, priority, overtaken, delayed, "
            "attempts, images, reason, failure) VALUES ('j', '{}', 'd', '', 0, 'done', 0, 0, 0, 1, 2, '', '')"
        )
        for place in range(2):
            other.execute(
                "INSERT INTO images VALUES (?, 'j', ?, ?, 8, 9, 3, 'm', 'd', 's', ?, ?)",
                (f"i{place}", place, f"i{place}.png", 5.0 - place, json.dumps({"request": request})),
            )
    with pytest.raises(UnreadableFileError, match="stop that server"):
        Database(tmp_path, migrate=False)
    for interrupted in (False, True):
        if interrupted:
            with sqlite3.connect(tmp_path / database_file.FILE) as other:
                other.execute("UPDATE alembic_version SET version_num = '0004'")
                other.execute("ALTER TABLE images RENAME TO images_new")
                other.execute("DROP TABLE image_tags")
        database = Database(tmp_path)
        images = database.images
        assert [one.id for one in images.page().images] == ["i0", "i1"]
        (first, _) = images.of_job("j")
        assert (first.prompt, first.negative, first.loras) == ("红 fox", "blur", ("ink",))
        assert (first.file, first.width, first.height, first.program) == ("i0.png", 8, 9, "Safelight")
        assert images.ids(ImageFilter(search="红 ink")) == ["i0", "i1"]
        database.close()
    Database(tmp_path, migrate=False).close()


def test_many_threads_tag_move_and_add_boards_at_once(tmp_path: Path) -> None:
    """What one reads, no other changes before it writes."""
    database = Database(tmp_path)
    table, boards = database.images, database.boards
    table.add_imported([made(n) for n in range(5)])
    wrong, taken = list[Exception](), list[str]()

    def work() -> None:
        for number in range(12):
            try:
                table.change([made(n).id for n in range(5)], ImageChange(add_tags=(f"t{number}",), starred=True))
                boards.add(f"b{number}")
            except InputError as error:
                taken.append(str(error))
            except Exception as error:  # noqa: BLE001 - any other one is what this test looks for
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all("already a board" in text for text in taken)
    assert len(boards.all()) == 12
    assert dict(table.facets().tags) == {f"t{n}": 5 for n in range(12)}


@pytest.mark.parametrize("cursor", ["1.0-99999999999999999999999", "nan-1", "inf-1", "1.0--1", "-", "1e999-1"])
def test_a_cursor_that_no_list_had_is_refused(cursor: str, table: ImageTable) -> None:
    with pytest.raises(InputError, match="cursor"):
        table.page(cursor=cursor)
