"""The installed packages: kept before an upgrade, so that going back needs no network and no luck. No torch.

What is kept is a tree of hard links to the files of ``site-packages``: it takes no room, and stays as it is, since pip
removes and writes files anew where it changes them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from safelight.errors import InputError
from safelight.files import write_whole
from safelight.formats.folder import read_json

TOLD = "versions.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """An environment that was replaced: when (seconds since 1970), and its packages with their versions."""

    folder: Path
    when: float
    versions: dict[str, str]


class Environment:
    """The packages in ``site`` that ``python`` runs with; what is kept lies under ``root``."""

    def __init__(self, root: Path, python: str = sys.executable, site: Path | None = None) -> None:
        self._home = root / "environments"
        self._python = python
        self._site = site or Path(sysconfig.get_path("purelib"))

    def refusal(self) -> str | None:
        """Why these packages are not ours to change, None when they are."""
        marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
        if sys.prefix == sys.base_prefix and marker.exists():
            return "the system's package manager looks after this Python"
        if sys.prefix == sys.base_prefix:
            return "this Python is not a virtual environment"
        return None if os.access(self._site, os.W_OK) else f"{self._site} cannot be written"

    def versions(self) -> dict[str, str]:
        """Every package in ``site``, with its version."""
        return {d.metadata["Name"]: d.version for d in distributions(path=[str(self._site)])}

    def kept(self) -> list[Kept]:
        """What can be gone back to, the newest first."""
        found: list[Kept] = []
        for path in sorted(self._home.glob(f"*/{TOLD}"), reverse=True):
            values = read_json(path)
            found.append(Kept(path.parent, values["when"], values["versions"]))
        return found

    def keep(self) -> Kept:
        """Keep what is installed now. Raises InputError when it is not ours to change."""
        if why := self.refusal():
            raise InputError(why)
        return self._keep()

    def _keep(self) -> Kept:
        folder = self._home / f"{time.time():.3f}"
        try:
            shutil.copytree(self._site, folder / "site-packages", copy_function=_linked, symlinks=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        made = Kept(folder, time.time(), self.versions())
        # Written last: without it the folder is none that can be gone back to.
        write_whole(folder / TOLD, json.dumps({"when": made.when, "versions": made.versions}, indent=1).encode())
        return made

    def install(self, *requirements: str, options: Sequence[str] = ()) -> None:
        """Have pip install them. Raises InputError with what pip says when that fails."""
        command = [self._python, "-m", "pip", "install", "--upgrade", *options, *requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise InputError(f"pip did not install {' '.join(requirements)}: {said[-1] if said else done.returncode}")

    def complete(self, package: str) -> None:
        """Have pip install what an installed package requires and lacks; the package itself stays as it is. Raises
        InputError with what pip says when that fails."""
        version = self.versions()[package]
        done = subprocess.run(
            [self._python, "-m", "pip", "install", f"{package}=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            problem = said[-1] if said else done.returncode
            raise InputError(f"pip did not install what {package} {version} requires: {problem}; `safelight rollback`")

    def restore(self, kept: Kept) -> None:
        """Put back what was kept; what is installed now is kept in its place, so that this can be undone too."""
        self._keep()
        fresh = self._site.with_name(f".{self._site.name}-{os.getpid()}")
        aside = self._site.with_name(f".{self._site.name}-{os.getpid()}-replaced")
        shutil.copytree(kept.folder / "site-packages", fresh, copy_function=_linked, symlinks=True)
        self._site.rename(aside)
        fresh.rename(self._site)
        shutil.rmtree(aside, ignore_errors=True)

    @staticmethod
    def command(kept: Kept) -> str:
        """What to type where the packages are not ours to change."""
        return "pip install " + " ".join(f"{name}=={version}" for name, version in sorted(kept.versions.items()))


def _linked(source: str, target: str) -> str:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
