"""The starters are part of every library, read-only, and what their records say."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.families import tiny_families
from support.measured import MEASURED

import safelight
from safelight.catalog import starters
from safelight.catalog.library import Library
from safelight.errors import InputError

SD1 = ("starter-fluent", "starter-noto", "starter-twemoji")
NAMES = (*SD1, "starter-flux")


def test_they_are_there_in_an_empty_library(root: Path) -> None:
    found = {
        model.name: (model.origin, model.base, model.variant, model.resolution) for model in Library(root).models()
    }
    assert found == {
        **dict.fromkeys(SD1, ("starter", "sd1", "text-to-image", 64)),
        "starter-flux": ("starter", "flux", "dev", 128),
    }
    assert {path.name for path in root.iterdir()} == MEASURED


def test_they_are_what_their_records_say(root: Path) -> None:
    library = Library(root)
    for name in NAMES:
        model = library.verify(name)
        assert model.path.stat().st_size <= 32_000_000
        with pytest.raises(InputError, match="starter"):
            library.remove(name)
    assert len({model.digest for model in library.models()}) == len(NAMES)
    assert len({library.get(name).manifest.component("vae").digest for name in SD1}) == 1


def test_without_the_distribution_the_library_is_empty(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starters, "PACKAGE", "no_such_package")
    starters.models.cache_clear()
    try:
        assert Library(root).models() == []
    finally:
        starters.models.cache_clear()


def test_a_b_a_is_a_again(root: Path) -> None:
    engine = safelight.open_engine(root)
    names = [name for name in NAMES if name in SD1 or "flux" in tiny_families()]
    images = [next(engine.generate(safelight.Request("red apple", name, steps=3))) for name in (*names, names[0])]
    digests = [image.pixels_sha256 for image in images]
    assert digests[0] == digests[-1]
    assert len(set(digests)) == len(names)
    sides = [64 if name in SD1 else 128 for name in (*names, names[0])]
    assert [(image.width, image.height) for image in images] == [(side, side) for side in sides]
