"""The gallery of the page: search, boards, stars, tags, the trash, the keyboard, and comparing."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect
from support.serving import ended, make

from .conftest import Open, shot


@pytest.fixture
def images(http: httpx.Client) -> list[dict[str, Any]]:
    """Three images whose prompt no other has."""
    job = ended(http, make(http, prompt="a lighthouse at dusk", count=3)["id"])
    return http.get(f"/api/v1/jobs/{job['id']}/images").json()


@pytest.fixture(autouse=True)
def only_these(http: httpx.Client) -> None:
    """Images of other tests are in the trash."""
    http.patch("/api/v1/images", json={"ids": http.get("/api/v1/images/ids").json()["ids"], "trashed": True})


def searched(page: Page, text: str, count: int) -> None:
    page.get_by_label("Search prompts, models, tags").fill(text)
    expect(page.locator(".filters [role=status]")).to_have_text(f"Images: {count}")


def test_images_are_searched_starred_removed_and_restored(
    images: list[dict[str, Any]], open_page: Open, http: httpx.Client
) -> None:
    http.patch("/api/v1/images", json={"ids": [image["id"] for image in images], "trashed": False})
    page = open_page("/gallery")
    searched(page, "dusk lighth", 3)
    searched(page, "dawn", 0)
    searched(page, "", 3)
    page.locator(".cell .thumbnail").first.click()
    expect(page).to_have_url(re.compile(f"/gallery/{images[2]['id']}$"))
    page.locator(".image-prompt").wait_for()
    page.keyboard.press("s")
    expect(page.get_by_role("button", name="Star", exact=True)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("ArrowRight")
    expect(page).to_have_url(re.compile(f"/gallery/{images[1]['id']}$"))
    page.keyboard.press("Delete")
    page.get_by_text("In the trash: 1").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator(".cell")).to_have_count(2)
    # The back button closes nothing twice, and undo restores.
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".cell")).to_have_count(3)
    page.get_by_role("button", name="Starred").click()
    expect(page.locator(".cell")).to_have_count(1)
    shot(page, "gallery")


def test_an_image_opens_before_its_details_are_there(
    images: list[dict[str, Any]], open_page: Open, http: httpx.Client
) -> None:
    http.patch("/api/v1/images", json={"ids": [image["id"] for image in images], "trashed": False})
    page = open_page("/")
    held: list[Route] = []
    page.route("**/images/details", lambda route: held.append(route))
    page.get_by_role("link", name="Gallery").click()
    page.locator(".cell .thumbnail").first.click()
    expect(page).to_have_url(re.compile(f"/gallery/{images[2]['id']}$"))
    expect(page.locator(".image-prompt")).to_have_text("a lighthouse at dusk")
    for route in held:
        route.continue_()


@pytest.mark.full
def test_many_images_are_put_on_a_board_tagged_exported_and_deleted(
    images: list[dict[str, Any]], open_page: Open, http: httpx.Client
) -> None:
    http.patch("/api/v1/images", json={"ids": [image["id"] for image in images], "trashed": False})
    page = open_page("/gallery")
    page.get_by_role("button", name="New board").click()
    page.get_by_role("textbox", name="Name of the board").fill("towers")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    # The images stay in sight, so that they can be put on it.
    expect(page.get_by_role("button", name="towers 0")).to_be_visible()
    expect(page.locator(".cell")).to_have_count(3)
    page.get_by_label("Select image 1").check()
    page.get_by_label("Select image 3").click(modifiers=["Shift"])
    expect(page.get_by_text("3 selected")).to_be_visible()
    page.get_by_role("button", name="To a board").click()
    page.locator(".menu-body").get_by_role("button", name="towers").click()
    page.get_by_role("button", name="Tag", exact=True).click()
    page.get_by_label("Tags, separated by commas").fill("keep, sea")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "safelight-images.zip"
    searched(page, "sea", 3)
    page.get_by_role("button", name="towers 3").click()
    expect(page.locator(".cell")).to_have_count(3)
    # Another filter selects nothing.
    expect(page.locator(".bulk")).to_be_hidden()
    page.locator(".cell .thumbnail").first.focus()
    page.keyboard.press("Control+a")
    page.locator(".bulk").get_by_role("button", name="Remove").click()
    expect(page.locator(".cell")).to_have_count(0)
    page.get_by_role("button", name="Trash").click()
    page.locator(".cell .thumbnail").first.focus()
    page.keyboard.press("Control+a")
    page.get_by_role("button", name="Delete for ever").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete for ever").click()
    expect(page.locator(".cell")).to_have_count(0)
    assert http.get(images[0]["url"]).status_code == 404


@pytest.mark.full
def test_two_images_are_compared(images: list[dict[str, Any]], open_page: Open) -> None:
    same = [images[0]["id"], images[0]["id"], images[1]["id"]]
    page = open_page("/compare?images=" + ",".join(dict.fromkeys(same)))
    page.get_by_role("button", name="Difference").click()
    expect(page.locator(".pair [role=status]")).to_contain_text("% of the pixels differ")
    shot(page, "compare")
    page.get_by_role("button", name="Flicker").click()
    page.get_by_role("button", name="Slider").click()
    page.get_by_label("Slider", exact=True).fill("20")


@pytest.mark.full
def test_any_two_fields_fill_a_table(open_page: Open) -> None:
    page = open_page("/")
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_role("link", name="Compare").click()
    page.get_by_label("Values of the columns").fill("1..2")
    page.get_by_label("Values of the rows").fill("starter-noto,starter-fluent")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".grid-table .thumbnail img")).to_have_count(4, timeout=60_000)
    page.get_by_label("Columns", exact=True).select_option("cfg")
    expect(page.get_by_label("Values of the columns")).to_have_value("3,5,7")
    page.get_by_label("Rows", exact=True).select_option("prompt")
    page.get_by_label("Values of the rows").fill("red,green")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".grid-table thead th").first).to_have_text("cfg 3")
    expect(page.locator(".grid-table .thumbnail img")).to_have_count(6, timeout=60_000)
    shot(page, "grid")
    page.get_by_label("Values of the rows").fill("blue,green")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("must be a part of the prompt")


@pytest.mark.full
def test_many_images_are_proven_at_once(images: list[dict[str, Any]], open_page: Open, http: httpx.Client) -> None:
    http.patch("/api/v1/images", json={"ids": [image["id"] for image in images], "trashed": False})
    page = open_page("/gallery")
    for number in range(2):
        page.locator(".cell input[type=checkbox]").nth(number).check()
    page.get_by_role("button", name="Same as in a fresh process?").click()
    page.get_by_text("2 images checked: each is the same as in a fresh process.").wait_for(timeout=120_000)
    expect(page.locator(".badge-same")).to_have_count(2)


@pytest.mark.full
def test_an_image_is_dragged_out_as_a_file(images: list[dict[str, Any]], open_page: Open, http: httpx.Client) -> None:
    http.patch("/api/v1/images", json={"ids": [image["id"] for image in images], "trashed": False})
    page = open_page("/gallery")
    page.locator(".cell .thumbnail img").first.wait_for()
    dragged = page.evaluate("""() => {
        const data = new DataTransfer();
        const event = new DragEvent("dragstart", { dataTransfer: data, bubbles: true });
        document.querySelector(".cell .thumbnail").dispatchEvent(event);
        return [data.getData("DownloadURL"), data.getData("text/uri-list")];
    }""")
    image = images[2]
    assert dragged[1].endswith(image["url"])
    assert dragged[0] == f"image/png:{image['file_name']}:{dragged[1]}"


@pytest.mark.full
def test_a_removed_image_comes_back_while_the_next_one_is_open(
    images: list[dict[str, Any]], open_page: Open, http: httpx.Client
) -> None:
    http.patch("/api/v1/images", json={"ids": [image["id"] for image in images], "trashed": False})
    page = open_page("/gallery")
    page.locator(".cell .thumbnail img").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Remove", exact=True).click()
    dialog.get_by_role("button", name="Undo").click()
    page.keyboard.press("Escape")
    expect(page.locator(".cell")).to_have_count(3)
    dialog.wait_for(state="hidden")
    page.locator(".cell .thumbnail").first.click()
    dialog.get_by_role("button", name="To a board").click()
    dialog.get_by_role("button", name="New board").click()
    dialog.get_by_text("On the board: New board").wait_for()
    expect(dialog.locator(".facts")).to_contain_text("New board")


@pytest.mark.full
def test_a_slip_of_the_hand_while_comparing_changes_no_form(images: list[dict[str, Any]], open_page: Open) -> None:
    page = open_page("/")
    page.get_by_label("Prompt", exact=True).fill("what I wrote")
    page.goto(page.url + f"compare?images={images[0]['id']},{images[1]['id']}")
    stage = page.locator(".pair-stage")
    box = stage.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 40, steps=8)
    page.mouse.up()
    share = page.get_by_label("Slider", exact=True).last.input_value()
    assert abs(float(share) - 20) < 3
    page.get_by_role("link", name="Create").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("what I wrote")
    page.get_by_role("link", name="Compare").click()
    expect(stage).to_be_visible()
