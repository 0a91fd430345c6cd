"""Downloads over HTTP: only where they are allowed, and to the end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support import hub
from support.hub import Site, served
from support.serving import serving

from safelight.server.apis.native_downloads import may_download
from safelight.settings import Settings


def test_a_server_downloads_only_where_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "safelight.yaml").write_text("allow_downloads: false\n")
    with serving(tmp_path) as server, server.client() as http:
        answer = http.post("/api/v1/downloads", json={"source": "me/tiny"})
        assert answer.status_code == 403
        assert "allow_downloads" in answer.text
        assert http.get("/api/v1/downloads").json() == []
        assert http.get(f"/api/v1/downloads/{'0' * 32}").status_code == 404
        assert http.post(f"/api/v1/downloads/{'0' * 32}/cancel").status_code == 404
        assert http.get("/api/v1/catalogue").json()["may_download"] is False


@pytest.mark.parametrize(
    ("host", "allowed", "may"),
    [("127.0.0.1", None, True), ("0.0.0.0", None, False), ("0.0.0.0", True, True), ("127.0.0.1", False, False)],
)
def test_by_default_only_a_server_of_this_machine_downloads(
    host: str, allowed: bool | None, may: bool, tmp_path: Path
) -> None:
    assert may_download(Settings(root=tmp_path, host=host, allow_downloads=allowed)) is may


@pytest.mark.full
def test_a_client_downloads_a_model_and_draws_with_it(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(Site()) as site:
        hub.add_repository(site, "me/tiny", {"a.safetensors": (tiny / "a.safetensors").read_bytes()})
        for name, value in {
            "SAFELIGHT_ALLOW_DOWNLOADS": "true",
            "SAFELIGHT_DOWNLOAD_HOSTS": site.host,
            "HF_ENDPOINT": site.url,
            "HF_HUB_OFFLINE": "0",
        }.items():
            monkeypatch.setenv(name, value)
        with serving(tmp_path / "root", real=True) as server, server.client() as http:
            refused = http.post("/api/v1/downloads", json={"source": "no source"})
            assert refused.status_code == 422
            assert "is no source" in refused.text
            begun = http.post("/api/v1/downloads", json={"source": "me/tiny", "name": "mine"})
            assert begun.status_code == 202
            until = time.monotonic() + 30
            while (one := http.get(f"/api/v1/downloads/{begun.json()['id']}").json())["state"] not in (
                "done",
                "failed",
            ):
                assert time.monotonic() < until
                time.sleep(0.05)
            assert (one["state"], one["added"]) == ("done", ["mine"])
            asked = {"prompt": "an apple", "model": "mine", "steps": 1, "width": 64, "height": 64}
            assert http.post("/api/v1/generate", json=asked).status_code == 202
