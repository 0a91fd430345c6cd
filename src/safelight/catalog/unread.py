"""Files that were imported and whose weights have not been read: what their headers say, and their names.

``ROOT/unread.json`` lists them. A file leaves the list when it is used for the first time: then it is read, hashed and
recorded as if it had been added.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from safelight.catalog.cards import Card
from safelight.errors import CorruptFileError, UnreadableFileError
from safelight.files.disk import write_whole
from safelight.names import canonical
from safelight.weights.adapter_file import is_adapter

FILE = "unread.json"


@dataclass(frozen=True, slots=True)
class UnreadFile:
    """A file whose header is known.

    ``name``: in the library.
    ``kind``: such as ``checkpoint``, ``vae`` or ``lora``.
    ``base``: "" if it is unknown. ``variant``: "" if neither the file nor the user says it.
    ``variant_from_user``: the user said the variant.
    ``nbytes``: bytes of its tensors. ``resolution``: pixels per side, 0 for what is no checkpoint.
    ``size``, ``mtime_ns``: of the file, to notice changes.
    ``trigger_words``: those of a LoRA.
    """

    name: str
    path: str
    kind: str
    base: str
    variant: str
    prediction_type: str
    dtype: str
    format: str
    rule: str
    nbytes: int
    resolution: int
    size: int
    mtime_ns: int
    variant_from_user: bool = False
    trigger_words: tuple[str, ...] = ()

    @property
    def is_model(self) -> bool:
        return not is_adapter(self.kind)

    def summary(self) -> dict[str, Any]:
        """Return the values that ``--json`` prints, as for a model or adapter that was read. The digest is empty."""
        common = {
            "name": self.name,
            "kind": self.kind,
            "base": self.base,
            "dtype": self.dtype,
            "digest": "",
            "path": self.path,
            "origin": "imported",
            "rule": self.rule,
            "format": self.format,
            "bytes": self.nbytes,
        }
        if not self.is_model:
            return common | {"trigger_words": list(self.trigger_words)}
        training = {"variant": self.variant, "prediction_type": self.prediction_type}
        return common | training | {"resolution": self.resolution, "sources": {}}


_LIST = TypeAdapter(list[UnreadFile])


class UnreadFiles:
    """The list below ``root``. Who changes it holds the library's lock."""

    def __init__(self, root: Path) -> None:
        self.path = root / FILE
        self._stamp: tuple[int, int, int] | None = None
        self._files: tuple[UnreadFile, ...] = ()
        self._cards: tuple[tuple[bool, Card], ...] = ()

    def all(self) -> tuple[UnreadFile, ...]:
        """Return the list. It is read again when the file changed. Raises CorruptFileError, UnreadableFileError."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            self._stamp, self._files, self._cards = None, (), ()
            return ()
        except OSError as error:
            raise UnreadableFileError(self.path, f"cannot be read ({error.strerror})") from error
        stamp = status.st_ino, status.st_mtime_ns, status.st_size
        if stamp != self._stamp:
            try:
                self._files = tuple(_LIST.validate_json(self.path.read_bytes()))
            except (OSError, ValueError) as error:
                problem = "is damaged; remove it, and import the folders again"
                raise CorruptFileError(self.path, problem) from error
            self._cards = tuple((one.is_model, self._card(one)) for one in self._files)
            self._stamp = stamp
        return self._files

    def _card(self, one: UnreadFile) -> Card:
        return Card(one.name, self.path, one.summary(), ((one.path, one.size, one.mtime_ns),))

    def cards(self, models: bool, besides: Iterable[Card]) -> list[Card]:
        """Return the cards of the models or of the adapters, without those whose name or path another card has."""
        if not self.all():
            return []
        known = list(besides)
        names, paths = {card.name for card in known}, {str(card.summary["path"]) for card in known}
        return [
            card
            for is_model, card in self._cards
            if is_model is models and card.name not in names and card.summary["path"] not in paths
        ]

    def find(self, name: str, models: bool) -> UnreadFile | None:
        """Return the model or adapter of a name, None if there is none."""
        wanted = canonical(name)
        return next((one for one in self.all() if one.is_model is models and one.name == wanted), None)

    def add(self, files: Sequence[UnreadFile]) -> None:
        """Add files. A file that is listed already gets its new name and values."""
        paths = {one.path for one in files}
        self._write([*(one for one in self.all() if one.path not in paths), *files])

    def forget(self, path: Path) -> bool:
        """Take a file from the list, because it was read. Returns whether it was there."""
        left = [one for one in self.all() if one.path != str(path)]
        found = len(left) < len(self.all())
        if found:
            self._write(left)
        return found

    def rename(self, found: UnreadFile, name: str) -> None:
        self._write([replace(one, name=name) if one.path == found.path else one for one in self.all()])

    def _write(self, files: Sequence[UnreadFile]) -> None:
        ordered = sorted(files, key=lambda one: (one.name.casefold(), one.path))
        write_whole(self.path, _LIST.dump_json(ordered, indent=1))
