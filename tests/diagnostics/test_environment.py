"""Each version has an environment of its own: real virtual environments, pip, and small wheels."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from safelight import installation
from safelight.diagnostics.environment import Environment, Environments, _new_folder
from safelight.errors import InputError

OPTIONS = ("--no-index", "--no-deps")
SOURCE = Path(__file__).parents[2] / "src"


def wheel(folder: Path, name: str, version: str, files: dict[str, str], scripts: str = "", more: str = "") -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", scripts)
        archive.writestr(f"{info}/RECORD", "")
    return path


def lamp(folder: Path, version: str) -> Path:
    """A package that says its version; the second has a module more."""
    more = {"lamp_more.py": ""} if version == "2.0" else {}
    return wheel(folder, "lamp", version, {"lamp.py": f"version = {version!r}\n", **more})


def install(prefix: Path, *requirements: Path) -> None:
    pip = [prefix / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *OPTIONS]
    subprocess.run([*pip, *requirements], check=True)


@pytest.fixture(scope="module")
def first_lamp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the first lamp, as a user made it."""
    folder = tmp_path_factory.mktemp("first")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "installed")], check=True)
    install(folder / "installed", lamp(folder, "1.0"))
    return folder / "installed"


@pytest.fixture
def prefix(first_lamp: Path, tmp_path: Path) -> Path:
    """A copy of that environment. Its interpreter is a link, so it works at any place."""
    return shutil.copytree(first_lamp, tmp_path / "installed", symlinks=True)


def said(environment: Environment) -> str:
    command = "import lamp, os; print(lamp.version, os.path.exists(lamp.__file__.replace('lamp.py', 'lamp_more.py')))"
    return subprocess.run(
        [environment.python, "-c", command], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.full
def test_each_version_stays_as_it_is(prefix: Path, tmp_path: Path) -> None:
    environments = Environments(prefix)
    [first] = environments.all()
    assert (first.name, said(first), environments.active(), environments.before()) == (
        "first",
        "1.0 False",
        first,
        None,
    )
    second = environments.build("lamp", str(lamp(tmp_path, "2.0")), OPTIONS)
    # It is there, and nothing else has changed: neither what runs nor the packages of the first.
    assert (said(second), said(first), environments.active()) == ("2.0 True", "1.0 False", first)
    environments.activate(second)
    assert (environments.active(), environments.before()) == (second, first)
    # From within the second, they are the same.
    within = Environments(second.prefix)
    assert (within.all(), within.active()) == (environments.all(), second)
    third = within.build("lamp", str(lamp(tmp_path, "3.0")), OPTIONS)
    assert [said(one) for one in within.all()] == ["1.0 False", "2.0 True", "3.0 False"]
    # Back, and back from that.
    within.activate(third)
    for name in ("2", "first"):
        within.activate(within.named({"2": "1", "first": "first"}[name]))
    assert (within.active().name, within.before()) == ("first", second)
    within.activate(first)
    assert within.before() == second


@pytest.mark.full
def test_what_cannot_be_installed_leaves_nothing(prefix: Path, tmp_path: Path) -> None:
    environments = Environments(prefix)
    with pytest.raises(InputError, match=r"could not install lamp==9: .*No matching distribution.*Nothing was changed"):
        environments.build("lamp", "lamp==9", OPTIONS)
    other = wheel(tmp_path, "other", "1.0", {"other.py": ""})
    with pytest.raises(InputError, match="is not the package safelight"):
        environments.build("safelight", str(other), OPTIONS)
    assert [environment.name for environment in environments.all()] == ["first"]
    assert list((prefix / installation.FOLDER).iterdir()) == []
    with pytest.raises(InputError, match="there is no environment '7'"):
        environments.named("7")


def test_what_others_look_after_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Environments().refusal() is None
    environments = Environments(Path(sys.base_prefix))
    assert environments.refusal()
    with pytest.raises(InputError):
        environments.build("lamp", "lamp", OPTIONS)


@pytest.mark.full
def test_the_same_version_is_another_build(prefix: Path, tmp_path: Path) -> None:
    other = wheel(tmp_path, "lamp", "1.0", {"lamp.py": "version = 'the other build'\n"})
    built = Environments(prefix).build("lamp", str(other), OPTIONS)
    assert said(built) == "the other build False"


@pytest.mark.full
def test_an_index_is_the_only_place_that_is_looked_at(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    lamp(tmp_path / "elsewhere", "2.0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "elsewhere"))
    index = ("--no-deps", "--index-url", "https://127.0.0.1:9/simple", "--retries", "0")
    environments = Environments(prefix)
    with pytest.raises(InputError, match="could not install lamp"):
        environments.build("lamp", "lamp", index, isolated=True)
    assert [environment.name for environment in environments.all()] == ["first"]


def test_a_version_that_does_not_start_is_not_taken(prefix: Path, tmp_path: Path) -> None:
    broken = wheel(tmp_path, "lamp", "4.0", {"lamp.py": "raise RuntimeError('no light')\n"})
    environments = Environments(prefix)
    with pytest.raises(InputError, match="does not start: RuntimeError: no light"):
        environments.build("lamp", str(broken), OPTIONS, try_out=("-c", "import lamp"))
    assert [environment.name for environment in environments.all()] == ["first"]


@pytest.mark.full
def test_the_dependencies_of_the_extras_that_were_installed_are_installed_too(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new version may need a package more for an extra; here the index does not have it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    more = "Provides-Extra: bright\nRequires-Dist: bulb; extra == 'bright'\n"
    newer = wheel(tmp_path, "lamp", "2.0", {"lamp.py": "version = '2.0'\n"}, more=more)
    environments = Environments(prefix)
    with pytest.raises(InputError, match=r"the dependencies of lamp 2\.0: .*bulb"):
        environments.build("lamp", str(newer), OPTIONS, extras=("bright",))
    assert said(environments.build("lamp", str(newer), OPTIONS)).startswith("2.0")


def test_two_that_upgrade_at_once_get_two_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: _new_folder(tmp_path / "home"), range(24)))
    assert len(set(folders)) == 24


PRINTS = {
    "safelight/cli/__init__.py": "",
    "safelight/cli/__main__.py": "from safelight.cli.main import run\nrun()\n",
    "safelight/cli/main.py": "def run():\n    import sys, safelight\n    print(safelight.version, *sys.argv[1:])\n",
    "safelight/launch.py": (SOURCE / "safelight/launch.py").read_text(),
    "safelight/installation.py": (SOURCE / "safelight/installation.py").read_text(),
}
SCRIPT = "[console_scripts]\nsafelight = safelight.launch:run\n"


@pytest.mark.full
def test_the_command_runs_what_is_active(tmp_path: Path) -> None:
    """The command of the first version that was installed; the versions have our ``launch`` and print themselves."""
    prefix = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "venv", str(prefix)], check=True)
    wheels = {
        version: wheel(
            tmp_path, "safelight", version, {**PRINTS, "safelight/__init__.py": f"version = {version!r}\n"}, SCRIPT
        )
        for version in ("1.0", "2.0")
    }
    install(prefix, wheels["1.0"])

    def command(*arguments: str) -> tuple[str, str]:
        done = subprocess.run(
            [prefix / "bin/safelight", *(arguments or ("models", "list"))],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done.stdout.strip(), done.stderr.strip()

    assert command() == ("1.0 models list", "")
    environments = Environments(prefix)
    second = environments.build("safelight", str(wheels["2.0"]), OPTIONS)
    environments.activate(second)
    assert command() == ("2.0 models list", "")
    environments.activate(environments.named("first"))
    assert command() == ("1.0 models list", "")
    environments.activate(second)
    # A file of the user's is no module, and an environment that does not start can be left.
    (tmp_path / "safelight").mkdir()
    (tmp_path / "safelight/__init__.py").write_text("raise SystemExit('the current folder was imported')")
    assert command() == ("2.0 models list", "")
    assert command("rollback") == ("1.0 rollback", "")
    # Only that command is the first environment's: a prompt is not.
    assert command("generate", "rollback") == ("2.0 generate rollback", "")
    second.python.unlink()
    assert command() == ("1.0 models list", f"safelight: the environment 1 is gone; using {prefix} instead")
    assert Environments(prefix).active().name == "first"
    environments.activate(environments.named("first"))
    assert command() == ("1.0 models list", "")
