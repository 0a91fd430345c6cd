"""The server behind nginx, as docs/people.md says: at a path of its own, with TLS ended by the proxy."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright
from support import serving
from support.people import PASSWORD, add_people, as_person, key_of
from support.scale import thinned
from support.serving import ASK, ended

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"

DOCUMENT = Path(__file__).parents[2] / "docs/people.md"

pytestmark = pytest.mark.skipif(not Path(NGINX).exists(), reason="needs nginx (Debian: nginx-light)")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module", params=thinned(["removed", "as it is"]))
def proxied(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[serving.Server, str]]:
    """A server, and its address behind the proxy, which passes its path on as it is, or removes it."""
    root = tmp_path_factory.mktemp("proxied")
    add_people(root)
    (root / "safelight.yaml").write_text("root_path: /safelight\nforwarded_allow_ips: [127.0.0.1]\n")
    with serving.serving(root) as server:
        [block] = re.findall(r"```nginx\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
        if request.param == "removed":
            block = block.replace("http://127.0.0.1:9090;", "http://127.0.0.1:9090/;")
        block = block.replace("http://127.0.0.1:9090", server.url).replace("$scheme", "https")
        port, user = free_port(), "user root;" if os.getuid() == 0 else ""
        places = "".join(
            f"{name}_temp_path {root}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (root / "nginx.conf").write_text(
            f"{user} daemon off; pid {root}/nginx.pid; error_log {root}/error.log; events {{}}\n"
            f"http {{ access_log off; {places} server {{ listen 127.0.0.1:{port};\n{block}\n}} }}\n"
        )
        process = subprocess.Popen([NGINX, "-c", str(root / "nginx.conf"), "-p", str(root)])
        address = f"http://127.0.0.1:{port}/safelight"
        try:
            until = time.monotonic() + 30
            while True:
                try:
                    httpx.get(f"{address}/api/v1/health")
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.05)
            yield server, address
        finally:
            process.terminate()
            process.wait(30)


def test_apis_events_and_cookies_pass(proxied: tuple[serving.Server, str]) -> None:
    server, address = proxied
    heard: list[str] = []
    listens = threading.Event()
    headers = {"Authorization": f"Bearer {key_of('max')}"}

    def listen() -> None:
        with httpx.stream("GET", f"{address}/api/v1/events", headers=headers, timeout=60) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            listens.set()
            for line in stream.iter_lines():
                heard.append(line)
                if "event: image" in line:
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert listens.wait(30)
    with httpx.Client(base_url=address, headers=headers, timeout=60) as http:
        job = http.post("/api/v1/generate", json=ASK).json()["id"]
        assert ended(http, job)["state"] == "done"
        asked = {"prompt": "red apple", "model": "starter-noto", "size": "64x64", "response_format": "url"}
        [datum] = http.post("/v1/images/generations", json={**asked, "steps": 2}).json()["data"]
        assert datum["url"].startswith("https://127.0.0.1"), "as the client knows the server"
        assert "/safelight/api/v1/images/" in datum["url"]
        assert http.get(datum["url"].replace("https://", "http://")).status_code == 200
        answer = http.post("/api/v1/login", json={"name": "max", "password": PASSWORD})
        cookie = answer.headers["set-cookie"]
        assert "Secure" in cookie, "the browser speaks TLS with the proxy"
        assert "Path=/safelight/;" in cookie
    thread.join(30)
    assert any(line.startswith("event: progress") for line in heard)
    with as_person(server, "ada") as admin:
        [entry] = [one for one in admin.get("/api/v1/audit").json() if one["action"] == "login"][:1]
        assert entry["detail"] == "127.0.0.1"


def test_a_tool_names_images_as_its_client_knows_the_server(proxied: tuple[serving.Server, str]) -> None:
    pytest.importorskip("mcp")
    import httpx2
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    _, address = proxied
    ask = {"prompt": "red apple", "model": "starter-noto", "width": 64, "height": 64, "steps": 2}

    async def run() -> str:
        headers = {"Authorization": f"Bearer {key_of('max')}", "x-safelight-address": "http://elsewhere/"}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=60) as http,
            Client(streamable_http_client(f"{address}/mcp", http_client=http)) as client,
        ):
            made: Any = await client.call_tool("generate_image", ask)
            assert not made.is_error, made.content
            return made.structured_content["images"][0]["url"]

    url = asyncio.run(run())
    assert url.startswith(f"{address.replace('http:', 'https:')}/api/v1/images/"), url


def test_the_clients_address_is_what_the_proxy_says(proxied: tuple[serving.Server, str]) -> None:
    """So a limit on tries holds for each client, not for all who come through the proxy."""
    server, _ = proxied
    wrong = {"name": "max", "password": "wrong"}
    for client in ("203.0.113.7", "203.0.113.8"):
        headers = {"X-Forwarded-For": client}
        codes = [httpx.post(f"{server.url}/api/v1/login", json=wrong, headers=headers).status_code for _ in range(11)]
        assert codes == [401] * 10 + [429]


def test_the_page_works_at_a_path_of_its_own(proxied: tuple[serving.Server, str]) -> None:
    _, address = proxied
    found = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        # The cookie is only for TLS, which this test's proxy only claims: so the page gets a key.
        context = browser.new_context(extra_http_headers={"Authorization": f"Bearer {key_of('max')}"}, locale="en-US")
        page = context.new_page()
        page.on("response", lambda answer: wrong.append(answer.url) if answer.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{address}/")
        page.get_by_label("Prompt", exact=True).fill("red apple")
        page.get_by_role("button", name="Generate", exact=True).click()
        picture = page.locator(".thumbnail img").first
        expect(picture).to_be_visible(timeout=60_000)
        assert "/safelight/api/v1/images/" in (picture.get_attribute("src") or "")
        page.get_by_role("link", name="Gallery").click()
        assert page.url == f"{address}/gallery"
        # The address changes before the view does, and the view before also has thumbnails.
        page.locator(".gallery .thumbnail").first.click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert page.url.startswith(f"{address}/gallery/")
        page.reload()
        expect(page.get_by_role("dialog")).to_be_visible()
        page.go_back()
        browser.close()
    assert [one for one in wrong if "/help/" not in one] == []
