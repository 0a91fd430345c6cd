"""Pictures of all programs come into the gallery, and their files stay where they are."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from support.foreign_pictures import NEGATIVE, PICTURES, PROMPT

import safelight
from safelight.errors import UnreadableFileError
from safelight.queue.database import Database
from safelight.queue.image_files import FileForm, save
from safelight.queue.image_import import import_pictures
from safelight.queue.stored_image import ImageFilter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture of each program, three others, and files that do not count."""
    folder = tmp_path / "out put"
    for number, (label, make) in enumerate(PICTURES.items()):
        data = make()
        with PILImage.open(io.BytesIO(data)) as picture:
            ending = str(picture.format).lower()
        path = folder / f"2026-11-{number + 1:02}" / f"{label.replace('/', ' ')}.{ending}"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    PILImage.new("RGB", (4, 4)).save(folder / "photo.JPG", "JPEG")
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    return folder


def test_each_program_is_read_and_nothing_is_copied(folder: Path, tmp_path: Path) -> None:
    table = Database(tmp_path / "root").images
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = list(import_pictures(folder, table))
    assert Counter(one.state for one in done) == {"imported": len(PICTURES), "left out": 1, "refused": 1}
    assert "damaged" in next(one.problem for one in done if one.state == "refused")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    images = table.page(limit=1000).images
    assert {image.program for image in images} >= {"A1111", "ComfyUI", "InvokeAI", "NovelAI", "Fooocus", "SwarmUI"}
    for image in images:
        assert image.imported
        assert image.prompt.startswith(PROMPT[:10])
        assert image.created == os.stat(image.file).st_mtime
        assert not image.pixels_sha256
    assert any(image.negative == NEGATIVE for image in images)
    # Again: only what is new. With --all, also the photo.
    assert Counter(one.state for one in import_pictures(folder, table)) == {
        "known": len(PICTURES),
        "left out": 1,
        "refused": 1,
    }
    assert sum(one.state == "imported" for one in import_pictures(folder, table, every=True)) == 1
    assert table.count(ImageFilter(program="unknown program")) == 1


def test_own_images_can_be_checked_again_if_their_pixels_are_whole(shared_engine: Any, tmp_path: Path) -> None:
    request = safelight.Request("red apple", "starter-noto", seed=3, steps=1, width=64, height=64)
    image = next(shared_engine.generate(request))
    for form in ("png", "jpeg", "webp"):
        save(image, tmp_path / "out", FileForm(form))
    table = Database(tmp_path / "root").images
    list(import_pictures(tmp_path / "out", table))
    found = {Path(one.file).suffix: one for one in table.page().images}
    assert {one: image_.pixels_sha256 for one, image_ in found.items()} == {
        ".png": image.pixels_sha256,
        ".webp": image.pixels_sha256,
        ".jpg": "",
    }
    for one in found.values():
        assert (one.model, one.model_digest, one.seed) == (image.model, image.model_digest, 3)
        assert one.metadata["request"]["prompt"] == "red apple"


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="is not a folder"):
        list(import_pictures(tmp_path / "nothing", Database(tmp_path).images))


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes only there")
def test_a_name_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    with open(os.fsencode(place) + b"/\xff.png", "wb") as file:
        file.write(PICTURES["ComfyUI"]())
    (one,) = import_pictures(place, Database(tmp_path).images)
    assert (one.state, one.problem) == ("refused", "has a name that is no text")
