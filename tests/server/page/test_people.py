"""The page of a server that knows people: log-in, what each sees, and who administers."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest
from playwright.sync_api import Page, expect
from support import serving
from support.people import PASSWORD, add_people, as_person
from support.serving import ASK, ended

from .conftest import Open, shot


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[serving.Server]:
    root = tmp_path_factory.mktemp("people-page")
    add_people(root)
    with serving.serving(root) as made:
        yield made


def log_in(page: Page, name: str, password: str = PASSWORD) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Password", exact=True).fill(password)
    page.get_by_role("button", name="Log in").click()


def test_somebody_logs_in_makes_an_image_shares_it_and_logs_out(server: serving.Server, open_page: Open) -> None:
    with as_person(server, "eve") as http:
        job = http.post("/api/v1/generate", json={**ASK, "prompt": "what eve drew"}).json()["id"]
        assert ended(http, job)["state"] == "done"
    page = open_page("/gallery")
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    log_in(page, "max", "wrong")
    expect(page.get_by_role("alert")).to_contain_text("the name or the password is wrong")
    shot(page, "log-in")
    log_in(page, "max")
    expect(page.get_by_text("Images: 0")).to_be_visible()
    page.get_by_role("link", name="Create").click()
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator(".thumbnail img").first).to_be_visible(timeout=60_000)
    page.get_by_role("link", name="Gallery").click()
    expect(page.get_by_text("Images: 1")).to_be_visible()
    page.get_by_role("button", name="New board").click()
    page.get_by_role("textbox", name="Name of the board").fill("for all")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("button", name="for all").click()
    page.locator(".menu").get_by_role("button", name="for all").click()
    page.get_by_role("button", name="Share with everybody").click()
    expect(page.locator(".boards")).to_contain_text("shared")
    with as_person(server, "gus") as http:
        assert [(one["name"], one["person"]) for one in http.get("/api/v1/boards").json()] == [("for all", "max")]
    page.get_by_role("link", name="max").click()
    expect(page.get_by_role("region", name="Your account")).to_contain_text("Member")
    # A member administers nothing.
    expect(page.get_by_text("Who changed what")).to_have_count(0)
    expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    page.get_by_label("What the key is for").fill("a script")
    page.get_by_role("button", name="Make a key").click()
    key = page.locator(".key-text").inner_text()
    assert key.startswith("safelight-")
    page.get_by_role("button", name="Close").first.click()
    expect(page.get_by_role("region", name="Your account")).to_contain_text("a script")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    assert page.evaluate("localStorage.getItem('safelight.asked')") is None


def test_an_administrator_adds_and_removes_people(server: serving.Server, open_page: Open) -> None:
    page = open_page("/settings")
    log_in(page, "ada")
    form = page.get_by_role("form", name="Add a person")
    form.get_by_label("Name", exact=True).fill("zoe")
    form.get_by_label("Password", exact=True).fill("short")
    form.get_by_role("button").click()
    expect(page.get_by_role("alert")).to_contain_text("from 10 to 1000")
    form.get_by_label("Password", exact=True).fill(PASSWORD)
    form.get_by_label("Role").select_option("guest")
    form.get_by_role("button").click()
    people = page.get_by_role("region", name="People")
    row = people.get_by_role("listitem").filter(has_text="zoe")
    expect(row.get_by_label("Role")).to_have_value("guest")
    row.get_by_label("Role").select_option("member")
    page.get_by_text("Who changed what").click()
    expect(page.get_by_role("cell", name=re.compile("zoe, guest"))).to_be_visible()
    shot(page, "people")
    row.get_by_role("button", name="Remove").click()
    page.get_by_label("Who gets the images").select_option("max")
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(row).to_have_count(0)
    with as_person(server, "ada") as http:
        assert "zoe" not in [one["name"] for one in http.get("/api/v1/people").json()]
    # Whose session was ended elsewhere must log in again, and is told so by no error.
    server_database = page.context.cookies()
    assert server_database
    page.context.clear_cookies()
    page.get_by_role("link", name="Gallery").click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()


def test_a_guest_sees_the_page_without_what_guests_may_not(server: serving.Server, open_page: Open) -> None:
    page = open_page("/models")
    log_in(page, "gus")
    expect(page.get_by_role("heading", name="Models (4)")).to_be_visible()
    expect(page.get_by_role("button", name="Remove ink")).to_have_count(0)
    expect(page.get_by_text("Add models")).to_have_count(0)
    page.get_by_role("link", name="gus").click()
    expect(page.get_by_role("region", name="Your account")).to_contain_text("at most 50 steps")
    expect(page.get_by_text("Settings of the server")).to_have_count(0)
    expect(page.get_by_role("alert")).to_have_count(0)
