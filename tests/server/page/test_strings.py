"""The texts of the page: each language has all of them, and each that the page shows exists."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from safelight.catalog.published import sizes
from safelight.devices.transfer import Counts
from safelight.request.field import fields_of
from safelight.request.run_settings import RunSettings
from safelight.request.schema import Request
from safelight.server.page.routes import FILES, VIEWS

DYNAMIC = {
    "where_": ("none", "part", "whole"),
    "view_": ("create", *VIEWS),
    "stage_": ("switch", "encode", "decode"),
    "tool_": ("brush", "eraser", "rectangle", "lasso", "fill", "box", "pan"),
    "hint_": ("brush", "eraser", "rectangle", "lasso", "fill", "box", "pan"),
    "layer_": ("mask", "picture"),
    "box_": ("x", "y", "width", "height"),
    "role_": ("admin", "member", "guest"),
    "compare_": ("slider", "flicker", "difference"),
    "fact_": (
        *(one.name for kind in (RunSettings, Counts) for one in fields(kind)),
        *sorted({role for _, configs in sizes().values() for role in configs}),
        "verification",
    ),
    "download_": ("queued", "running", "adding", "done", "failed", "cancelled"),
}


def strings(language: str) -> dict[str, str]:
    text = (FILES / f"strings/{language}.js").read_text()
    return {key: json.loads(value) for key, value in re.findall(r'^  (\w+): (".*"),$', text, re.MULTILINE)}


def test_each_language_has_each_text_with_the_same_values() -> None:
    english, chinese = strings("en"), strings("zh")
    assert len(english) > 250
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_each_text_that_the_page_shows_exists_and_each_is_shown() -> None:
    scripts = "\n".join(path.read_text() for path in FILES.rglob("*.js") if path.parent.name not in ("lib", "strings"))
    used = set(re.findall(r'\bt\(\s*"(\w+)"', scripts)) | set(re.findall(r'[?:] "(\w+)"[ ,)]', scripts))
    used |= {f"{start}{end}" for start, ends in DYNAMIC.items() for end in ends}
    known = strings("en").keys()
    missing = set(re.findall(r'\bt\(\s*"(\w+)"', scripts)) - known
    assert missing == set()
    assert {f"{start}{end}" for start, ends in DYNAMIC.items() for end in ends} <= known
    unused = {key for key in known - used if not key.startswith("field_")}
    assert unused == set()
    labels = {key.removeprefix("field_") for key in known if key.startswith("field_")}
    assert labels <= fields_of(Request).keys()


def test_the_pages_own_code_is_small() -> None:
    """The issue's limit is 300 KB; nothing is compressed. A browser loads the texts of one language."""
    files = [path for path in Path(FILES).rglob("*") if path.suffix in (".js", ".css", ".html")]
    languages = [path.stat().st_size for path in files if path.parent.name == "strings"]
    size = sum(path.stat().st_size for path in files) - sum(languages) + max(languages)
    assert size < 300_000
