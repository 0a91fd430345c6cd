"""Where another version of Safelight is installed from. A name alone is never enough: an index may have a package of
that name by somebody else. No torch."""

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
class Source:
    """``requirement``: what pip is asked to install. ``index``: the only index in which it is looked for, "" when the
    requirement is itself the place."""

    requirement: str
    index: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """pip's: Safelight alone, and from there alone."""
        return ("--no-deps", *(("--index-url", self.index) if self.index else ()))

    def __str__(self) -> str:
        return f"{self.requirement} from {self.index}" if self.index else self.requirement


def named(text: str, version: str = "") -> Source:
    """The source that a user names. Raises InputError for what is none, or is another package's."""
    parts = urlsplit(text)
    if parts.scheme in ("http", "https"):
        if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise InputError(
                f"{text}: an index is read over https, so that nobody on the way changes what is installed"
            )
        return Source(f"{NAME}=={version}" if version else NAME, text)
    path = Path(text).expanduser().absolute()
    if version:
        raise InputError(f"--to {version}: only an index has several versions; {path} is one")
    found = _project_of(path)
    if found != NAME:
        raise InputError(f"{path}: {f'is of the package {found}' if found else 'is no wheel and no checkout'}; {_HOW}")
    return Source(str(path))


def of_running(package: str = NAME) -> Source:
    """The source that the running version came from, as pip recorded it (PEP 610). Raises InputError where that is not
    known, or cannot have a newer version."""
    try:
        recorded = distribution(package).read_text("direct_url.json")
    except PackageNotFoundError:
        recorded = None
    if not recorded:
        raise InputError(f"nothing says where the running version came from; {_HOW}")
    values = json.loads(recorded)
    path = Path(unquote(urlsplit(values["url"]).path))
    if values.get("dir_info", {}).get("editable"):
        raise InputError(f"the running version is the checkout {path} itself: update that (`git pull`); or {_HOW}")
    if "dir_info" not in values:
        raise InputError(f"the running version came from {values['url']}, which is one version; {_HOW}")
    return named(str(path))


def _project_of(path: Path) -> str:
    """The name of the package that a wheel or a checkout holds; "" when it is neither."""
    try:
        if path.is_dir():
            return str(tomllib.loads((path / "pyproject.toml").read_text())["project"]["name"])
        with zipfile.ZipFile(path) as wheel:
            metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            lines = wheel.read(metadata).decode().splitlines()
        return next(line.removeprefix("Name: ") for line in lines if line.startswith("Name: "))
    except (OSError, KeyError, StopIteration, ValueError, zipfile.BadZipFile):
        return ""
