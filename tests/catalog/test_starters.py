"""The starters are part of every library, read-only, and what their records say."""

from __future__ import annotations

from pathlib import Path

import pytest

import safelight
from safelight.catalog import starters
from safelight.catalog.library import Library
from safelight.errors import InputError

NAMES = ("starter-fluent", "starter-noto", "starter-twemoji")


def test_they_are_there_in_an_empty_library(root: Path) -> None:
    models = Library(root).models()
    assert tuple(model.name for model in models) == NAMES
    assert {(model.origin, model.base, model.dtype, model.resolution) for model in models} == {
        ("starter", "sd1", "fp16", 64)
    }
    assert [path.name for path in root.iterdir()] == ["attention.json"]


def test_they_are_what_their_records_say(root: Path) -> None:
    library = Library(root)
    for name in NAMES:
        model = library.verify(name)
        assert model.path.stat().st_size <= 32_000_000
        with pytest.raises(InputError, match="starter"):
            library.remove(name)
    assert len({model.digest for model in library.models()}) == 3
    assert len({model.manifest.component("vae").digest for model in library.models()}) == 1


def test_without_the_distribution_the_library_is_empty(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starters, "PACKAGE", "no_such_package")
    starters.models.cache_clear()
    try:
        assert Library(root).models() == []
    finally:
        starters.models.cache_clear()


def test_a_b_a_is_a_again(root: Path) -> None:
    engine = safelight.open_engine(root)
    images = [next(engine.generate(safelight.Request("red apple", name, steps=3))) for name in (*NAMES, NAMES[0])]
    digests = [image.pixels_sha256 for image in images]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3
    assert {(image.width, image.height) for image in images} == {(64, 64)}
