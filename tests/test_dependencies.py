"""The dependencies: ranges in pyproject.toml, tested versions in constraints.txt and constraints-oldest.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HOME = Path(__file__).parents[1]


def declared() -> dict[str, Requirement]:
    """Every package that Safelight or one of its extras needs, without the tools for the tests."""
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra, needed in project["optional-dependencies"].items():
        lines += [] if extra in ("dev", "starter") else needed
    found = {canonicalize_name(one.name): one for one in map(Requirement, lines)}
    found.pop("safelight", None)
    return found


NEEDS_NEWER = ("mcp",)
"""Packages that need newer versions of others than the oldest ones. `make test-oldest` runs without their extras."""


def pinned(file: str) -> dict[str, Version]:
    lines = [line for line in (HOME / file).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_oldest_versions_are_those_that_the_ranges_begin_with() -> None:
    first = {
        name: Version(spec.version)
        for name, requirement in declared().items()
        for spec in requirement.specifier
        if spec.operator == ">=" and name not in NEEDS_NEWER
    }
    assert pinned("constraints-oldest.txt") == first


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_the_versions_that_were_tested_are_within_the_ranges(file: str) -> None:
    versions = pinned(file)
    tested = {name: one for name, one in declared().items() if "oldest" not in file or name not in NEEDS_NEWER}
    outside = {name: str(one) for name, one in tested.items() if versions[name] not in one.specifier}
    assert outside == {}


def test_the_next_minor_version_of_diffusers_is_not_let_in() -> None:
    """It may change the internal modules of which models are built."""
    tested = pinned("constraints.txt")["diffusers"]
    following = f"{tested.major}.{tested.minor + 1}"
    assert not declared()["diffusers"].specifier.contains(f"{following}.0")
    assert re.search(rf"<{following}\b", str(declared()["diffusers"].specifier))
