"""Writes the page of licences: ``python tools/licences.py docs/licences.md``.

It lists every package that Safelight needs, directly or through another one, as the packages' own metadata say it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

HEAD = """# Licences

`make licences` writes this page from the metadata of the installed packages. Safelight itself has the Apache License
2.0. This is what Safelight with all its extras brings on Linux with PyTorch's CPU build. PyTorch's CUDA builds also
bring NVIDIA's libraries, which have NVIDIA's own licence.

CLIP's vocabulary, which is part of Safelight, has the MIT License of OpenAI's CLIP. Safelight's
grammar of compel's prompts follows compel's, which has the MIT License. `starter/LICENSES.md` names the licences of the
images from which the starters were trained.

| package | licence | needed by |
|---|---|---|"""

_PREFIX = "License :: OSI Approved :: "
_LONGEST = 60
"""A longer entry is the text of a licence, not its name."""


def needed(root: str = "safelight", extra: str = "all") -> dict[str, tuple[Distribution, set[str]]]:
    """Return each installed package that an extra of ``root`` needs, by its normalized name.

    With each comes the set of the packages that require it.
    """
    found: dict[str, tuple[Distribution, set[str]]] = {}
    waiting, seen = [(root, extra)], set[tuple[str, str]]()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            chosen = extras.split(",") or [""]
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in chosen):
                continue
            try:
                there = distribution(requirement.name)
            except PackageNotFoundError:
                continue  # It is for another platform or version of Python.
            key = re.sub(r"[-_.]+", "-", requirement.name).lower()
            waiting.append((key, ",".join(sorted(requirement.extras))))
            # An extra may consist of other extras of the same package.
            if key != root:
                found.setdefault(key, (there, set()))[1].add(re.sub(r"[-_.]+", "-", name).lower())
    return found


def licence_of(package: Distribution) -> str:
    """Return the name of a package's licence. Raises ValueError if its metadata have none."""

    def entries(key: str) -> list[str]:
        return package.metadata.get_all(key) or []

    expression = "".join(entries("License-Expression"))
    classifiers = [c.removeprefix(_PREFIX) for c in entries("Classifier") if c.startswith(_PREFIX)]
    named = "".join(entries("License")).strip()
    short = named if named and len(named) <= _LONGEST and "\n" not in named else ""
    files = [path for path in package.files or () if re.match(r"(?i)licen[cs]e|copying", path.name)]
    text = files[0].read_text() if files else named
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    found = expression or ", ".join(classifiers) or short or first[:_LONGEST]
    if not found:
        raise ValueError(f"{package.name} does not say its licence")
    return found


def page() -> Iterator[str]:
    """Yield the page's lines."""
    yield HEAD
    for name, (package, needing) in sorted(needed().items()):
        yield f"| {name} | {licence_of(package)} | {', '.join(sorted(needing))} |"
    yield ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(page()))
