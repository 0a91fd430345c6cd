"""The memory of the page while it is used for an hour: 200 jobs, and a walk through all views after each.

``python benchmarks/page_soak.py`` starts a server on a new root and uses its page in headless Chromium. Each round
asks for an image, opens it, paints on it on the canvas, compares it with the one before, and looks at the models.
Memory is measured after a garbage collection: the script's heap, and the resident memory of the browser's page.

Aim: after an hour at most 1.2 times what it was after ten minutes. Predicted before the first run: 1.05.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import CDPSession, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import serving

MODELS = ("starter-noto", "starter-fluent", "starter-twemoji")
NEAR = 5
"""Rounds whose median is taken."""


def one_round(page: Page, url: str, number: int) -> None:
    """Use the page once."""
    page.goto(url) if number % 50 == 0 else page.get_by_role("link", name="Create").click()
    page.get_by_label("Prompt", exact=True).fill(f"red apple number {number}")
    page.get_by_label("Steps", exact=True).fill("4")
    page.get_by_role("button", name="Generate").click()
    page.locator(".sheet .thumbnail img").first.wait_for(timeout=120_000)
    page.locator(".sheet .thumbnail").first.click()
    page.locator(".image-prompt").wait_for()
    page.get_by_role("button", name="Edit on the canvas").click()
    box = page.locator(".layer-picture").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] - 20, steps=12)
    page.mouse.up()
    page.get_by_role("link", name="Gallery").click()
    page.locator(".cell .thumbnail img").first.wait_for()
    if page.locator(".cell input[type=checkbox]").count() > 1:
        for at in range(2):
            page.locator(".cell input[type=checkbox]").nth(at).check()
        page.get_by_role("link", name="Compare").last.click()
        page.wait_for_timeout(300)
    page.get_by_role("link", name="Models").click()
    page.get_by_text(MODELS[number % len(MODELS)]).first.click()
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")


def measure(session: CDPSession) -> tuple[float, float]:
    """Return megabytes: of the script's heap, and of the resident memory of the largest page of the browser."""
    session.send("HeapProfiler.collectGarbage")
    metrics: dict[str, Any] = session.send("Performance.getMetrics")
    heap = next(one["value"] for one in metrics["metrics"] if one["name"] == "JSHeapUsedSize")
    sizes = list[float]()
    for process in psutil.process_iter(["cmdline"]):
        if "--type=renderer" in (process.info["cmdline"] or []):
            sizes.append(process.memory_info().rss)
    return heap / 1e6, max(sizes, default=0.0) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=200)
    asked = parser.parse_args()
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    taken = list[tuple[float, float, float]]()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving.serving(Path(folder) / "root") as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        begun = time.monotonic()
        for number in range(asked.jobs):
            one_round(page, server.url, number)
            taken.append((time.monotonic() - begun, *measure(session)))
            late = begun + (number + 1) * asked.minutes * 60 / asked.jobs - time.monotonic()
            page.wait_for_timeout(max(0.0, late * 1000))
        browser.close()
    early = [one for one in taken if one[0] >= asked.minutes * 60 / 6][:NEAR] or taken[:NEAR]
    print("| what | after a sixth of the time | at the end | ratio | aim |\n|---|---|---|---|---|")
    for name, column in (("heap of the scripts", 1), ("resident memory of the page", 2)):
        before = statistics.median(one[column] for one in early)
        after = statistics.median(one[column] for one in taken[-NEAR:])
        print(f"| {name} | {before:.1f} MB | {after:.1f} MB | {after / before:.2f} | 1.2 |")
    print(f"\n{len(taken)} jobs in {taken[-1][0] / 60:.0f} minutes")


if __name__ == "__main__":
    main()
