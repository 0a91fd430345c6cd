"""An upgrade names its source: a name alone is never looked up anywhere."""

from __future__ import annotations

import json
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from safelight.cli.main import app
from safelight.diagnostics import environment, sources
from safelight.errors import InputError


def wheel(folder: Path, name: str) -> Path:
    path = folder / f"{name}-9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-9.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    return path


def checkout(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    return folder


def test_a_wheel_a_checkout_or_an_index(tmp_path: Path) -> None:
    of_wheel = sources.parse_source(str(wheel(tmp_path, "safelight")))
    assert (of_wheel.requirement, of_wheel.index) == (str(tmp_path / "safelight-9.0-py3-none-any.whl"), "")
    assert sources.parse_source(str(checkout(tmp_path / "src", "safelight"))).requirement == str(tmp_path / "src")
    index = sources.parse_source("https://packages.example.org/simple", "0.2.0")
    assert index.requirement == "safelight==0.2.0"
    assert index.options == ("--no-deps", "--index-url", "https://packages.example.org/simple")


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("x")
    for text, problem in (
        (str(wheel(tmp_path, "lamp")), "belongs to the package lamp"),
        (str(checkout(tmp_path / "other", "lamp")), "belongs to the package lamp"),
        (str(tmp_path / "text.whl"), "is neither a wheel nor a checkout"),
        ("safelight", "is neither a wheel nor a checkout"),
        ("http://packages.example.org/simple", "over https"),
    ):
        with pytest.raises(InputError, match=problem):
            sources.parse_source(text)
    with pytest.raises(InputError, match="only an index has several versions"):
        sources.parse_source(str(wheel(tmp_path, "safelight")), "1.0")


@pytest.mark.parametrize(
    ("recorded", "problem"),
    [
        (None, "source of the running version is unknown"),
        ({"url": "file:///src", "dir_info": {"editable": True}}, "the checkout /src itself"),
        ({"url": "file:///a-1-py3-none-any.whl", "archive_info": {}}, "which is a single version"),
    ],
)
def test_where_the_running_version_came_from_decides(
    recorded: dict[str, Any] | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distribution:
        def read_text(self, _: str) -> str | None:
            return json.dumps(recorded) if recorded else None

    monkeypatch.setattr(sources, "distribution", lambda _: Distribution())
    with pytest.raises(InputError, match=problem):
        sources.of_running()


def test_a_checkout_that_was_installed_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def read_text(self, _: str) -> str | None:
            return json.dumps({"url": checkout(tmp_path / "a b", "safelight").as_uri(), "dir_info": {}})

    monkeypatch.setattr(sources, "distribution", lambda _: Distribution())
    assert sources.of_running().requirement == str(tmp_path / "a b")


def test_the_command_never_asks_an_index_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(environment.Environments, "build", lambda _, *asking: asked.append(asking))

    def unknown(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(sources, "distribution", unknown)
    result = CliRunner().invoke(app, ["upgrade"])
    assert result.exit_code != 0
    assert "the source of the running version is unknown" in str(result.exception)
    assert not asked
