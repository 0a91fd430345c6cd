"""What Safelight wrote before requests had a schema is read, and goes on.

``tests/data/before_the_schema`` was written by the last commit before: a picture of a starter, settings, and a database
with a finished job and two that wait.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.jobs import resolved
from typer.testing import CliRunner

import safelight
from safelight.cli.main import app
from safelight.pictures import chunks
from safelight.queue.database import Database
from safelight.request.schema import VERSION
from safelight.request.stored import read_request
from safelight.settings_sources import load_settings

DATA = Path(__file__).parent / "data/before_the_schema"
FIRST = safelight.Request(
    "red apple, (shiny:1.2)",
    "starter-noto",
    seed=7,
    steps=4,
    width=64,
    height=64,
    variation_seed=9,
    variation_strength=0.2,
    cfg=7.0,
    sampler="euler",
    schedule="default",
    count=2,
    clip_skip=0,
)


def test_its_database_opens_and_its_jobs_are_what_they_were(root: Path) -> None:
    shutil.copy(DATA / "safelight.db", root)
    database = Database(root)
    third, second, first = database.jobs()
    assert [job.state for job in (first, second, third)] == ["done", "queued", "queued"]
    assert first.request == third.request == FIRST
    assert not first.unreadable
    assert database.start(second.id, "next") is not None
    [new] = database.accept(resolved(root, FIRST))
    assert new.number > third.number
    database.close()


def test_its_settings_are_read(root: Path) -> None:
    shutil.copy(DATA / "safelight.yaml", root)
    settings = load_settings(root)
    assert settings.max_images == 12


def test_its_picture_is_made_again(root: Path) -> None:
    picture = DATA / "starter-noto-7.png"
    metadata, held = chunks.read(picture)
    request = read_request(metadata["request"], metadata["version"])
    assert replace(request, model="starter-noto", tile=None, embeddings=None) == replace(
        FIRST.for_image(1), precision=request.precision
    )
    done = CliRunner().invoke(app, ["remake", str(picture), "--json"])
    said = json.loads(done.output.splitlines()[-1])
    assert said["recorded_sha256"] == held
    if "hardware" in said["changed"]:
        pytest.skip("another processor may round otherwise")
    assert said["same"], said


def test_what_a_newer_version_stored_fails_alone(root: Path) -> None:
    with pytest.raises(safelight.RequestError, match="newer Safelight"):
        read_request({"prompt": "x", "model": "m"}, VERSION + 1)
