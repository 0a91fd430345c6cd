"""What goes wrong while the page is used: it says so, loses nothing, and goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support import serving

IMAGES = ".sheet .thumbnail img"


def drawing(browser: Browser, server: serving.Server, steps: int) -> Page:
    """A page that has asked for an image."""
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_role("button", name="Generate").click()
    return page


@pytest.mark.full
def test_a_server_that_stops_and_starts_again(browser: Browser, tmp_path: Path) -> None:
    with serving.serving(tmp_path / "root") as first:
        port = first.url.rsplit(":", 1)[1]
        page = drawing(browser, first, steps=150)
        page.locator(".running").wait_for(timeout=60_000)
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    expect(page.get_by_text("The server does not answer")).to_be_visible(timeout=15_000)
    page.get_by_label("Negative prompt", exact=True).fill("blur")
    with serving.serving(tmp_path / "root", "--port", port):
        expect(page.get_by_text("The server does not answer")).to_be_hidden(timeout=30_000)
        expect(page.get_by_label("Negative prompt", exact=True)).to_have_value("blur")
        # The job of before is made by the new server.
        page.locator(IMAGES).first.wait_for(timeout=120_000)
    page.close()


@pytest.mark.full
def test_a_worker_that_dies(browser: Browser, tmp_path: Path) -> None:
    with serving.serving(tmp_path / "root") as server:
        page = drawing(browser, server, steps=100)
        page.locator(".running img").wait_for(timeout=60_000)
        for worker in serving.children(server.process.pid):
            os.kill(worker, signal.SIGKILL)
        page.locator(IMAGES).first.wait_for(timeout=120_000)
        page.close()


@pytest.mark.full
def test_a_network_that_is_cut(browser: Browser, tmp_path: Path) -> None:
    with serving.serving(tmp_path / "root") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("Prompt", exact=True).fill("red apple")
        page.context.set_offline(True)
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_text("The server does not answer")).to_be_visible()
        page.context.set_offline(False)
        expect(page.get_by_text("The server does not answer")).to_be_hidden(timeout=30_000)
        page.get_by_role("button", name="Generate").click()
        page.locator(IMAGES).first.wait_for(timeout=60_000)
        page.close()
