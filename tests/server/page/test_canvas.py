"""The canvas of the page: painting, undo, inpainting, outpainting."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect
from support.serving import ended, make

from .conftest import Open, shot

MASKED = """async () => {
    const canvas = (await import("/page/canvas/layers.js")).layers.mask;
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let at = 3; at < data.length; at += 4) count += data[at] > 0 ? 1 : 0;
    return count;
}"""


@pytest.fixture
def image(http: httpx.Client) -> dict[str, Any]:
    job = ended(http, make(http)["id"])
    return http.get(f"/api/v1/jobs/{job['id']}/images").json()[0]


def on_canvas(open_page: Open, image: dict[str, Any]) -> Page:
    """Open an image on the canvas."""
    page = open_page(f"/gallery/{image['id']}")
    page.get_by_role("button", name="Edit on the canvas").click()
    page.locator(".layer-picture").wait_for()
    return page


def stroke(page: Page, *points: tuple[float, float]) -> None:
    """Draw through points, given as shares of the picture."""
    box = page.locator(".layer-picture").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def test_an_inpainted_image_in_six_actions(image: dict[str, Any], open_page: Open, http: httpx.Client) -> None:
    page = on_canvas(open_page, image)
    page.get_by_label("Brush", exact=True).first.fill("10")
    stroke(page, (0.3, 0.3), (0.6, 0.6))
    assert page.evaluate(MASKED) > 100
    page.get_by_label("Prompt", exact=True).fill("a green leaf")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".candidates .thumbnail")).to_have_count(1, timeout=60_000)
    shot(page, "canvas")
    page.get_by_role("button", name="Accept").click()
    expect(page.locator(".candidates")).to_be_hidden()
    made = http.get("/api/v1/images", params={"limit": 1, "metadata": True}).json()["images"][0]
    request = made["metadata"]["request"]
    assert (request["width"], request["height"], bool(request["image"]), bool(request["mask"])) == (64, 64, True, True)
    page.get_by_role("button", name="Undo").click()


@pytest.mark.full
def test_what_is_painted_can_be_undone_without_end(image: dict[str, Any], open_page: Open) -> None:
    page = on_canvas(open_page, image)
    page.get_by_label("Brush", exact=True).first.fill("4")
    counts = [page.evaluate(MASKED)]
    for number in range(6):
        stroke(page, (0.1 * number + 0.1, 0.2), (0.1 * number + 0.1, 0.8))
        counts.append(page.evaluate(MASKED))
    assert counts == sorted(set(counts))
    page.get_by_role("button", name="Rectangle").click()
    stroke(page, (0.1, 0.1), (0.9, 0.9))
    counts.append(page.evaluate(MASKED))
    page.get_by_role("button", name="Invert mask").click()
    counts.append(page.evaluate(MASKED))
    assert counts[-1] < counts[-2]
    page.get_by_role("button", name="Fill", exact=True).click()
    stroke(page, (0.5, 0.5), (0.5, 0.5))
    page.wait_for_timeout(300)
    counts.append(page.evaluate(MASKED))
    assert counts[-1] > 64 * 64 * 0.97
    page.get_by_role("button", name="Eraser").click()
    stroke(page, (0.5, 0.2), (0.5, 0.8))
    counts.append(page.evaluate(MASKED))
    page.get_by_role("button", name="Clear mask").click()
    counts.append(page.evaluate(MASKED))
    assert counts[-1] == 0
    for count in counts[-2::-1]:
        page.keyboard.press("Control+z")
        assert page.evaluate(MASKED) == count
    for count in counts[1:]:
        page.keyboard.press("Control+y")
        assert page.evaluate(MASKED) == count


@pytest.mark.full
def test_the_picture_grows_where_the_box_goes_beyond_it(image: dict[str, Any], open_page: Open) -> None:
    page = on_canvas(open_page, image)
    before = page.evaluate("import('/page/canvas/layers.js').then(({ layers }) => layers.picture.toDataURL())")
    page.get_by_label("Box left").fill("-32")
    page.get_by_label("Box width").fill("96")
    page.get_by_label("Box height").press("Tab")
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".candidates .thumbnail")).to_have_count(1, timeout=60_000)
    page.get_by_role("button", name="Accept").click()
    expect(page.locator(".layer-picture")).to_have_css("width", "96px")
    # What was there is there, further to the right, but for the blurred edge of the mask.
    kept = page.evaluate(
        """async (before) => {
            const old = new Image();
            old.src = before;
            await old.decode();
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 64;
            const pen = canvas.getContext("2d");
            pen.drawImage(old, 0, 0);
            const one = pen.getImageData(16, 0, 48, 64).data;
            const { layers } = await import("/page/canvas/layers.js");
            const other = layers.picture.getContext("2d").getImageData(48, 0, 48, 64).data;
            return one.every((value, at) => value === other[at]);
        }""",
        before,
    )
    assert kept


@pytest.mark.full
def test_the_box_is_drawn_by_hand_and_snaps(image: dict[str, Any], open_page: Open) -> None:
    page = on_canvas(open_page, image)
    page.get_by_role("button", name="Box", exact=True).click()
    stroke(page, (0.5, 0.5), (0.8, 0.6))
    left = int(page.get_by_label("Box left").input_value())
    assert left > 0
    assert left % 8 == 0
    page.get_by_role("button", name="Whole picture").click()
    expect(page.get_by_label("Box left")).to_have_value("0")


@pytest.mark.full
def test_a_control_layer_is_painted_seen_undone_and_used(
    image: dict[str, Any], open_page: Open, http: httpx.Client
) -> None:
    page = on_canvas(open_page, image)
    page.get_by_text("Control layers", exact=True).click()
    page.get_by_label("Add a ControlNet").select_option("edges")
    layer = page.locator(".layer-control")
    expect(layer).to_have_count(1)
    # It is the layer that is painted now, in white.
    page.get_by_label("Brush", exact=True).first.fill("3")
    stroke(page, (0.2, 0.2), (0.8, 0.2), (0.8, 0.8))
    white = """async () => {
        const { layers } = await import("/page/canvas/layers.js");
        const control = Object.keys(layers).find((name) => name.startsWith("control"));
        return layers[control].getContext("2d").getImageData(0, 0, 64, 64).data.filter((one) => one === 255).length;
    }"""
    painted = page.evaluate(white)
    assert painted > 100
    page.get_by_role("button", name="Undo").click()
    assert page.evaluate(white) == 0
    page.get_by_role("button", name="Redo").click()
    assert page.evaluate(white) == painted
    page.get_by_role("button", name="From the picture").click()
    page.get_by_label("Preprocessor").select_option("canny")
    page.get_by_role("button", name="Show what it sees").click()
    page.locator("img.control-preview").wait_for(timeout=20_000)
    shot(page, "canvas-control")
    page.get_by_label("Show the layer").uncheck()
    expect(layer).to_have_count(0)
    page.get_by_label("Prompt", exact=True).fill("octopus")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".candidates .thumbnail")).to_have_count(1, timeout=60_000)
    made = http.get("/api/v1/images", params={"limit": 1, "metadata": True}).json()["images"][0]
    [control] = made["metadata"]["request"]["controls"]
    assert (control["name"], control["preprocessor"], len(control["image"])) == ("edges", "canny", 64)
    page.get_by_role("button", name="Remove edges").click()
    expect(page.locator(".canvas-side fieldset")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".canvas-side fieldset")).to_have_count(1)


@pytest.mark.full
def test_an_image_of_the_gallery_is_dropped_on_the_canvas(image: dict[str, Any], open_page: Open) -> None:
    page = open_page("/canvas")
    address = page.evaluate("(path) => new URL(path, location.href).href", image["url"])
    drop = """([selector, address]) => {
        const data = new DataTransfer();
        data.setData("text/uri-list", address);
        const at = document.querySelector(selector);
        at.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, [".drop", address])
    expect(page.locator(".layer-picture")).to_have_css("width", "64px")


@pytest.mark.full
def test_what_is_seen_of_a_large_picture_is_what_its_layers_have(open_page: Open) -> None:
    """The tiles that are shown follow the pixels: after a stroke, undo, invert and another size."""
    page = open_page("/canvas")
    page.evaluate("import('/page/canvas/document.js').then((one) => one.newCanvas(1500, 1100))")
    page.locator(".layer-mask canvas").first.wait_for()
    differs = """async () => {
        const { layers } = await import("/page/canvas/layers.js");
        await new Promise((resolve) => setTimeout(resolve, 400));
        let wrong = 0;
        for (const name of ["picture", "mask"]) {
            const { width, height } = layers[name];
            const seen = new OffscreenCanvas(width, height).getContext("2d");
            for (const tile of document.querySelectorAll(`.layer-${name} canvas`)) {
                seen.clearRect(parseFloat(tile.style.left), parseFloat(tile.style.top), tile.width, tile.height);
                seen.drawImage(tile, parseFloat(tile.style.left), parseFloat(tile.style.top));
            }
            const pens = [seen, layers[name].getContext("2d")];
            const [a, b] = pens.map((one) => one.getImageData(0, 0, width, height).data);
            for (let at = 0; at < a.length; at++) wrong += a[at] === b[at] ? 0 : 1;
        }
        return wrong;
    }"""
    stroke(page, (0.1, 0.1), (0.9, 0.9), (0.2, 0.8))
    assert page.evaluate(MASKED) > 1000
    for button in ("Undo", "Redo", "Invert mask", "Clear mask", "Undo"):
        assert page.evaluate(differs) == 0
        page.get_by_role("button", name=button).click()
    assert page.evaluate(differs) == 0
    page.evaluate("import('/page/canvas/document.js').then((one) => one.newCanvas(700, 600))")
    assert page.evaluate(differs) == 0
