"""A browser for the tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.serving import Server

SHOTS = Path(__file__).parents[3] / "build/screenshots"
"""Where screenshots are kept, to be looked at."""

Open = Callable[..., Page]
"""Opens the page at an address: ``open_page(path, size=(width, height), dark=False, language="en-US")``."""


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    """Debian's chromium, or another that is there, or playwright's own (``playwright install chromium``)."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Generator[Open]:
    """At the end, nothing came from another host, nothing was refused by the policy, and no script failed."""
    pages, wrong = list[Page](), list[str]()

    def open_at(
        path: str = "/", size: tuple[int, int] = (1440, 900), dark: bool = False, language: str = "en-US"
    ) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", locale=language
        )
        page = context.new_page()
        own = server.url.split("/")[2]
        page.on(
            "request",
            lambda request: (
                wrong.append(f"request to {request.url}")
                if request.url.startswith(("http:", "https:")) and request.url.split("/")[2] != own
                else None
            ),
        )
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on(
            "console",
            lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None,
        )
        page.goto(server.url + path)
        page.locator("main > :not([role=status])").first.wait_for()
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.context.close()
    assert wrong == []


def shot(page: Page, name: str) -> None:
    """Keep a screenshot."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")
