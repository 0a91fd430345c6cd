"""Environments: each version of Safelight that was installed by ``safelight upgrade`` has one of its own. No torch.

``PREFIX`` is the environment into which the user installed Safelight; ``PREFIX/safelight-environments/NAME`` are the
others. Each begins as a tree of hard links to the packages of the active one, which takes no room. pip unlinks and
writes anew what it changes, so no other environment changes with it. ``active.json`` beside them says which one the
command ``safelight`` runs (:mod:`safelight.installation`). Going back changes that file and nothing else.
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
from safelight.files import write_whole

SOURCE = "source.txt"
"""What was installed in an environment. It is written last: a folder without it is no environment."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment: its name, the folder of the virtual environment, when it was made (seconds since 1970; 0 for
    the first), and its packages with their versions."""

    name: str
    prefix: Path
    when: float
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        """The interpreter."""
        return installation.python_of(self.prefix)


class Environments:
    """The environments of one installation. ``prefix``: of any of them; the running one's by default."""

    def __init__(self, prefix: Path | None = None) -> None:
        self._first = installation.first(prefix or Path(sys.prefix))
        self._home = self._first / installation.FOLDER

    def refusal(self) -> str | None:
        """Why this installation is not ours to change, None when it is."""
        if self._first == Path(sys.base_prefix):
            marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
            managed = "the system's package manager looks after this Python"
            return managed if marker.exists() else "this Python is not a virtual environment"
        return None if os.access(self._first, os.W_OK) else f"{self._first} cannot be written"

    def all(self) -> list[Environment]:
        """The first, then the others in the order in which they were made."""
        found = [Environment(installation.FIRST, self._first, 0.0, _versions(self._first))]
        found += [
            Environment(path.parent.name, path.parent, path.stat().st_mtime, _versions(path.parent))
            for path in self._home.glob(f"*/{SOURCE}")
        ]
        return sorted(found, key=lambda environment: environment.when)

    def named(self, name: str) -> Environment:
        """The environment of that name. Raises InputError when there is none."""
        for environment in self.all():
            if environment.name == name:
                return environment
        raise InputError(f"there is no environment {name!r}; `safelight rollback --list` shows them")

    def active(self) -> Environment:
        """The one that the command runs."""
        return self.named(installation.state(self._first).active)

    def before(self) -> Environment | None:
        """The one that the command ran before the last change; None when nothing was ever changed."""
        name = installation.state(self._first).before
        return self.named(name) if name else None

    def activate(self, environment: Environment) -> None:
        """Have the command run that one from now on."""
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
    ) -> Environment:
        """Make an environment with the packages of the active one, and install ``requirement`` of ``package`` there,
        then what that requires.

        ``options`` are pip's. ``isolated``: pip takes no further index from its settings or from the environment's
        variables. ``try_out``: arguments of the new interpreter, which has to end with exit code 0.

        Raises InputError with what pip or the new interpreter says. Nothing is left then.
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
            # The same version may be another build: it is installed again, and never taken for installed already.
            _run(requirement, *pip, "--force-reinstall", *options, requirement, isolated=isolated)
            version = _versions(prefix).get(package)
            if version is None:
                raise InputError(f"{requirement} is not the package {package}")
            _run(f"what {package} {version} requires", *pip, f"{package}=={version}")
            if try_out:
                _run(f"{package} {version}, which does not start", python, "-I", *try_out)
            write_whole(prefix / SOURCE, f"{requirement}\n".encode())
        except BaseException:
            shutil.rmtree(prefix, ignore_errors=True)
            raise
        return self.named(prefix.name)


def _new_folder(home: Path) -> Path:
    """A new folder, called by the first number that is free; two that ask at once get two."""
    number = 1
    while True:
        try:
            (home / str(number)).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return home / str(number)


def _shares_system_packages(prefix: Path) -> bool:
    """Whether an environment sees the packages of the Python that it was made from."""
    with contextlib.suppress(OSError):
        lines = (prefix / "pyvenv.cfg").read_text().splitlines()
        return any(line.replace(" ", "").lower() == "include-system-site-packages=true" for line in lines)
    return False


def _site(prefix: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(prefix), "platbase": str(prefix)}))


def _versions(prefix: Path) -> dict[str, str]:
    return {d.metadata["Name"]: d.version for d in distributions(path=[str(_site(prefix))])}


def _run(what: str, *command: str, isolated: bool = False) -> None:
    """Raises InputError with the last line that the command says when it fails."""
    variables = dict(os.environ)
    if isolated:
        variables = {name: value for name, value in variables.items() if not name.startswith("PIP_")}
        variables["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(f"could not install {what}: {said[-1] if said else done.returncode}. Nothing was changed.")


def _link(source: str, target: str) -> str:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
