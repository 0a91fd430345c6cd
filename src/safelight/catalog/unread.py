"""Files that were imported and whose weights have not been read: what their headers say, and their names.

``ROOT/unread.json`` lists them. A file leaves the list when it is used for the first time: then it is read, hashed and
recorded as if it had been added.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safelight.catalog.cards import Card
from safelight.errors import CorruptFileError, UnreadableFileError
from safelight.files.disk import write_whole
from safelight.names import canonical
from safelight.request.model_defaults import ModelDefaults
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
    ``defaults``: those of a model, see :class:`safelight.catalog.model.Model`.
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
    defaults: ModelDefaults = field(default_factory=dict[str, Any])

    @property
    def is_model(self) -> bool:
        return not is_adapter(self.kind)

    @property
    def given_variant(self) -> str:
        """The variant that the user said, "" for the file's own."""
        return self.variant if self.variant_from_user else ""

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
        return common | training | {"resolution": self.resolution, "sources": {}, "defaults": dict(self.defaults)}


def _read(values: Any) -> UnreadFile:
    """Return an entry of the list. Raises ValueError, TypeError or KeyError for one that is none."""
    # Earlier versions wrote no defaults.
    found: dict[str, Any] = {"defaults": {}, **values, "trigger_words": tuple(values["trigger_words"])}
    made = UnreadFile(**found)
    for one in fields(UnreadFile):
        kind = {"int": int, "bool": bool, "str": str, "ModelDefaults": dict}.get(str(one.type), tuple)
        if type(found[one.name]) is not kind:
            raise ValueError(f"{one.name} is {found[one.name]!r}")
    return made


_reading: dict[str, threading.Lock] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def first_reading(path: str) -> Generator[None]:
    """Let one thread at a time read a file for the first time. Others wait, and find its record."""
    with _guard:
        lock = _reading.setdefault(path, threading.Lock())
    with lock:
        yield


def besides(cards: Iterable[Card], known: Iterable[Card]) -> list[Card]:
    """Return the cards whose names and paths no other card has."""
    listed = list(known)
    names, paths = {card.name for card in listed}, {card.summary["path"] for card in listed}
    return [card for card in cards if card.name not in names and card.summary["path"] not in paths]


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
                self._files = tuple(map(_read, json.loads(self.path.read_bytes())))
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                problem = "is damaged; remove it, and import the folders again"
                raise CorruptFileError(self.path, problem) from error
            self._cards = tuple((one.is_model, self._card(one)) for one in self._files)
            self._stamp = stamp
        return self._files

    def _card(self, one: UnreadFile) -> Card:
        return Card(one.name, self.path, one.summary(), ((one.path, one.size, one.mtime_ns),))

    def cards(self, models: bool) -> list[Card]:
        """Return the cards of the models or of the adapters."""
        self.all()
        return [card for is_model, card in self._cards if is_model is models]

    def find(self, name: str, models: bool) -> UnreadFile | None:
        """Return the model or adapter of a name, None if there is none."""
        wanted = canonical(name)
        return next((one for one in self.all() if one.is_model is models and one.name == wanted), None)

    def find_path(self, path: Path) -> UnreadFile | None:
        """Return the entry of a file, None if it is not listed (any more)."""
        return next((one for one in self.all() if one.path == str(path)), None)

    def add(self, files: Sequence[UnreadFile], gone: Iterable[str] = ()) -> None:
        """Add files. A file that is listed already gets its new name and values. ``gone``: paths to forget."""
        paths = {*(one.path for one in files), *gone}
        self._write([*(one for one in self.all() if one.path not in paths), *files])

    def forget(self, path: Path) -> bool:
        """Take a file from the list, because it was read. Returns whether it was there."""
        left = [one for one in self.all() if one.path != str(path)]
        found = len(left) < len(self.all())
        if found:
            self._write(left)
        return found

    def change(self, found: UnreadFile, **values: Any) -> None:
        """Give an entry other values."""
        self._write([replace(one, **values) if one.path == found.path else one for one in self.all()])

    def _write(self, files: Sequence[UnreadFile]) -> None:
        ordered = sorted(files, key=lambda one: (one.name.casefold(), one.path))
        # With escapes for all but ASCII: the path of a file may be no UTF-8.
        lines = ",\n".join(json.dumps(asdict(one)) for one in ordered)
        write_whole(self.path, f"[\n{lines}\n]\n".encode())
