"""For everyone: WCAG 2.1 AA by axe-core on all views, and the keyboard."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect
from support.serving import ended, make

from .conftest import Open, shot

AXE = "axe-core@4.11.0"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
LOOKS = [((1440, 900), False, "en-US"), ((390, 844), True, "zh-CN"), ((820, 1180), False, "zh-CN")]


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core, from npm."""
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("axe")
    assert npm is not None, "npm comes with Node.js"
    subprocess.run([npm, "pack", "--silent", AXE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    [archive] = folder.glob("*.tgz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return (folder / "package/axe.min.js").read_text()


@pytest.mark.full
@pytest.mark.parametrize("look", LOOKS, ids=lambda one: f"{one[0][0]}-{one[1]}-{one[2]}")
def test_no_view_violates_wcag(
    look: tuple[tuple[int, int], bool, str], axe: str, open_page: Open, http: httpx.Client
) -> None:
    job = ended(http, make(http, count=2)["id"])
    images = [image["id"] for image in http.get(f"/api/v1/jobs/{job['id']}/images").json()]
    size, dark, language = look
    page = open_page("/", size, dark, language)
    paths = ["/", "/canvas", "/gallery", f"/gallery/{images[0]}", f"/compare?images={','.join(images)}"]
    for path in (*paths, "/models", "/models/starter-noto", "/settings"):
        page.goto(str(http.base_url).rstrip("/") + path)
        page.wait_for_timeout(1200)
        page.evaluate(axe)
        found: dict[str, Any] = page.evaluate(f"axe.run(document, {{ runOnly: {RULES} }})")
        assert len(found["passes"]) > 10
        problems = [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]]
        assert problems == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], path
        shot(page, f"view-{path.strip('/').split('?')[0][:14].replace('/', '-') or 'create'}-{size[0]}-{language}")


@pytest.mark.full
def test_an_image_is_made_and_removed_by_the_keyboard_alone(open_page: Open) -> None:
    page = open_page("/")
    page.keyboard.press("Tab")
    expect(page.get_by_text("To the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("red apple")
    page.keyboard.press("Control+Enter")
    page.locator(".sheet .thumbnail img").first.wait_for(timeout=60_000)
    # The focus stays where it was when a job ends.
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.locator(".sheet .thumbnail").first.focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Delete")
    page.get_by_text("In the trash: 1").wait_for()
