"""The core works without the packages of the extras, and what needs an extra says so in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from safelight import extras
from safelight.diagnostics.image_difference import _means
from safelight.errors import InputError, MissingExtraError

HOME = Path(__file__).parents[1]

WITHOUT_EXTRAS = """
import importlib.metadata, json, sys

# What None stands for cannot be imported. scipy is a dependency of torchsde alone.
sys.modules.update(dict.fromkeys([*json.loads(sys.argv[1]), "scipy", "starlette"]))
found, gone = importlib.metadata.Distribution.from_name, json.loads(sys.argv[2])

def from_name(name):
    if name in gone:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.Distribution.from_name = from_name
import safelight
from safelight import extras
from safelight.errors import MissingExtraError
from safelight.request.adapters import Control
from typer.testing import CliRunner
from safelight.cli.main import app

assert extras.installed() == ()
engine = safelight.open_engine()
request = safelight.Request("red apple", "starter-noto", steps=1)
[image] = engine.generate(request)

def refused(**changes):
    try:
        next(engine.generate(safelight.Request("red apple", "starter-noto", **changes)))
    except MissingExtraError as error:
        return str(error)

picture = str(safelight.save(image, "."))
control = Control("edges", picture, preprocessor="canny")
commands = {name: ["preprocess", name, picture] for name in ("canny", "invert")}
commands["generate"] = ["generate", "red apple", "-m", "starter-noto", "--steps", "1"]
commands["serve"] = ["serve"]
ran = {name: CliRunner().invoke(app, words) for name, words in commands.items()}
print(json.dumps({
    "images": len(image.pixels),
    "sampler": refused(sampler="dpmpp_sde"),
    "control": refused(controls=(control,)),
    **{name: str(one.exception or "") for name, one in ran.items()},
}))
"""

NO_TRACEBACK = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv.pop(1))))
from safelight.cli.main import run
run()
"""


def packages() -> list[str]:
    return [module for modules in extras.EXTRAS.values() for module in modules]


def declared() -> dict[str, list[str]]:
    """The packages of each extra, by its name."""
    return tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def started(program: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, json.dumps(packages()), *words]
    return subprocess.run(command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True, check=False)


@pytest.mark.full
def test_the_core_draws_without_the_extras_and_names_the_extra_that_it_lacks(tmp_path: Path) -> None:
    gone = [Requirement(line).name for extra in extras.EXTRAS for line in declared()[extra]]
    done = started(WITHOUT_EXTRAS, json.dumps(gone), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["images"] == 64 * 64 * 3
    assert (said["generate"], said["invert"]) == ("", "")
    for what, extra, module, subject in (
        ("sampler", "samplers", "torchsde", "the sampler dpmpp_sde"),
        ("control", "preprocess", "cv2", "the preprocessor canny"),
        ("canny", "preprocess", "cv2", "the preprocessor canny"),
        ("serve", "server", ", ".join(extras.EXTRAS["server"]), "`safelight serve`"),
    ):
        begin = f"{subject} needs the extra '{extra}' (missing: {module}). Run: {sys.executable} -m pip install "
        assert said[what].startswith(begin), said[what]
        assert f"[{extra}]" in said[what]


def test_a_command_that_lacks_an_extra_prints_one_line_and_ends_with_exit_code_2(tmp_path: Path) -> None:
    done = started(NO_TRACEBACK, "serve", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("safelight: `safelight serve` needs the extra 'server'")


def test_the_modules_of_each_extra_are_those_of_its_packages() -> None:
    by_module = packages_distributions()
    for extra, modules in extras.EXTRAS.items():
        needed = {canonicalize_name(Requirement(line).name) for line in declared()[extra]}
        assert {canonicalize_name(by_module[module][0]) for module in modules} == needed, extra
    [every] = declared()["all"]
    # Ray is large, and only clusters need it.
    assert Requirement(every).extras == extras.EXTRAS.keys() - {"cluster"}


def test_what_is_installed_is_not_refused() -> None:
    assert extras.installed() == tuple(extras.EXTRAS)
    for extra in extras.EXTRAS:
        extras.require(extra, "a test")


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"url": "file:///a%20b/safelight", "dir_info": {"editable": True}}, "-e '/a b/safelight[server]'"),
        ({"url": "file:///w/safelight-1-py3-none-any.whl"}, "'/w/safelight-1-py3-none-any.whl[server]'"),
        (None, "'PATH-OF-SAFELIGHT[server]'"),
    ],
)
def test_the_command_installs_from_where_safelight_came(
    recorded: dict[str, object] | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index may have somebody else's package of the name, so the command never consists of the name alone."""

    class Installed:
        def read_text(self, name: str) -> str | None:
            return None if recorded is None else json.dumps(recorded)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError) as caught:
        extras.require("server", "it")
    assert str(caught.value).endswith(f"-m pip install {words}")
    assert caught.value.missing == ("uvicorn",)
    assert isinstance(caught.value, InputError)


def test_means_of_windows_equal_those_of_scipy() -> None:
    from scipy.ndimage import uniform_filter

    values = np.random.default_rng(0).random((37, 24)) * 255
    assert np.allclose(_means(values), uniform_filter(values, 8), rtol=1e-12)
