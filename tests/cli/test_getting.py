"""`safelight models get`: from a server to a model that draws."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from support import adapters, forking, hub
from support.hub import Site, served

from safelight.downloads import connection, fetch


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Generator[Site]:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in (*connection.PROXIES, "HF_TOKEN", "CIVITAI_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with served(Site()) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setenv("CIVITAI_ENDPOINT", site.url)
        monkeypatch.setenv("SAFELIGHT_DOWNLOAD_HOSTS", site.host)
        yield site


def test_a_model_and_a_lora_are_downloaded_added_and_drawn_with(run, site: Site, tiny: Path, tmp_path: Path) -> None:
    hub.add_repository(site, "me/tiny", {"a.safetensors": (tiny / "a.safetensors").read_bytes(), "README.md": b"hello"})
    hub.add_civitai(site, 12, 34, adapters.write(tmp_path / "style.safetensors").read_bytes())
    done = run("models", "get", "me/tiny", "civitai:12")
    assert done.code == 0, done.err
    assert "licence: apache-2.0" in done.out
    assert "trigger words: glow, neon" in done.out
    assert "added style: lora" in done.out
    assert "added a: checkpoint" in done.out
    drawn = run("generate", "an apple <lora:style:0.5>", "-m", "a", "--steps", "1", "--width", 64, "--height", 64)
    assert drawn.code == 0, drawn.err
    again = run("models", "get", "me/tiny", "civitai:12", "--json")
    assert [row["known"] for row in again.rows] == [True, True]


def test_what_arrives_and_is_no_model_is_kept_and_not_added(run, site: Site) -> None:
    hub.add_repository(site, "me/odd", {"odd.safetensors": b"\x08\0\0\0\0\0\0\0{}      "})
    done = run("models", "get", "me/odd")
    assert done.code == 2
    assert "downloaded, but not added" in done.err
    assert "unknown kind of model" in done.err


def test_a_source_that_cannot_be_used_is_an_error_before_anything_is_asked(run, site: Site) -> None:
    done = run("models", "get", "me/tiny", "no source")
    assert (done.code, site.seen) == (2, [])
    assert "no source: is no source. It must be a repository on Hugging Face" in done.err


def test_without_adding(run, site: Site, tiny: Path) -> None:
    hub.add_repository(site, "me/tiny", {"a.safetensors": (tiny / "a.safetensors").read_bytes()})
    done = run("models", "get", "me/tiny", "--no-add", "--json")
    [row] = done.rows
    assert Path(row["path"]).read_bytes() == (tiny / "a.safetensors").read_bytes()
    assert "a" not in [row["name"] for row in run("models", "list", "--json").rows]


@pytest.mark.full
def test_killed_at_random_moments_and_resumed(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, twenty times. The bytes are equal in the end."""
    data = random.Random(3).randbytes(4_000_000)
    hub.add_repository(site, "me/large", {"large.safetensors": data})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    command = [sys.executable, "-m", "safelight.cli", "models", "get", "me/large", "--no-add"]
    command += ["--root", str(tmp_path / "root")]
    site.seconds_a_chunk = 0.1
    chance, killed = random.Random(5), 0
    target = tmp_path / "root/downloads/huggingface/me/large/large.safetensors"
    for _ in range(20):
        process = forking.REAL(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # A part of the time passes before the first byte.
        time.sleep(chance.uniform(0.5, 2.0))
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed > 10
    site.seconds_a_chunk = 0.0
    assert forking.REAL(command, stdout=subprocess.DEVNULL).wait() == 0
    assert target.read_bytes() == data
    assert len(site.ranges()) > 3
    assert [one.name for one in target.parent.iterdir() if not one.name.startswith(".")] == ["large.safetensors"]
