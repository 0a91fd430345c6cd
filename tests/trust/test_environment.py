"""An upgrade keeps what it replaces, and going back is exact: a real virtual environment, pip, and two small wheels."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from safelight.errors import InputError
from safelight.trust.environment import Environment


def wheel(folder: Path, version: str) -> Path:
    """A package ``lamp`` that says its version."""
    path = folder / f"lamp-{version}-py3-none-any.whl"
    info = f"lamp-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lamp.py", f"version = {version!r}\n")
        if version == "2.0":
            archive.writestr("lamp_more.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: lamp\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    return home / "bin/python"


def said(python: Path) -> str:
    command = "import lamp, os; print(lamp.version, os.path.exists(lamp.__file__.replace('lamp.py', 'lamp_more.py')))"
    return subprocess.run([python, "-c", command], check=True, capture_output=True, text=True).stdout.strip()


def test_back_and_forth(python: Path, tmp_path: Path) -> None:
    site = next(python.parent.parent.glob("lib/python3*/site-packages"))
    environment = Environment(tmp_path, str(python), site)
    options = ("--no-index", "--no-deps", "--disable-pip-version-check")
    environment.install(str(wheel(tmp_path, "1.0")), options=options)
    assert (said(python), environment.versions()["lamp"]) == ("1.0 False", "1.0")
    first = environment.keep()
    environment.install(str(wheel(tmp_path, "2.0")), options=options)
    assert said(python) == "2.0 True"
    assert [kept.versions["lamp"] for kept in environment.kept()] == ["1.0"]
    environment.restore(environment.kept()[0])
    assert (said(python), environment.versions()["lamp"]) == ("1.0 False", "1.0")
    # That can be undone too, and what was kept is as it was.
    assert [kept.versions["lamp"] for kept in environment.kept()] == ["2.0", "1.0"]
    environment.restore(environment.kept()[0])
    assert said(python) == "2.0 True"
    environment.restore(first)
    assert said(python) == "1.0 False"
    with pytest.raises(InputError, match="pip did not install lamp"):
        environment.install("lamp==9", options=options)
    assert said(python) == "1.0 False"


def test_what_others_look_after_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment(tmp_path)
    assert environment.refusal() is None
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert environment.refusal()
    with pytest.raises(InputError):
        environment.keep()
    assert environment.kept() == []
