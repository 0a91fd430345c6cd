"""The gallery's files: names that people can read, folders by date, and nothing left of what was not finished."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from safelight.errors import StorageError
from safelight.queue.export import export
from safelight.queue.image_files import THUMBNAIL, Gallery
from safelight.queue.stored_image import StoredImage
from safelight.queue.unfinished import UnfinishedImages
from safelight.request.results import Image
from safelight.request.schema import Request

TODAY = time.strftime("%Y-%m-%d")


@pytest.fixture(scope="module")
def image(shared_engine: Any) -> Image:
    request = Request("a/b", "starter-noto", seed=7, steps=1, width=64, height=64)
    return replace(next(shared_engine.generate(request)), model="国风 v3")


def stored(number: int, file: str, **more: object) -> StoredImage:
    return replace(StoredImage(f"{number:032x}", "j", 0, file, 16, 8, 7, "m", "d", "s", 1.0, {"request": {}}), **more)


def test_names_can_be_read_and_no_file_is_replaced(image: Image, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    names = [gallery.put(image, f"{number:032x}") for number in range(3)]
    assert names == [f"{TODAY}/国风-v3-7.png", f"{TODAY}/国风-v3-7-2.png", f"{TODAY}/国风-v3-7-3.png"]
    assert all((tmp_path / "images" / name).is_file() for name in names)
    other = Gallery(tmp_path, "{date}/{prompt}/{seed}")
    assert other.put(image, "f" * 32) == f"{TODAY}/a-b/7.png"


@pytest.mark.parametrize(("width", "height"), [(1600, 400), (400, 1600), (64, 64)])
def test_a_thumbnail_keeps_the_shape(width: int, height: int, image: Image, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.put(replace(image, width=width, height=height, pixels=bytes(width * height * 3)), "a" * 32)
    with PILImage.open(gallery.thumbnail("a" * 32)) as small:
        assert small.width * height == small.height * width
        assert max(small.size) == min(THUMBNAIL, max(width, height))


def test_a_thumbnail_that_was_lost_with_the_power_is_made_again(image: Image, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    one = stored(1, gallery.put(image, f"{1:032x}"))
    whole = gallery.thumbnail(one.id).read_bytes()
    gallery.thumbnail(one.id).write_bytes(b"")
    assert gallery.make_thumbnail(one).read_bytes() == whole


def test_a_thumbnail_for_which_there_is_no_room_leaves_nothing(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise StorageError(path, "cannot be written: No space left on device")

    gallery = Gallery(tmp_path / "gallery")
    monkeypatch.setattr("safelight.queue.image_files.write_whole", full)
    with pytest.raises(StorageError):
        gallery.put(image, "a" * 32)
    assert [path for path in (tmp_path / "gallery").rglob("*") if path.is_file() and path.stat().st_size] == []


def test_what_a_killed_server_left_goes_at_the_next_start(image: Image, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    done, unfinished, unmarked = (gallery.put(image, letter * 32) for letter in "abc")
    gallery.finish("c" * 32)
    own = tmp_path / "images" / TODAY / "mine.png"
    own.write_bytes(b"x")
    (tmp_path / "images" / TODAY / ".safelight-half").write_bytes(b"x")
    assert gallery.sweep({done, unmarked}) == 3
    assert (tmp_path / "images" / done).exists()
    assert not (tmp_path / "images" / unfinished).exists()
    assert not gallery.thumbnail("b" * 32).exists()
    assert own.exists()
    assert gallery.sweep(set()) == 0
    assert (tmp_path / "images" / done).exists()


def test_the_file_of_an_imported_image_stays(image: Image, tmp_path: Path) -> None:
    gallery, path = Gallery(tmp_path / "root"), tmp_path / "theirs.jpg"
    PILImage.new("RGB", (1000, 500), "red").save(path)
    imported = stored(1, str(path), imported=True)
    assert gallery.path(imported) == path
    with PILImage.open(gallery.make_thumbnail(imported)) as small:
        assert small.size == (THUMBNAIL, THUMBNAIL // 2)
    gallery.remove(imported)
    assert path.exists()
    assert not gallery.thumbnail(imported.id).exists()
    own = stored(2, gallery.put(image, f"{2:032x}"))
    gallery.remove(own)
    assert not gallery.path(own).parent.exists()


def test_an_archive_has_all_files_and_says_what_is_missing(image: Image, tmp_path: Path) -> None:
    gallery, path = Gallery(tmp_path / "root"), tmp_path / "a.png"
    path.write_bytes(b"picture")
    images = [
        stored(1, gallery.put(image, f"{1:032x}")),
        stored(2, str(path), imported=True),
        stored(3, str(tmp_path / "b" / "a.png"), imported=True),
    ]
    with zipfile.ZipFile(io.BytesIO(b"".join(export(images, gallery)))) as archive:
        assert archive.testzip() is None
        listed = json.loads(archive.read("images.json"))
        assert [one["file"] for one in listed] == [images[0].file, "imported/a.png", None]
        assert archive.read("imported/a.png") == b"picture"
        assert "No such file" in listed[2]["problem"]
        assert archive.read(images[0].file) == gallery.path(images[0]).read_bytes()


def test_an_old_file_and_a_killed_deletion(image: Image, tmp_path: Path) -> None:
    """ZIP has no time before 1980; a server that was killed while it deleted goes on at its next start."""
    gallery, path = Gallery(tmp_path / "root"), tmp_path / "old.png"
    path.write_bytes(b"picture")
    os.utime(path, (0, 0))
    old = stored(1, str(path), imported=True)
    with zipfile.ZipFile(io.BytesIO(b"".join(export([old], gallery)))) as archive:
        assert archive.read("imported/old.png") == b"picture"
    own = stored(2, gallery.put(image, f"{2:032x}"))
    gallery.finish(own.id)
    gallery.mark([old, own])
    assert gallery.sweep(set()) == 2
    assert path.exists()
    assert not gallery.path(own).exists()
    assert (tmp_path / "root/images/.unfinished.jsonl").read_bytes() == b""


def test_what_an_earlier_version_left_goes_too_and_a_line_that_was_cut_is_left_out(
    image: Image, tmp_path: Path
) -> None:
    gallery, markers = Gallery(tmp_path), tmp_path / "images/.unfinished"
    old, cut, new = (gallery.put(image, letter * 32) for letter in "abc")
    markers.mkdir()
    (markers / ("a" * 32)).write_text(old)
    listed = tmp_path / "images/.unfinished.jsonl"
    lines = listed.read_text().split("\n")
    assert lines[3].startswith(f'["{"b" * 32}"')
    listed.write_text("\n".join([lines[3][:40], *lines[4:]]))
    assert gallery.sweep(set()) == 4
    left = [(tmp_path / "images" / name).exists() for name in (old, cut, new)]
    assert left == [False, True, False]
    assert not markers.exists()
    assert gallery.sweep(set()) == 0


def test_images_that_were_imported_again_stay(image: Image, tmp_path: Path) -> None:
    """Somebody lost the database, and imported the folder of images into a new one."""
    gallery = Gallery(tmp_path)
    again, odd = gallery.put(image, "a" * 32), tmp_path / "images/.unfinished.jsonl"
    odd.write_text("5\n{}\n" + odd.read_text())
    assert gallery.sweep({str(gallery.path(stored(1, again)))}) == 0
    assert gallery.path(stored(1, again)).exists()


def test_the_list_of_unfinished_images_is_emptied_when_all_are_finished(tmp_path: Path) -> None:
    path = tmp_path / "list"
    unfinished = UnfinishedImages(path)
    unfinished.add({"a": "a.png"})
    unfinished.add({"b": "b.png", "c": ""})
    unfinished.finish("a")
    # Somebody may have a file of this name now, which must stay.
    assert unfinished.read() == {"b": "b.png", "c": ""}
    for image_id in "bc":
        unfinished.finish(image_id)
    assert path.read_bytes() == b""
    unfinished.keep({"d": "d.png"})
    assert UnfinishedImages(path).read() == {"d": "d.png"}
