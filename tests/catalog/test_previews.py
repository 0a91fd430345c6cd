"""Preview pictures: beside a file, as other programs store them, or chosen by a user."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image as PILImage

from safelight.catalog import previews
from safelight.catalog.catalog import Catalog
from safelight.errors import CorruptFileError


@pytest.mark.parametrize("name", ["a.preview.png", "a.jpg", "a.preview.jpeg", "a.webp", "a.thumb.jpg", "a.swarm.jpg"])
def test_a_picture_beside_a_file_is_found(name: str, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "m/a.safetensors"
    model.parent.mkdir()
    model.hardlink_to(tiny / "a.safetensors")
    catalog = Catalog.under(tmp_path / "root")
    catalog.library.add(model, "国风 v3")
    (card,) = (one for one in catalog.library.cards() if one.name == "国风 v3")
    assert previews.find(card, tmp_path / "root") is None
    beside = model.with_name(name)
    PILImage.new("RGB", (800, 400), "red").save(beside)
    assert previews.find(card, tmp_path / "root") == beside
    with PILImage.open(io.BytesIO(previews.webp(beside))) as small:
        assert (small.format, small.size) == ("WEBP", (384, 192))
    other = tmp_path / "other.png"
    PILImage.new("RGB", (10, 20), "blue").save(other)
    previews.choose(card, tmp_path / "root", other)
    chosen = previews.find(card, tmp_path / "root")
    assert chosen is not None
    with PILImage.open(io.BytesIO(previews.webp(chosen))) as small:
        assert small.size == (10, 20)
    previews.choose(card, tmp_path / "root", None)
    assert previews.find(card, tmp_path / "root") == beside
    beside.write_bytes(b"no picture")
    with pytest.raises(CorruptFileError):
        previews.webp(beside)
