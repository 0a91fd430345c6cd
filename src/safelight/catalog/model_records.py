"""The records of a user's models on disk.

``ROOT/models/NAME.json``: the record of a model.
``ROOT/models/earlier/NAME/``: the records that had this name before.
``ROOT/converted/``: converted pickles.
``ROOT/seen/``: the records of files that were used by their path.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from safelight import names
from safelight.catalog import records
from safelight.catalog.cards import Card
from safelight.catalog.index import Index
from safelight.catalog.index_file import IndexFile
from safelight.catalog.model import Model
from safelight.errors import FileError
from safelight.weights.digest import hash_texts

_YOUNG_SECONDS = 86_400
"""Seconds: one day. No conversion takes so long."""


class ModelRecords:
    """The records of models under ``root``, the library's root. Callers hold the library's lock while they write."""

    def __init__(self, root: Path) -> None:
        file = IndexFile(root / "index.db")
        self.folder = root / "models"
        self.conversions = root / "converted"
        self._used_by_path_folder = root / "seen"
        self._index = Index(self.folder, records.read, file)
        self._used_by_path = Index(self._used_by_path_folder, records.read, file)

    def cards(self) -> list[Card]:
        """Return the cards of all records in the order of their names; those of damaged records too."""
        return list(self._index.cards().values())

    def card(self, name: str) -> Card | None:
        """Return the card of a name, also of a damaged record; None if there is none."""
        return self._index.cards().get(names.canonical(name))

    def get(self, name: str) -> Model | None:
        """Return the model of a name, None if there is none. Raises CorruptFileError when its record is damaged."""
        return self._index.get(name)

    def get_if_readable(self, name: str) -> Model | None:
        """Return the model of a name, None if there is none or its record is damaged."""
        try:
            return self._index.get(name)
        except FileError:
            return None

    def read(self, card: Card) -> Model:
        """Return the model of a card. Raises CorruptFileError, UnreadableFileError."""
        return self._index.read_record(card)

    def write(self, model: Model) -> None:
        """Write the record of a model under its name."""
        records.write(self._path(model.name), model)
        self._index.invalidate()

    def replace(self, model: Model) -> None:
        """Write the record of a model. A record of the same name with other content moves to the earlier ones."""
        before = self.get_if_readable(model.name)
        if before is not None and before.digest != model.digest:
            records.write(self._earlier(model.name) / f"{time.time():.3f}.json", before)
        self.write(model)

    def rename(self, model: Model, new: str) -> Model:
        """Rename a record, with the earlier ones of its name. Returns the renamed model."""
        record, earlier = self._path(model.name), self._earlier(model.name)
        renamed = replace(model, name=new)
        target = self.folder / f"{names.file_stem(new)}.json"
        # Before the record: without its earlier ones, it would be of the new name all the same.
        if earlier.exists() and not (self._earlier(new).exists() and earlier.samefile(self._earlier(new))):
            # What a removed model of this name has left.
            shutil.rmtree(self._earlier(new), ignore_errors=True)
            earlier.rename(self._earlier(new))
        records.write(target, renamed)
        if not (target.exists() and record.exists() and target.samefile(record)):
            record.unlink(missing_ok=True)
        self._index.invalidate()
        return renamed

    def remove(self, card: Card) -> None:
        """Delete a record, and what only it needed."""
        card.record_path.unlink(missing_ok=True)
        # Otherwise a later model of this name could be rolled back to this one's content.
        shutil.rmtree(self._earlier(card.name), ignore_errors=True)
        self._index.invalidate()
        self._sweep(_homes(path for path, *_ in card.files))

    def earlier(self, name: str) -> list[Model]:
        """Return the models that had a name before, the newest first."""
        return _records_in(self._earlier(name))

    def find_used_by_path(self, path: Path) -> Model | None:
        """Return the model of a file that was used by its path, if the file is unchanged; else None."""
        model = _read(self._used_by_path_record(path))
        return None if model is None or model.manifest.changed_files() else model

    def write_used_by_path(self, model: Model) -> None:
        """Write the record of a file that is used by its path."""
        records.write(self._used_by_path_record(model.path), model)
        self._used_by_path.invalidate()
        self._sweep()

    def cards_used_by_path(self) -> list[Card]:
        """Return the cards of the files that were used by their path."""
        return [card for card in self._used_by_path.all() if not card.problem]

    def used_by_path(self, digest: str = "") -> Iterator[Model]:
        """Yield the models that were used by their path and whose files are unchanged.

        ``digest``: only models of this content; "" for all.
        """
        for card in self.cards_used_by_path():
            if digest in ("", card.digest) and card.state() == "there":
                model = _read(card.record_path)
                if model is not None:
                    yield model

    def _path(self, name: str) -> Path:
        """Return the path of a record, which need not exist."""
        card = self.card(name)
        return card.record_path if card is not None else self.folder / f"{names.file_stem(name)}.json"

    def _earlier(self, name: str) -> Path:
        return self.folder / "earlier" / names.file_stem(name)

    def _used_by_path_record(self, path: Path) -> Path:
        return self._used_by_path_folder / f"{hash_texts(str(path))}.json"

    def used_files(self) -> set[str]:
        """Return the paths of all files that a record names: those of models, of their parts, and conversions."""
        used = {path for card in (*self.cards(), *self._used_by_path.all()) for path, *_ in card.files}
        earlier = (self.folder / "earlier").glob("*")
        models = (model for folder in earlier for model in _records_in(folder))
        return used | {str(stamp.path) for model in models for stamp in model.manifest.files}

    def _sweep(self, removed: Collection[str] = ()) -> None:
        """Delete the records of paths that are gone or changed, and conversions that no record needs.

        ``removed``: the folders of files of a model that was removed; those of conversions are deleted at once. Any
        other conversion younger than a day stays, because another process may be about to write its record.
        """
        for card in self._used_by_path.all():
            if card.problem or card.state() != "there":
                card.record_path.unlink(missing_ok=True)
        self._used_by_path.invalidate()
        # A conversion may be a part of another model, whose digest is another one.
        needed = _homes(self.used_files())
        for home in self.conversions.glob("*"):
            old = time.time() - home.stat().st_mtime > _YOUNG_SECONDS
            if home.name not in needed and (old or home.name in removed):
                shutil.rmtree(home, ignore_errors=True)


def _homes(files: Iterable[str]) -> set[str]:
    """Return the names of the folders of files. That of a conversion is its digest."""
    return {Path(file).parent.name for file in files}


def _read(path: Path) -> Model | None:
    """Read a record. Return None if it is missing or damaged."""
    try:
        return records.read(path)
    except FileError:
        return None


def _records_in(folder: Path) -> list[Model]:
    found = (_read(path) for path in sorted(folder.glob("*.json"), reverse=True))
    return [model for model in found if model is not None]
