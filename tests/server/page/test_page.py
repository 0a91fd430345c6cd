"""The page in a real browser: the first image in two actions, on a large and a small screen, in light and dark.

Screenshots are kept in ``build/screenshots``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.scale import ALL, thinned
from support.serving import Server

SHOTS = Path(__file__).parents[3] / "build/screenshots"
LOOKS = [("1440x900", False), ("390x844", True), ("1440x900", True), ("390x844", False)]
SIZES = {"1440x900": (1440, 900), "390x844": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    """Debian's chromium, or another that is there, or playwright's own (``playwright install chromium``)."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


def opened(browser: Browser, server: Server, size: str, dark: bool, hosts: set[str]) -> Page:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(server.url)
    page.wait_for_selector(".sl-make")
    return page


@pytest.mark.parametrize("look", thinned(LOOKS, 1), ids=lambda look: f"{look[0]}-{'dark' if look[1] else 'light'}")
def test_the_first_image_in_two_actions(browser: Browser, server: Server, look: tuple[str, bool]) -> None:
    size, dark = look
    hosts: set[str] = set()
    page = opened(browser, server, size, dark, hosts)
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_role("button", name="Make").click()
    page.wait_for_selector(".sl-sheet .sl-shot img", timeout=60_000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"page-{size}-{'dark' if dark else 'light'}.png", full_page=size == "390x844")
    # Nothing is wider than the screen, and nothing came from elsewhere.
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert hosts == {server.url.split("/")[2]}
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(21, 20, 19)") == dark
    page.context.close()


def test_several_models_fill_the_sheet_and_an_image_is_proven(browser: Browser, server: Server) -> None:
    page = opened(browser, server, "1440x900", False, set())
    page.get_by_label("Prompt", exact=True).fill("octopus")
    page.get_by_label("Models").click()
    for name in ("starter-noto", "starter-twemoji"):
        page.get_by_role("option", name=name).click()
        # The server keeps the choice: a second click before the first is confirmed replaces it.
        page.locator(".q-chip", has_text=name).wait_for()
    page.keyboard.press("Escape")
    # The preview is there only while the images are drawn.
    page.get_by_label("Steps", exact=True).fill("24")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="More").first.click()
    page.get_by_label("CLIP skip").fill("1")
    page.get_by_role("button", name="Make").click()
    page.wait_for_selector(".sl-preview[src]", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.sl-sheet .sl-wait').length > 0")
    page.screenshot(path=SHOTS / "page-running.png")
    page.wait_for_function("document.querySelectorAll('.sl-sheet .sl-shot').length == 3", timeout=60_000)
    assert page.locator(".sl-memory").get_by_text("starter-twemoji").count() >= 1
    page.locator(".sl-sheet .sl-shot").nth(1).click()
    page.get_by_role("button", name="Same as in a fresh process?").click()
    page.get_by_text("Yes: pixel for pixel the same.").wait_for(timeout=60_000)
    page.wait_for_timeout(300)
    page.screenshot(path=SHOTS / "page-image.png")
    page.get_by_role("button", name="Use these settings").click()
    assert page.get_by_label("CLIP skip").input_value() == "1"
    assert page.get_by_label("Seed", exact=True).input_value() == "7"
    assert page.get_by_label("Steps", exact=True).input_value() == "24"
    page.context.close()


@pytest.mark.full
def test_an_image_begins_another_within_its_edges(browser: Browser, server: Server, tmp_path: Path) -> None:
    """From the gallery, with a ControlNet that is shown an uploaded picture, enlarged; then all settings again."""
    page = opened(browser, server, "1440x900", False, set())
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_label("Steps", exact=True).fill("6")
    page.get_by_role("button", name="Make").click()
    page.wait_for_selector(".sl-sheet .sl-shot img", timeout=60_000)
    page.locator(".sl-sheet .sl-shot").first.click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "apple.png")
    page.get_by_role("button", name="Start from this image").click()
    page.wait_for_selector(".sl-picture[src]")
    page.get_by_label("Denoising strength", exact=True).fill("0.9")
    page.get_by_role("button", name="ControlNet").click()
    page.get_by_label("ControlNet", exact=True).last.click()
    page.get_by_role("option", name="edges").click()
    page.locator("input[type=file]").last.set_input_files(tmp_path / "apple.png")
    page.wait_for_function("document.querySelectorAll('.sl-picture[src]').length >= 2")
    page.get_by_label("Prompt", exact=True).fill("octopus")
    page.get_by_label("Add an adapter").click()
    page.get_by_role("option", name="ink").click()
    page.get_by_role("button", name="Make").click()
    page.wait_for_function("document.querySelector('.sl-sheet')?.previousSibling?.textContent?.startsWith('octopus')")
    page.wait_for_selector(".sl-sheet .sl-shot img", timeout=60_000)
    page.wait_for_timeout(500)
    page.screenshot(path=SHOTS / "page-from-an-image.png")
    page.locator(".sl-sheet .sl-shot").first.click()
    for text in ("edges 1", "ink 1", "strength 0.9"):
        page.get_by_text(text).first.wait_for()
    page.screenshot(path=SHOTS / "page-combination.png")
    page.get_by_role("button", name="Use these settings").click()
    assert page.get_by_label("Denoising strength", exact=True).input_value() == "0.9"
    assert page.get_by_label("Prompt", exact=True).input_value() == "octopus <lora:ink:1>"
    page.context.close()


def test_what_runs_can_be_cancelled_and_mistakes_are_told(browser: Browser, server: Server) -> None:
    page = opened(browser, server, "1440x900", False, set())
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_label("Steps", exact=True).fill("9999")
    page.get_by_role("button", name="Make").click()
    page.get_by_text("steps=9999").wait_for()
    page.get_by_label("Steps", exact=True).fill("150")
    page.get_by_role("button", name="Make").click()
    page.get_by_role("button", name="Cancel").first.click(timeout=30_000)
    page.get_by_text("cancelled", exact=True).wait_for(timeout=30_000)
    page.context.close()


@pytest.mark.full
def test_the_form_and_the_sheet_are_there_after_a_reload(browser: Browser, server: Server) -> None:
    page = opened(browser, server, "1440x900", False, set())
    page.get_by_label("Prompt", exact=True).fill("a koala")
    page.get_by_label("Steps", exact=True).fill("7")
    page.get_by_role("button", name="Make").click()
    page.wait_for_selector(".sl-sheet .sl-shot img", timeout=60_000)
    page.wait_for_timeout(1500)
    page.reload()
    page.wait_for_selector(".sl-sheet .sl-shot img", timeout=30_000)
    assert page.get_by_label("Prompt", exact=True).input_value() == "a koala"
    assert page.get_by_label("Steps", exact=True).input_value() == "7"
    page.context.close()


@pytest.mark.full
def test_a_removal_can_be_undone(browser: Browser, server: Server, http: httpx.Client) -> None:
    page = opened(browser, server, "1440x900", False, set())
    page.get_by_label("Prompt", exact=True).fill("a crab")
    page.get_by_label("Steps", exact=True).fill("4")
    page.get_by_role("button", name="Make").click()
    page.wait_for_selector(".sl-sheet .sl-shot img", timeout=60_000)
    image = http.get("/api/v1/images?limit=1").json()[0]["id"]
    # What is not undone is removed when the notice is gone, after seconds.
    for undo in (True, False) if ALL else (True,):
        page.locator(".sl-grid .sl-shot").first.click()
        page.locator(".q-dialog").get_by_role("button", name="Remove").click()
        page.get_by_text("1 image removed").wait_for()
        if undo:
            page.get_by_role("button", name="Undo").click()
            page.wait_for_timeout(1500)
            assert http.get(f"/api/v1/images/{image}").status_code == 200
    until = time.monotonic() + 20
    while ALL and http.get(f"/api/v1/images/{image}").status_code == 200:
        assert time.monotonic() < until
        page.wait_for_timeout(300)
    page.context.close()
