"""How quick the page is, in headless Chromium: until it is there, with 20,000 pictures, and while somebody paints.

``python benchmarks/page.py`` starts a server on a new root with 20,000 made-up pictures in its database, whose
thumbnails are a few files. Rows:

- *first paint*, *interactive*: from the address until the page shows something, and until the form can be used.
- *own code*: bytes of the page's files, without the library and with the texts of one language; nothing is compressed.
- *scrolling*: milliseconds a frame while the gallery is scrolled through by 137 and by 40 pixels a frame, 95th
  percentile.
- *painting*: the same while strokes are painted on a canvas of 2048x2048.
- *pauses at 4096x4096*: the longest task of the page's thread while strokes are painted there.

Predicted before the first run: 0.3 s and 0.5 s; 230 KB; 20 ms; 25 ms; 40 ms.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gallery import fill
from PIL import Image
from support import serving

from safelight.queue.database import Database
from safelight.server.page.routes import FILES

FRAMES = """async (step) => {
    const times = [];
    let last = await new Promise(requestAnimationFrame);
    for (let count = 0; count < 240; count++) {
        step(count);
        const now = await new Promise(requestAnimationFrame);
        times.push(now - last);
        last = now;
    }
    return times;
}"""

SCROLL = FRAMES.replace("async (step) => {", "async (by) => { const step = () => scrollBy(0, by);")
FAST, SLOW = 137, 40
"""Pixels a frame. While images fly past, the page loads none of them; when it is slow, it loads them all."""

PAINT = """async (side) => {
    const { newCanvas, Stroke } = await import("/page/canvas/document.js");
    newCanvas(side, side);
    await new Promise((resolve) => setTimeout(resolve, 1500));
    const long = [];
    new PerformanceObserver((list) => long.push(...list.getEntries().map((one) => one.duration)))
        .observe({ type: "longtask", buffered: false });
    const times = [];
    let stroke = null;
    let last = await new Promise(requestAnimationFrame);
    for (let count = 0; count < 240; count++) {
        if (count % 40 === 0) {
            stroke?.end();
            stroke = new Stroke("mask", { erase: false, colour: "#000000" });
        }
        const angle = count / 9;
        stroke.to(side / 2 + Math.cos(angle) * side * 0.3, side / 2 + Math.sin(angle * 1.3) * side * 0.3, 24);
        const now = await new Promise(requestAnimationFrame);
        times.push(now - last);
        last = now;
    }
    stroke.end();
    await new Promise((resolve) => setTimeout(resolve, 300));
    return { times, longest: Math.max(0, ...long) };
}"""


def share(times: list[float], part: float) -> float:
    """Return the value below which a part of all are."""
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]


def start_times(page: Page, url: str, times: int) -> tuple[float, float]:
    """Return the median seconds until the first paint, and until the form can be used."""
    paints, ready = list[float](), list[float]()
    for _ in range(times):
        page.goto("about:blank")
        page.goto(url)
        page.locator("form.form textarea").first.wait_for()
        found: dict[str, Any] = page.evaluate(
            "({ paint: performance.getEntriesByName('first-contentful-paint')[0].startTime, now: performance.now() })"
        )
        paints.append(found["paint"] / 1000)
        ready.append(found["now"] / 1000)
    return statistics.median(paints), statistics.median(ready)


def picture_like(size: tuple[int, int]) -> Image.Image:
    """Return noise whose parts are as strong in each octave, as in photographs. White noise takes longer to decode."""
    channels: list[Image.Image] = []
    for _ in range(3):
        channel = Image.new("L", size, 128)
        for scale in (1, 2, 4, 8, 16, 32, 64):
            octave = Image.effect_noise((size[0] // scale, size[1] // scale), 40).resize(size, Image.Resampling.BICUBIC)
            channel = Image.blend(channel, octave, scale / (2 * scale + 64))
        channels.append(channel)
    return Image.merge("RGB", channels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    rows = list[tuple[str, str, str]]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        database = Database(root)
        fill(database.images, asked.images)
        database.close()
        thumbnails = root / "thumbnails"
        thumbnails.mkdir()
        picture = Path(folder) / "picture.webp"
        picture_like((384, 384)).save(picture, "WEBP", quality=80)
        for number in range(asked.images):
            (thumbnails / f"{number:032x}.webp").hardlink_to(picture)
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next((path for path in map(shutil.which, names) if path), None)
        with serving.serving(root, real=True) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            paint, ready = start_times(page, server.url, asked.times)
            rows += [("first paint", f"{paint:.2f} s", "1 s"), ("interactive", f"{ready:.2f} s", "1.5 s")]
            files = [one for one in FILES.rglob("*") if one.is_file() and one.parent.name != "lib"]
            texts = [one.stat().st_size for one in files if one.parent.name == "strings"]
            size = sum(one.stat().st_size for one in files) - sum(texts) + max(texts)
            rows.append(("own code", f"{size / 1000:.0f} KB", "300 KB"))
            page.goto(f"{server.url}/gallery")
            page.locator(".cell img").first.wait_for()
            for name, by in (("fast", FAST), ("slowly", SLOW)):
                times: list[float] = page.evaluate(SCROLL, by)
                rows.append((f"scrolling {asked.images} pictures {name}", f"{share(times, 0.95):.1f} ms", "33 ms"))
            for side in (2048, 4096):
                page.goto(f"{server.url}/canvas")
                page.get_by_text("New picture").wait_for()
                painted: dict[str, Any] = page.evaluate(PAINT, side)
                if side == 2048:
                    rows.append(("painting at 2048x2048", f"{share(painted['times'], 0.95):.1f} ms", "33 ms"))
                else:
                    rows.append(("longest pause at 4096x4096", f"{painted['longest']:.0f} ms", "50 ms"))
            browser.close()
    print("| what | measured | aim |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
