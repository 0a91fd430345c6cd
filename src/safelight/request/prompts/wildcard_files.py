"""The values of wildcards: the files of a folder, ``NAME.txt`` with one value per line, JSON and YAML."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class WildcardValue:
    """A value. ``weight``: None if the file has none."""

    text: str
    weight: float | None = None


class WildcardFiles:
    """The values in a folder. It is read at the first wildcard.

    ``problems``: what could not be read, for each file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self._values: dict[str, tuple[WildcardValue, ...]] = {}
        self._read: dict[str, list[WildcardValue] | Path] | None = None

    def values(self, name: str) -> tuple[WildcardValue, ...]:
        """Return the values of a wildcard in alphabetical order, each once.

        ``name``: a file's name without its suffix, or a pattern with ``*``.
        If the folder has no such file, its subfolders are searched.
        """
        if name not in self._values:
            found = self._matching(name)
            if not found and not name.startswith("**"):
                found = self._matching(f"**/{name}")
            self._values[name] = tuple(sorted(dict.fromkeys(found), key=lambda value: value.text))
        return self._values[name]

    def _matching(self, name: str) -> list[WildcardValue]:
        name = re.sub(r"[\\/]+", "/", name).strip("/")
        if ".." in name:
            return []
        if self._read is None:
            self._read = dict(self._files())
        found: list[WildcardValue] = []
        for key, values in self._read.items():
            if fnmatch(key, name):
                found += self._lines(values) if isinstance(values, Path) else values
        return found

    def _lines(self, path: Path) -> list[WildcardValue]:
        try:
            with path.open(encoding="utf-8", errors="ignore") as file:
                lines = [line.strip() for line in file]
        except OSError as error:
            self.problems.append(f"{path}: {error.strerror}")
            return []
        return [WildcardValue(line) for line in lines if line and not line.startswith("#")]

    def _files(self) -> Iterator[tuple[str, list[WildcardValue] | Path]]:
        for folder, folders, files in os.walk(self.folder, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = Path(folder, name)
                within = path.relative_to(self.folder).with_suffix("").as_posix()
                if not path.is_file():
                    continue  # Reading a pipe would wait forever.
                if path.suffix == ".txt":
                    yield within, path
                elif path.suffix in (".json", ".yaml"):
                    yield from self._structured(path, within)

    def _structured(self, path: Path, within: str) -> Iterator[tuple[str, list[WildcardValue]]]:
        """Yield the lists of values in a JSON or YAML file. A list in an object has the name of its keys."""
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else _yaml(text)
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{path}: {error}")
            return
        if isinstance(content, dict):
            parent = within.rpartition("/")[0]
            yield from self._keys(path, cast("dict[Any, Any]", content), f"{parent}/" if parent else "")
        elif isinstance(content, list):
            texts = [WildcardValue(entry) for entry in cast("list[Any]", content) if isinstance(entry, str)]
            if texts:
                yield within, texts

    def _keys(self, path: Path, content: dict[Any, Any], prefix: str) -> Iterator[tuple[str, list[WildcardValue]]]:
        for key, value in content.items():
            if not isinstance(key, str) or not value:
                continue
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                yield from self._keys(path, cast("dict[Any, Any]", value), f"{name}/")
            elif isinstance(value, str | list):
                entries = [value] if isinstance(value, str) else cast("list[Any]", value)
                try:
                    yield name.strip("/"), [one for entry in entries if entry for one in self._entry(path, entry)]
                except (TypeError, ValueError) as error:
                    self.problems.append(f"{path}: {name}: {error}")
            else:
                self.problems.append(f"{path}: {name} is neither a text nor a list")

    def _entry(self, path: Path, entry: Any) -> Iterator[WildcardValue]:
        """Yield the value of a list's entry: a text, ``WEIGHT::TEXT``, or an object with ``text`` and ``weight``."""
        if isinstance(entry, str):
            weight, sign, text = entry.rpartition("::")
            if sign and entry[0].isdigit() and (number := _number(weight)) is not None:
                yield WildcardValue(text, number)
            else:
                yield WildcardValue(entry)
            return
        if isinstance(entry, dict):
            entry = cast("dict[Any, Any]", entry)
            text, weight = entry.get("text") or entry.get("content"), float(entry.get("weight", 1))
            if isinstance(text, str) and math.isfinite(weight):
                yield WildcardValue(text, None if weight == 1 else weight)
                return
        self.problems.append(
            f"{path}: {str(entry)[:40]!r} is no value: write a text, or an object with text and weight"
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _yaml(text: str) -> Any:
    import yaml  # takes 10 ms, and most prompts need no YAML

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
