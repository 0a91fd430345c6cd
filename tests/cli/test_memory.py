"""``memory``, ``fits`` and ``config show``: their output for users and scripts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from safelight.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["safelight", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main.run()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_memory_says_what_is_resident_and_why(run) -> None:
    code, out, _ = run("memory", "-m", "starter-noto")
    assert code == 0
    assert "budget" in out
    assert re.search(r"unet \w{16} float32 +38\.8 MB +38\.8 MB", out)
    assert "is needed and fits" in out
    code, out, _ = run("memory", "-m", "starter-noto", "--json")
    host = json.loads(out)["places"]["host"]
    assert host["stored"] == sum(usage["nbytes"] for usage in host["resident"])
    assert {step["action"] for step in host["last_plan"]} == {"load"}


def test_memory_of_a_device(run) -> None:
    code, out, _ = run("--device", "simulated", "memory", "-m", "starter-noto", "--json")
    places = json.loads(out)["places"]
    assert code == 0
    assert set(places) == {"host", "simulated"}
    assert places["simulated"]["resident"]


def test_fits_says_whole_in_part_or_not_at_all(run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("fits", "starter-noto", "--size", "128x128")
    assert (code, "fits whole" in out) == (0, True)
    monkeypatch.setenv("SAFELIGHT_MAX_CACHE_RAM_GB", "0.03")
    code, out, _ = run("fits", "starter-noto")
    assert (code, "fits in part" in out, "would hold the largest component whole" in out) == (0, True, True)
    monkeypatch.setenv("SAFELIGHT_MAX_CACHE_RAM_GB", "0.001")
    code, out, _ = run("fits", "starter-noto", "--json")
    answer = json.loads(out)
    assert (code, answer["fits"]) == (1, False)
    assert "; at least " in answer["summary"]
    code, _, err = run("fits", "starter-noto", "--size", "big")
    assert (code, "WIDTHxHEIGHT" in err) == (2, True)


def test_fits_answers_for_models_that_are_not_there_yet(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_MAX_CACHE_RAM_GB", "4")
    _, out, _ = run("fits", "--family", "flux2-klein-4b", "--precision", "bf16", "--json")
    answer = json.loads(out)
    totals = {component["component"]: component["total"] / 2e9 for component in answer["components"]}
    # The published counts are 4 billion for the transformer and for its text encoder.
    assert 3.8 < totals["transformer"] < 4.0
    # Of those, the layers after the 27th are not read.
    assert 3.0 < totals["text_encoder"] < 3.2
    assert "fits in part" in answer["summary"]
    sizes = {"z-image", "flux", "flux2-klein-4b", "flux2-klein-9b", "sdxl"}
    code, _, err = run("fits", "--family", "flux2-klein-5b")
    assert code == 2
    assert {size for size in sizes if size in err} == sizes
    code, _, err = run("fits")
    assert (code, "name a model, or a published size" in err) == (2, True)
    code, _, err = run("fits", "starter-noto", "--family", "flux")
    assert (code, "and not both" in err) == (2, True)


def test_fits_names_the_setting_of_the_memory_that_is_too_small(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_MAX_CACHE_RAM_GB", "0.03")
    _, out, _ = run("fits", "starter-noto", "--json")
    assert json.loads(out)["advice"][0].startswith("max_cache_ram_gb of ")
    monkeypatch.setenv("SAFELIGHT_MAX_CACHE_VRAM_GB", "0.012")
    _, out, _ = run("--device", "simulated", "fits", "starter-noto", "--json")
    assert json.loads(out)["advice"][0].startswith("max_cache_vram_gb of ")


def test_config_show_names_origins_and_what_was_ignored(run, tmp_path: Path) -> None:
    path = tmp_path / "invokeai.yaml"
    path.write_text("max_cache_ram_gb: 3\nlog_level: info\n")
    code, out, err = run("--config", path, "config", "show", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert {"name": "max_cache_ram_gb", "value": 3.0, "origin": str(path)} in rows
    assert {"name": "log_level", "ignored": "unknown setting"} in rows
    assert "log_level" in err
    code, out, _ = run("config", "show")
    assert "depends on the machine" in out
    code, _, err = run("--config", tmp_path / "none.yaml", "config", "show")
    assert (code, "cannot be read" in err) == (2, True)


def test_generate_under_a_file_of_settings(run, tmp_path: Path) -> None:
    digests = set[str]()
    for limit in ("1", "0.03"):
        path = tmp_path / f"{limit}.yaml"
        path.write_text(f"max_cache_ram_gb: {limit}\n")
        words = ("generate", "red apple", "-m", "starter-noto", "--steps", 2, "--seed", 0, "--out", tmp_path, "--json")
        code, out, _ = run("--config", path, *words)
        assert code == 0
        digests.add(json.loads(out)["pixels_sha256"])
    assert len(digests) == 1


def test_fits_answers_for_quantised_files_that_are_not_there_yet(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model does not fit otherwise, it stays quantised."""
    monkeypatch.setenv("SAFELIGHT_MAX_CACHE_RAM_GB", "3")
    totals: dict[str, dict[str, int]] = {}
    for form in ("bf16", "q4", "fp8"):
        _, out, _ = run("fits", "--family", "flux2-klein-4b", "--form", form, "--precision", "bf16", "--json")
        totals[form] = {one["component"]: one["total"] for one in json.loads(out)["components"]}
    for role in ("text_encoder", "transformer"):
        assert 0.27 < totals["q4"][role] / totals["bf16"][role] < 0.3
        assert 0.49 < totals["fp8"][role] / totals["bf16"][role] < 0.52
    assert totals["q4"]["vae"] == totals["bf16"]["vae"]
    code, _, err = run("fits", "--family", "flux", "--form", "q9")
    assert (code, "--form 'q9': must be one of q4, q5, q6, q8, bf16, fp8, q4_0" in err) == (2, True)
    code, _, err = run("fits", "starter-noto", "--form", "q4")
    assert (code, "--form: only with --family" in err) == (2, True)
