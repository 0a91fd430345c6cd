"""`safelight models catalogue` and `safelight models get NAME`: from a catalogue to a model that draws."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from support import hub
from support.families import tiny_families
from support.hub import Site, served

from safelight.downloads import catalogue, connection, fetch, sources
from safelight.downloads.catalogue import Catalogue, CatalogueBundle, CatalogueFile


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Generator[Site]:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in (*connection.PROXIES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with served(Site()) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setenv("SAFELIGHT_DOWNLOAD_HOSTS", site.host)
        yield site


ROW = CatalogueFile("", "Tiny", "", "z-image", "", "", "", "fp32", None, None, None, "mit", False, "", "https://x")


@pytest.fixture
def rows(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, CatalogueFile]:
    """A catalogue of a tiny Z-Image, whose files are in two repositories."""
    files = tiny_families()["z-image"].write_files(tmp_path / "files", 5)
    made: dict[str, CatalogueFile] = {}
    for role, path in files.items():
        owner = "other/encoders" if role == "text_encoder" else "me/image"
        kind = {"transformer": "denoiser"}.get(role, role)
        variant = "turbo" if role == "transformer" else ""
        made[role] = replace(ROW, name=role.replace("_", "-"), kind=kind, variant=variant, source=owner, file=path.name)
    for owner in ("other/encoders", "me/image"):
        hub.add_repository(
            site, owner, {r.file: files[role].read_bytes() for role, r in made.items() if r.source == owner}
        )
    bundle = CatalogueBundle("tiny-8gb", "Tiny for 8 GB", "z-image", 8, tuple(row.name for row in made.values()))
    known = Catalogue({row.name: row for row in made.values()}, {bundle.name: bundle})
    monkeypatch.setattr(sources, "read_catalogue", lambda: known)
    monkeypatch.setattr(catalogue, "read_catalogue", lambda: known)
    return made


def test_a_bundle_draws(run, site: Site, rows: dict[str, CatalogueFile]) -> None:
    assert "tiny-8gb" in run("models", "catalogue", "--memory", 8).out
    done = run("models", "get", "tiny-8gb")
    assert done.code == 0, done.err
    drawn = run(
        "generate", "a cat", "-m", Path(rows["transformer"].file).stem, "--steps", 1, "--width", 64, "--height", 64
    )
    assert drawn.code == 0, drawn.err
    asked = len(site.seen)
    again = run("models", "get", "tiny-8gb")
    assert again.out.count("already there") == len(rows)
    assert not any("/resolve/" in path for _, path, _ in site.seen[asked:])


def test_what_the_library_has_under_another_name_is_not_fetched(
    run, site: Site, rows: dict[str, CatalogueFile], tmp_path: Path
) -> None:
    vae = tmp_path / "files" / rows["vae"].file
    renamed = (vae if vae.exists() else next((tmp_path / "files").rglob(rows["vae"].file))).rename(
        tmp_path / "ae.safetensors"
    )
    assert run("adapters", "add", renamed).code == 0
    done = run("models", "get", "tiny-8gb")
    assert done.code == 0, done.err
    assert "already there: ae" in done.out
    assert not any(path.endswith(rows["vae"].file) for _, path, _ in site.seen if "/resolve/" in path)


def test_what_the_source_replaced_is_said(run, rows: dict[str, CatalogueFile], monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(rows["vae"], sha256="0" * 64)
    monkeypatch.setattr(sources, "read_catalogue", lambda: Catalogue({old.name: old}, {}))
    done = run("models", "get", "vae")
    assert "the source replaced this file since the catalogue was written" in done.out
    assert "licence: " in done.out


def test_a_gated_file_says_what_to_do(
    run, site: Site, rows: dict[str, CatalogueFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_gated(site, "me/secret")
    row = replace(rows["vae"], source="me/secret", gated=True, todo="Accept the licence on its page.", license="other")
    monkeypatch.setattr(sources, "read_catalogue", lambda: Catalogue({row.name: row}, {}))
    done = run("models", "get", "vae")
    assert (done.code, "Accept the licence on its page." in done.err, "hf auth login" in done.err) == (2, True, True)
