"""Sources of other versions of Safelight. A name alone is never enough, because an index may have somebody else's
package of that name. No torch."""

from __future__ import annotations

import json
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

from safelight.errors import InputError

NAME = "safelight"

_HOW = "give a wheel, a checkout, or the address of an index: `safelight upgrade SOURCE`"


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A source of a version.

    ``requirement``: the requirement for pip: a path, or the package's name.
    ``index``: the only index that pip searches; "" if the requirement is a path.
    """

    requirement: str
    index: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of pip: install Safelight without dependencies, and only from this source."""
        return ("--no-deps", *(("--index-url", self.index) if self.index else ()))

    def __str__(self) -> str:
        return f"{self.requirement} from {self.index}" if self.index else self.requirement


def parse_source(text: str, version: str = "") -> PackageSource:
    """Return the source that a user names. Raises InputError if it is not a source, or belongs to another package."""
    parts = urlsplit(text)
    if parts.scheme in ("http", "https"):
        if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise InputError(
                f"{text}: an index must be read over https, so that nobody can change the package on its way"
            )
        return PackageSource(f"{NAME}=={version}" if version else NAME, text)
    path = Path(text).expanduser().absolute()
    if version:
        raise InputError(f"--to {version}: only an index has several versions; {path} is a single one")
    found = _project_of(path)
    if found != NAME:
        problem = f"belongs to the package {found}" if found else "is neither a wheel nor a checkout"
        raise InputError(f"{path}: {problem}; {_HOW}")
    return PackageSource(str(path))


def of_running(package: str = NAME) -> PackageSource:
    """Return the source of the running version, as pip recorded it (PEP 610).

    Raises InputError if it is unknown, or cannot have a newer version.
    """
    try:
        recorded = distribution(package).read_text("direct_url.json")
    except PackageNotFoundError:
        recorded = None
    if not recorded:
        raise InputError(f"the source of the running version is unknown; {_HOW}")
    values = json.loads(recorded)
    path = Path(unquote(urlsplit(values["url"]).path))
    if values.get("dir_info", {}).get("editable"):
        raise InputError(f"the running version is the checkout {path} itself: update it (`git pull`), or {_HOW}")
    if "dir_info" not in values:
        raise InputError(f"the running version came from {values['url']}, which is a single version; {_HOW}")
    return parse_source(str(path))


def _project_of(path: Path) -> str:
    """Return the name of the package in a wheel or a checkout; "" if the path is neither."""
    try:
        if path.is_dir():
            return str(tomllib.loads((path / "pyproject.toml").read_text())["project"]["name"])
        with zipfile.ZipFile(path) as wheel:
            metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            lines = wheel.read(metadata).decode().splitlines()
        return next(line.removeprefix("Name: ") for line in lines if line.startswith("Name: "))
    except (OSError, KeyError, StopIteration, ValueError, zipfile.BadZipFile):
        return ""
