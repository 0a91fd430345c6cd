"""Compact files, earlier contents, canaries and versions, for clients."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import serving

from safelight.assembly.command_run import CommandRun
from safelight.errors import InputError


@pytest.mark.full
def test_a_model_is_written_smaller_for_a_client(tmp_path: Path) -> None:
    with serving.serving(tmp_path / "root") as server, server.client() as http:
        assert http.get("/api/v1/compacting").json()["state"] == "never"
        started = http.post("/api/v1/models/starter-noto/compact", json={"form": "q8_0"})
        assert (started.status_code, started.json()["state"]) == (202, "running")
        again = http.post("/api/v1/models/starter-noto/compact", json={"form": "q8_0"})
        assert (again.status_code, "is running" in again.json()["message"]) == (422, True)
        found = ended(http)
        assert (found["state"], found["problem"]) == ("done", "")
        name = found["report"]["name"]
        assert name in {one["name"] for one in http.get("/api/v1/models").json()}
        assert (tmp_path / "root/downloads" / found["about"]["file"]).is_file()
        # The file is there: a second time it is refused, by name.
        http.post("/api/v1/models/starter-noto/compact", json={"form": "q8_0"})
        assert found["about"]["file"] in ended(http)["problem"]


def ended(http: httpx.Client) -> dict[str, Any]:
    until = time.monotonic() + 120
    while (found := http.get("/api/v1/compacting").json())["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


def test_a_model_goes_back_to_its_earlier_content(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "models/dream.safetensors"
    path.parent.mkdir()
    (tmp_path / "safelight.yaml").write_text(f"model_folders: [{path.parent}]\n")
    with serving.serving(tmp_path) as server, server.client() as http:
        shutil.copy(tiny / "a.safetensors", path)
        first = http.post("/api/v1/models", json={"path": str(path)}).json()["digest"]
        path.rename(path.with_name("old.safetensors"))
        shutil.copy(tiny / "b.safetensors", path)
        second = http.post("/api/v1/models", json={"path": str(path)}).json()["digest"]
        assert first != second
        assert [one["digest"] for one in http.get("/api/v1/models/dream/earlier").json()] == [first]
        assert http.post("/api/v1/models/dream/rollback", json={}).json()["digest"] == first
        wrong = http.post("/api/v1/models/dream/rollback", json={"digest": "0" * 10})
        assert (wrong.status_code, "no earlier content" in wrong.json()["message"]) == (422, True)
        assert http.get("/api/v1/models/nobody/earlier").status_code == 404


def test_canaries_are_shown(http: httpx.Client) -> None:
    found = http.get("/api/v1/trust").json()
    assert isinstance(found["canaries"], list)
    assert found["soak_plot"] == ""
    assert http.get("/api/v1/doctor/soak.png").status_code == 404


def test_versions_of_safelight(http: httpx.Client) -> None:
    found = http.get("/api/v1/versions").json()
    [running] = [one for one in found if one["running"]]
    assert running["active"]
    assert "torch" in running["versions"]
    assert http.post("/api/v1/versions/nobody/activate").status_code == 404
    assert http.post(f"/api/v1/versions/{running['name']}/activate").json()["active"]


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    changes = list[str]()
    run = CommandRun(tmp_path, lambda: changes.append("changed"))
    run.start("models", "show", "nobody")
    with pytest.raises(InputError, match="is running"):
        run.start("models", "list")
    until = time.monotonic() + 60
    while run.state.state == "running":
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (run.state.state, "nobody" in run.state.problem) == ("failed", True)
    assert changes == ["changed", "changed"]
