"""The catalogue's rows are whole, and a bundle's files arrive but for those that the library has."""

from __future__ import annotations

import re

import pytest

from safelight.downloads import sources
from safelight.downloads.catalogue import CatalogueFile, read_catalogue
from safelight.downloads.huggingface import PICKLES
from safelight.downloads.sources import RepositoryChoice
from safelight.errors import DownloadError
from safelight.families.registry import families
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS

ALONE = ("checkpoint", "denoiser")


@pytest.mark.parametrize("row", read_catalogue().files.values(), ids=lambda row: row.name)
def test_rows(row: CatalogueFile) -> None:
    """Each can be asked for, and names the page that says so."""
    family = families()[row.family]
    assert row.variant == "" or row.variant in family.variants
    assert re.fullmatch(r"[a-z0-9.-]+", row.name)
    assert row.cite.startswith("https://")
    assert not row.file.endswith(PICKLES)
    assert row.kind in (*ALONE, "text_encoder", "vae", "controlnet", "textual_inversion", *WEIGHT_ADAPTER_KINDS)
    assert row.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", row.sha256)
    assert not row.gated or row.todo
    assert len(sources.read_parts(row.name, RepositoryChoice())) == 1


def test_bundles() -> None:
    """Each has a model; where its family needs more than the file of the denoiser, text encoders and a VAE, too."""
    found = read_catalogue()
    assert found.files.keys().isdisjoint(found.bundles)
    assert len(found.bundles) >= 20
    for bundle in found.bundles.values():
        rows = found.find(bundle.name)
        kinds = [row.kind for row in rows]
        assert any(kind in ALONE for kind in kinds), bundle
        if "denoiser" in kinds:
            encoders = [role for role in families()[bundle.family].text_encoders if role != "text_conditioner"]
            assert kinds.count("text_encoder") == len(encoders), bundle
            assert kinds.count("vae") == 1, bundle
        assert len({row.variant for row in rows if row.variant}) <= 1
    shared = [name for bundle in found.bundles.values() for name in bundle.files]
    assert shared.count("flux-ae") > 5
    assert [one.name for one in found.bundles_for("z-image", 8)] == ["z-image-turbo-8gb"]


def test_choices_are_for_repositories() -> None:
    with pytest.raises(DownloadError, match="is in the catalogue"):
        sources.read_parts("flux-ae", RepositoryChoice(revision="main"))
