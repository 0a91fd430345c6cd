"""The documentation site, as the server gives it to the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from playwright.sync_api import expect

from safelight.server.page import documentation

from .conftest import Open, shot

PAGE = "<!doctype html><title>x</title><script>document.title = 'ran'</script><script src='a.js'></script>"


def test_each_script_of_the_site_is_allowed_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text(PAGE)
    (tmp_path / "a.js").write_text("1")
    monkeypatch.setattr(documentation, "_PACKAGED", tmp_path)
    app = FastAPI()
    documentation.mount(app)
    client = TestClient(app)
    answer = client.get("/help/")
    assert answer.text == PAGE
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 1
    assert client.get("/help/a.js").text == "1"
    assert client.get("/help/../index.html").status_code == 404
    assert client.get("/help/nothing.html").status_code == 404


def test_without_a_site_there_is_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documentation, "_PACKAGED", tmp_path)
    monkeypatch.setattr(documentation, "_CHECKOUT", tmp_path)
    app = FastAPI()
    documentation.mount(app)
    assert TestClient(app).get("/help/index.html").status_code == 404


@pytest.mark.full
@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_the_page_links_into_the_site_and_its_search_finds(open_page: Open, language: str) -> None:
    if documentation.site() is None:
        pytest.skip("`make docs` builds the site")
    page = open_page("/settings", language=language)
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Documentation" if language == "en-US" else "文档").first.click()
    site = opened.value
    refused = list[str]()
    site.on("console", lambda message: refused.append(message.text) if "Security Policy" in message.text else None)
    site.reload()
    site.locator(".md-search__input").fill("quantised")
    expect(site.locator(".md-search-result__item").first).to_be_visible(timeout=20_000)
    shot(site, f"documentation-{language}")
    assert refused == []
