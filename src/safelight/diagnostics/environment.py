"""Environments: each version of Safelight that ``safelight upgrade`` installs has its own environment. No torch.

``PREFIX`` is the environment into which the user installed Safelight. The others are
``PREFIX/safelight-environments/NAME``. A new environment starts as hard links to the packages of the active one, so it
takes no disk space. pip replaces files and never writes into them, so the other environments do not change.

``active.json`` beside them names the environment that the command ``safelight`` runs (:mod:`safelight.installation`). A
rollback changes only that file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from safelight import installation
from safelight.errors import InputError
from safelight.files.disk import write_whole

SHOWN = ("safelight", "torch", "diffusers", "transformers")
"""The packages whose versions tell environments apart: they decide about images."""

SOURCE = "source.txt"
"""The file that says what was installed in an environment. It is written last: a folder without it is incomplete."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment.

    ``prefix``: the folder of the virtual environment.
    ``when``: when it was created, in seconds since 1970; 0 for the first.
    ``versions``: the versions of its packages, by name.
    """

    name: str
    prefix: Path
    when: float
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        """The path of its interpreter."""
        return installation.python_of(self.prefix)

    @property
    def shown_versions(self) -> dict[str, str]:
        """The versions of :data:`SHOWN`, without those that are not installed."""
        return {name: self.versions[name] for name in SHOWN if name in self.versions}


class Environments:
    """The environments of one installation. ``prefix``: any of them; default: the running one."""

    def __init__(self, prefix: Path | None = None) -> None:
        self._first = installation.first(prefix or Path(sys.prefix))
        self._home = self._first / installation.FOLDER

    def refusal(self) -> str | None:
        """Return why Safelight may not change this installation, None if it may."""
        if self._first == Path(sys.base_prefix):
            marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
            managed = "the system's package manager manages this Python"
            return managed if marker.exists() else "this Python is not a virtual environment"
        return None if os.access(self._first, os.W_OK) else f"{self._first} cannot be written"

    def all(self) -> list[Environment]:
        """Return all environments, the oldest first."""
        found = [Environment(installation.FIRST, self._first, 0.0, _versions(self._first))]
        found += [
            Environment(path.parent.name, path.parent, path.stat().st_mtime, _versions(path.parent))
            for path in self._home.glob(f"*/{SOURCE}")
        ]
        return sorted(found, key=lambda environment: environment.when)

    def named(self, name: str) -> Environment:
        """Return the environment of a name. Raises InputError if there is none."""
        for environment in self.all():
            if environment.name == name:
                return environment
        raise InputError(f"there is no environment {name!r}; `safelight rollback --list` lists all")

    def active(self) -> Environment:
        """Return the environment that the command runs."""
        return self.named(installation.state(self._first).active)

    def before(self) -> Environment | None:
        """Return the environment that the command ran before the last change, None if there was no change."""
        name = installation.state(self._first).before
        return self.named(name) if name else None

    def activate(self, environment: Environment) -> None:
        """Make the command run this environment from now on."""
        now = installation.state(self._first)
        state = {"active": environment.name, "before": now.active}
        if environment.name != now.active or now.gone:
            write_whole(self._home / installation.ACTIVE, json.dumps(state).encode())

    def build(
        self,
        package: str,
        requirement: str,
        options: Sequence[str] = (),
        isolated: bool = False,
        try_out: Sequence[str] = (),
        extras: Sequence[str] = (),
    ) -> Environment:
        """Create an environment with the packages of the active one, and install ``requirement`` and its dependencies.

        ``package``: the name of the package that ``requirement`` must be.
        ``options``: options of pip.
        ``isolated``: pip ignores indexes in its settings and in the environment's variables.
        ``extras``: the package's extras whose dependencies are installed too.
        ``try_out``: arguments for the new interpreter, which must end with exit code 0.
        Raises InputError with the message of pip or of the new interpreter. The new environment is then removed.
        """
        if why := self.refusal():
            raise InputError(why)
        start = self.active()
        prefix = _new_folder(self._home)
        try:
            shared = ("--system-site-packages",) if _shares_system_packages(start.prefix) else ()
            _run(package, sys.executable, "-I", "-m", "venv", "--without-pip", *shared, str(prefix))
            shutil.rmtree(_site(prefix))
            shutil.copytree(_site(start.prefix), _site(prefix), copy_function=_link, symlinks=True)
            python = str(installation.python_of(prefix))
            if not (_site(prefix) / "pip").exists():
                _run(package, python, "-I", "-m", "ensurepip")
            pip = (python, "-I", "-m", "pip", "install", "--disable-pip-version-check")
            # The same version may be another build. --force-reinstall keeps pip from skipping it.
            _run(requirement, *pip, "--force-reinstall", *options, requirement, isolated=isolated)
            version = _versions(prefix).get(package)
            if version is None:
                raise InputError(f"{requirement} is not the package {package}")
            wanted = f"[{','.join(extras)}]" if extras else ""
            _run(f"the dependencies of {package} {version}", *pip, f"{package}{wanted}=={version}")
            if try_out:
                _run(f"{package} {version}, which does not start", python, "-I", *try_out)
            write_whole(prefix / SOURCE, f"{requirement}\n".encode())
        except BaseException:
            shutil.rmtree(prefix, ignore_errors=True)
            raise
        return self.named(prefix.name)


def _new_folder(home: Path) -> Path:
    """Create a folder named by the first free number. Two simultaneous calls get two folders."""
    number = 1
    while True:
        try:
            (home / str(number)).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return home / str(number)


def _shares_system_packages(prefix: Path) -> bool:
    """Return whether an environment uses the packages of its base Python."""
    with contextlib.suppress(OSError):
        lines = (prefix / "pyvenv.cfg").read_text().splitlines()
        return any(line.replace(" ", "").lower() == "include-system-site-packages=true" for line in lines)
    return False


def _site(prefix: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(prefix), "platbase": str(prefix)}))


def _versions(prefix: Path) -> dict[str, str]:
    return {d.metadata["Name"]: d.version for d in distributions(path=[str(_site(prefix))])}


def _run(what: str, *command: str, isolated: bool = False) -> None:
    """Run a command. Raises InputError with the last line of its output if it fails."""
    variables = dict(os.environ)
    if isolated:
        variables = {name: value for name, value in variables.items() if not name.startswith("PIP_")}
        variables["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(f"could not install {what}: {said[-1] if said else done.returncode}. Nothing was changed.")


def _link(source: str, target: str) -> str:
    """Create a hard link, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
