"""The page in a real browser: first images, several models, mistakes, reload, and texts that are no markup."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from support import serving
from support.foreign_pictures import PICTURES, PROMPT
from support.scale import thinned

from .conftest import Open, shot

LOOKS = [
    ((1440, 900), False, "en-US"),
    ((390, 844), True, "zh-CN"),
    ((820, 1180), True, "en-US"),
    ((390, 844), False, "en-US"),
    ((1440, 900), True, "zh-CN"),
]
MAKE, PROMPT_LABEL = {"en-US": "Generate", "zh-CN": "生成"}, {"en-US": "Prompt", "zh-CN": "提示词"}
IMAGES = ".sheet .thumbnail img"


def make(page: Page, prompt: str, steps: int = 4, images: int = 1) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Images", exact=True).fill(str(images))
    page.get_by_role("button", name="Generate").click()


@pytest.mark.parametrize("look", thinned(LOOKS, 2), ids=lambda one: f"{one[0][0]}-{one[1]}-{one[2]}")
def test_the_first_image_in_two_actions(open_page: Open, look: tuple[tuple[int, int], bool, str]) -> None:
    size, dark, language = look
    page = open_page("/", size, dark, language)
    page.get_by_label(PROMPT_LABEL[language], exact=True).fill("red apple")
    page.get_by_role("button", name=MAKE[language]).click()
    page.locator(IMAGES).first.wait_for(timeout=60_000)
    shot(page, f"create-{size[0]}-{'dark' if dark else 'light'}-{language}")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate("document.documentElement.lang") == language[:2]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(21, 20, 19)") == dark


def test_several_models_fill_the_sheet_and_an_image_is_proven(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("button", name="Remove starter-fluent").click()
    page.get_by_role("button", name="Choose models").click()
    page.get_by_label("Search models").fill("noto")
    expect(page.locator(".model-list [role=option]")).to_have_count(1)
    page.get_by_role("option", name="starter-noto").click()
    page.get_by_label("Search models").fill("")
    page.get_by_role("option", name="starter-twemoji").click()
    page.keyboard.press("Escape")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_text("Sampler, guidance, variation").click()
    page.get_by_label("CLIP skip").fill("1")
    make(page, "octopus", steps=24)
    page.locator(".running img").wait_for(timeout=60_000)
    shot(page, "running")
    expect(page.locator(IMAGES)).to_have_count(2, timeout=60_000)
    page.get_by_text("Memory", exact=True).click()
    expect(page.locator(".memory").get_by_text("starter-twemoji").first).to_be_visible()
    page.locator(IMAGES).nth(1).click()
    page.get_by_role("button", name="Same as in a fresh process?").click()
    expect(page.locator(".image-facts").get_by_text("Yes: pixel for pixel the same.")).to_be_visible(timeout=60_000)
    shot(page, "image")
    # The answer is kept with the image.
    page.reload()
    expect(page.locator(".image-facts").get_by_text("Yes: pixel for pixel the same.")).to_be_visible()
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("CLIP skip")).to_have_value("1")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("24")
    expect(page.locator(".chosen-models")).to_contain_text("starter-twemoji")


def test_a_mistake_is_shown_beside_its_field_until_it_is_mended(open_page: Open) -> None:
    page = open_page()
    make(page, "red apple", steps=9999)
    wrong = page.locator(".field", has=page.get_by_label("Steps", exact=True)).get_by_role("alert")
    expect(wrong).to_contain_text("less than or equal to 999")
    page.wait_for_timeout(500)
    expect(wrong).to_be_visible()
    page.get_by_label("Steps", exact=True).fill("150")
    page.get_by_role("button", name="Generate").click()
    expect(wrong).to_be_hidden()
    page.get_by_role("button", name="Cancel").first.wait_for()
    page.get_by_label("Prompt", exact=True).press("Escape")
    expect(page.locator(".sheet").get_by_text("cancelled")).to_be_visible(timeout=30_000)


def test_form_and_sheet_survive_a_reload(open_page: Open) -> None:
    page = open_page()
    make(page, "a koala", steps=7)
    page.locator(IMAGES).first.wait_for(timeout=60_000)
    page.reload()
    page.locator(IMAGES).first.wait_for()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a koala")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("7")


def test_markup_stays_text(open_page: Open, http: httpx.Client) -> None:
    page = open_page()
    prompt = "<img src=x onerror=document.title='broken'> <b>bold</b> & 'quotes'"
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    make(page, prompt.replace("<b>", "b").replace("</b>", "b"), steps=2)
    name = "<script>document.title='broken'</script>"
    http.post("/api/v1/boards", json={"name": name})
    http.put("/api/v1/presets/<i>x<%2Fi>".replace("<%2Fi>", "<i>"), json={"fields": {"steps": 3}})
    page.locator(".sheet").wait_for()
    page.get_by_role("link", name="Gallery").click()
    expect(page.get_by_role("button", name=name)).to_be_visible()
    assert page.title() == "Safelight"
    assert page.locator("main script, main b, main i:not(.key)").count() == 0


def test_several_tabs_stay_in_step(open_page: Open, http: httpx.Client) -> None:
    first, second = open_page("/"), open_page("/gallery")
    status, before = second.locator(".filters [role=status]"), http.get("/api/v1/images/count").json()["count"]
    expect(status).to_have_text(f"Images: {before}")
    make(first, "a crab", steps=2)
    expect(status).to_have_text(f"Images: {before + 1}", timeout=60_000)


@pytest.mark.full
def test_prompts_are_completed_weighted_and_remembered(open_page: Open) -> None:
    page = open_page()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("an in")
    page.get_by_role("option", name="ink").wait_for()
    prompt.press("Enter")
    expect(prompt).to_have_value("an <lora:ink:1>")
    prompt.fill("red apple")
    prompt.press("End")
    prompt.press("Control+ArrowUp")
    prompt.press("Control+ArrowUp")
    expect(prompt).to_have_value("red (apple:1.2)")
    prompt.press("Control+ArrowDown")
    prompt.press("Control+ArrowDown")
    expect(prompt).to_have_value("red apple")
    expect(page.get_by_text("CLIP: 2 of 75 tokens")).to_be_visible()
    page.get_by_label("Steps", exact=True).fill("2")
    prompt.press("Control+Enter")
    page.locator(IMAGES).first.wait_for(timeout=60_000)
    prompt.fill("")
    prompt.press("ArrowUp")
    expect(prompt).to_have_value("red apple")


@pytest.mark.full
def test_a_picture_of_another_program_fills_the_form(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    data = base64.b64encode(PICTURES["A1111, JPEG"]()).decode()
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "a.jpg", { type: "image/jpeg" }));
            const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
            document.querySelector("main").dispatchEvent(drop);
        }""",
        data,
    )
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile(re.escape(PROMPT[:20])))
    expect(page.locator(".toast")).to_contain_text("A1111")


@pytest.mark.full
def test_a_preset_is_saved_and_used(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Steps", exact=True).fill("11")
    page.get_by_label("Guidance scale (CFG)").fill("3.5")
    page.get_by_role("button", name="Save as a preset").click()
    page.get_by_label("Name").fill("quick look")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    page.get_by_role("button", name="Reset all fields").click()
    expect(page.get_by_label("Steps", exact=True)).to_have_value("")
    page.get_by_label("Preset").select_option("quick look")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("11")
    expect(page.get_by_label("Guidance scale (CFG)")).to_have_value("3.5")


@pytest.mark.full
def test_an_image_begins_another_with_a_controlnet_and_a_lora(open_page: Open) -> None:
    page = open_page()
    make(page, "red apple", steps=4)
    page.locator(IMAGES).first.click(timeout=60_000)
    page.get_by_role("button", name="Start from this").click()
    page.get_by_label("Denoising strength", exact=True).last.fill("0.9")
    page.get_by_text("LoRAs", exact=True).click()
    page.get_by_label("Add a LoRA").select_option("ink")
    page.get_by_text("ControlNet", exact=True).first.click()
    page.get_by_label("Add a ControlNet").select_option("edges")
    picture = Path(__file__).parents[3] / "docs/demo.png"
    page.locator("fieldset input[type=file]").last.set_input_files(picture)
    expect(page.locator("fieldset .drop img")).to_have_count(1)
    make(page, "octopus", steps=6)
    expect(page.locator(".work h2").first).to_have_text("octopus")
    page.locator(IMAGES).first.click(timeout=60_000)
    expect(page.locator(".facts")).to_contain_text("ink")
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Denoising strength", exact=True).last).to_have_value("0.9")
    expect(page.get_by_label("ink", exact=True).first).to_be_visible()


@pytest.mark.full
def test_cost_tokens_and_help_are_said_before_anything_is_made(open_page: Open) -> None:
    page = open_page()
    make(page, "red apple", steps=2)
    page.locator(IMAGES).first.wait_for(timeout=60_000)
    expect(page.locator(".cost")).to_contain_text("about")
    page.get_by_label("Images", exact=True).fill("4")
    expect(page.locator(".cost")).to_contain_text("images: 4")
    page.get_by_role("button", name="Models", exact=True).click()
    page.get_by_role("option", name="starter-flux").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Remove starter-fluent").click()
    expect(page.locator(".tokens").first).to_have_text("CLIP: 2 of 75 tokens · T5 1.1: 2 of 511 tokens")
    help_button = page.get_by_role("button", name="Help").first
    help_button.click()
    expect(help_button).to_have_attribute("aria-expanded", "true")
    shot(page, "cost")


@pytest.mark.full
def test_a_control_picture_is_preprocessed_before_it_is_used(open_page: Open) -> None:
    page = open_page()
    page.get_by_text("ControlNet", exact=True).first.click()
    page.get_by_label("Add a ControlNet").select_option("edges")
    picture = Path(__file__).parents[3] / "docs/demo.png"
    page.locator("fieldset input[type=file]").last.set_input_files(picture)
    page.get_by_label("Preprocessor").select_option("canny")
    first = page.locator("img.control-preview")
    first.wait_for(timeout=20_000)
    before = first.get_attribute("src")
    page.get_by_label("Low threshold").fill("10")
    expect(first).not_to_have_attribute("src", before or "", timeout=20_000)
    shot(page, "preprocessor")


@pytest.mark.full
def test_a_smaller_file_canaries_and_versions(browser: Browser, tmp_path: Path) -> None:
    with serving.serving(tmp_path / "root") as server:
        page = browser.new_page()
        page.goto(f"{server.url}/models/starter-noto")
        page.get_by_label("Form", exact=True).select_option("q8_0")
        page.get_by_role("button", name="Write", exact=True).click()
        page.get_by_text("Added: starter-noto-q8_0").wait_for(timeout=120_000)
        shot(page, "compact")
        page.goto(f"{server.url}/settings")
        # Drawing the image of the comparison made no canary: the doctor does.
        page.get_by_role("heading", name="Versions of Safelight").wait_for()
        expect(page.get_by_role("button", name="Active", exact=True)).to_be_disabled()
        page.get_by_text("No image had to be repaired.").wait_for()
        page.get_by_label("Switches before it (soak)").fill("4")
        page.get_by_role("button", name="Examine this machine").click()
        page.get_by_role("img", name="The last soak").wait_for(timeout=400_000)
        expect(page.locator(".canaries li")).not_to_have_count(0)
        shot(page, "trust")
        page.close()


@pytest.mark.full
def test_what_was_made_stays_in_sight_when_a_request_is_refused(open_page: Open) -> None:
    page = open_page()
    make(page, "red apple", steps=2)
    page.locator(IMAGES).first.wait_for(timeout=60_000)
    page.get_by_text("ControlNet", exact=True).first.click()
    page.get_by_label("Add a ControlNet").select_option("edges")
    page.get_by_label("Prompt", exact=True).fill("octopus")
    page.get_by_role("button", name="Generate").click()
    # The mistake comes into view, and the images stay.
    expect(page.locator("fieldset .problem")).to_be_in_viewport()
    expect(page.locator(IMAGES)).to_have_count(1)
    page.get_by_role("button", name="Remove edges").click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".work h2").first).to_have_text("octopus")
    expect(page.locator(".earlier .thumbnail")).to_have_count(1)


@pytest.mark.full
def test_examples_lead_to_a_first_image(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("group", name="Examples").get_by_role("button", name="octopus").click()
    page.get_by_role("button", name="Generate").click()
    page.locator(IMAGES).first.wait_for(timeout=60_000)
