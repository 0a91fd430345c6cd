"""The user's models and the starters. A library is only a folder of records.

``ROOT/models/NAME.json``: the record of a model.
``ROOT/models/earlier/NAME/``: the records that had this name before.
``ROOT/converted/``: converted pickles.
``ROOT/seen/``: the records of files that were used by their path.
``ROOT/quarantine/``: why a model is not used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safelight import names
from safelight.catalog import paths, records, starters
from safelight.catalog.describe import CONVERTED, GONE, OnBytes, describe, layout_of, read_again, refuse_other_content
from safelight.catalog.identify import PredictionType
from safelight.catalog.index import Card, Index
from safelight.catalog.lock import alone
from safelight.catalog.model import Model
from safelight.errors import (
    CorruptFileError,
    FileError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    UnreadableFileError,
)
from safelight.files.disk import write_whole
from safelight.files.folder import read_json
from safelight.weights.digest import named
from safelight.weights.manifest import FileHint, measure

_YOUNG_SECONDS = 86_400
"""Seconds: one day. No conversion takes so long."""


class Library:
    """The models under ``root``, which need not exist, and the starters if they are installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records = root / "models"
        self._conversions = root / "converted"
        self._index = Index(self._records, records.read, root / "index.db")

    def cards(self) -> list[Card]:
        """Return the cards of all models by name, the user's own before the starters.

        Skips damaged records; :meth:`damaged` returns these.
        """
        own = [card for card in self._index.cards().values() if not card.problem]
        taken = {card.name for card in own}
        return [*own, *(card for card in starters.cards() if card.name not in taken)]

    def models(self) -> list[Model]:
        """Return all models of :meth:`cards` with their tensors. Reads each record."""
        own = [self._index.whole(card) for card in self._index.cards().values() if not card.problem]
        taken = {model.name for model in own}
        return [*own, *(model for model in starters.models() if model.name not in taken)]

    def damaged(self) -> list[FileError]:
        """Return an error for each damaged record. Adding the model again replaces its record."""
        found = self._index.cards().values()
        return [CorruptFileError(card.record, card.problem) for card in found if card.problem]

    def named(self, name: str) -> Model | None:
        """Return the user's own model of a name, None if there is none or its record is damaged."""
        try:
            return self._index.get(name)
        except FileError:
            return None

    def find_named(self, name: str) -> Model | None:
        """Return the user's own model or the starter of a name, None if there is none or its record is damaged."""
        return self.named(name) or next((model for model in starters.models() if model.name == name), None)

    def get(self, name: str) -> Model:
        """Return the model of a name, or of its file's name.

        Raises ModelNotFoundError, which lists the nearest names.
        """
        found = self._index.get(name) or next((model for model in starters.models() if model.name == name), None)
        if found is None:
            cards = self.cards()
            found = self._of_file(name, cards)
            if found is None:
                raise ModelNotFoundError(name, paths.near(name, (card.name for card in cards)))
        return found

    def _of_file(self, name: str, cards: list[Card]) -> Model | None:
        """Return the only model whose file has this name. Prompts of other programs contain file names."""
        fitting = [card for card in cards if card.stem == names.canonical(name)]
        return (
            self._index.whole(fitting[0]) if len(fitting) == 1 and fitting[0].record.parent == self._records else None
        )

    def resolve(self, name_or_path: str, on_bytes: OnBytes | None = None) -> Model:
        """Return a model by its name in the library, or by its path.

        A file used by its path is read and hashed in whole at its first use. Its record is then stored.
        Raises ModelNotFoundError for an unknown name, UnreadableFileError for a path that does not exist.
        Raises InputError for the name of a folder in the current directory.
        """
        path = paths.user_path(name_or_path)
        is_path = paths.is_path(name_or_path)
        if not is_path or not os.path.lexists(path):
            try:
                return self.get(name_or_path)
            except ModelNotFoundError:
                if is_path:
                    raise UnreadableFileError(path, f"does not exist{paths.beside(path)}") from None
                if path.is_dir():
                    hint = "for the folder of that name write ./NAME, for a file in it ./NAME/FILE"
                    raise InputError(f"no model named {name_or_path!r}; {hint}") from None
                raise
        path = path.absolute()
        seen = self.root / "seen" / f"{named(str(path))}.json"
        known = self._seen(seen)
        if known is not None and not known.manifest.changed():
            return known
        model = describe(self._conversions, path, paths.stem(path), "path", None, on_bytes)
        with alone(self.root):
            records.write(seen, model)
            self._sweep()
        return model

    @staticmethod
    def _seen(path: Path) -> Model | None:
        """Read a record. Return None if it is missing or damaged."""
        try:
            return records.read(path)
        except FileError:
            return None

    def used(self) -> Iterator[Model]:
        """Yield the models that were used by their path and whose files are unchanged."""
        for path in sorted((self.root / "seen").glob("*.json")):
            model = self._seen(path)
            if model is not None and not model.manifest.changed():
                yield model

    def find(self, digest: str, prediction_type: str, name: str = "") -> Model | None:
        """Return a model by its content (``digest``) and prediction type, None if there is none.

        Models with unchanged files come first; among those, the one called ``name``. Models that were used by their
        path count too.
        """
        wanted = digest, prediction_type
        cards = [card for card in self.cards() if (card.digest, card.summary["prediction_type"]) == wanted]
        own = [self.find_named(card.name) for card in cards]
        seen = (self._seen(path) for path in sorted((self.root / "seen").glob("*.json")))
        fitting = [m for m in (*own, *seen) if m is not None and (m.digest, m.prediction_type) == wanted]
        return min(fitting, key=lambda m: (bool(m.manifest.changed()), m.name != name), default=None)

    def add(
        self,
        path: Path,
        name: str | None = None,
        prediction_type: PredictionType | None = None,
        on_bytes: OnBytes | None = None,
    ) -> Model:
        """Identify a checkpoint, read and hash all of it, and store its record. The file stays where it is.

        Raises InputError when another file has the name, or when the name is not allowed.
        Raises FileError for a bad file.
        An error changes nothing.
        """
        path = paths.user_path(str(path)).absolute()
        chosen = paths.chosen(name, path)
        self._refuse_taken(chosen, path)
        model = describe(self._conversions, path, chosen, "added", prediction_type, on_bytes)
        with alone(self.root):
            self._refuse_taken(chosen, path)
            self._replace(chosen, model)
        return model

    def _replace(self, name: str, model: Model) -> None:
        """Write a record. Stores the name's previous record for :meth:`roll_back` if its content differs."""
        before = self.named(name)
        if before is not None and before.digest != model.digest:
            records.write(self._earlier(name) / f"{time.time():.3f}.json", before)
        self._write(name, model)
        self._quarantine(model).unlink(missing_ok=True)

    def _write(self, name: str, model: Model) -> None:
        records.write(self._record(name), model)
        self._index.changed()

    def _record(self, name: str) -> Path:
        """Return the path of a model's record, which need not exist."""
        card = self._index.cards().get(names.canonical(name))
        return card.record if card is not None else self._records / f"{names.file_stem(name)}.json"

    def _earlier(self, name: str) -> Path:
        return self._records / "earlier" / names.file_stem(name)

    def earlier(self, name: str) -> list[Model]:
        """Return the models that had this name before, the newest first."""
        return self._records_in(self._earlier(name))

    def _records_in(self, folder: Path) -> list[Model]:
        found = (self._seen(path) for path in sorted(folder.glob("*.json"), reverse=True))
        return [model for model in found if model is not None]

    def rename(self, name: str, new: str) -> Model:
        """Rename a model, with the earlier models of its name.

        Raises InputError when the new name is taken or not allowed, and for a starter.
        Raises ModelNotFoundError for an unknown name.
        """
        with alone(self.root):
            model = self._index.get(name)
            if model is None:
                self._refuse_starter(name, "renamed")
            assert model is not None
            chosen = paths.chosen(new, model.path)
            if chosen == model.name:
                return model
            others = (card for card in self.cards() if card.name != model.name)
            self._refuse_taken_among(others, chosen, None)
            record, earlier, quarantine = self._record(name), self._earlier(name), self._quarantine(model)
            renamed = replace(model, name=chosen)
            target = self._records / f"{names.file_stem(chosen)}.json"
            records.write(target, renamed)
            for before, after in ((earlier, self._earlier(chosen)), (quarantine, self._quarantine(renamed))):
                if before.exists():
                    after.parent.mkdir(parents=True, exist_ok=True)
                    before.rename(after)
            if not (target.exists() and record.exists() and target.samefile(record)):
                record.unlink(missing_ok=True)
            self._index.changed()
            return renamed

    def roll_back(self, name: str, digest: str = "", on_bytes: OnBytes | None = None) -> Model:
        """Restore an earlier model of a name: the newest, or the one whose digest begins with ``digest``.

        The earlier bytes must still exist: under their path, in their conversion, or in a file of the same size in the
        same folder. All bytes are read and hashed.
        Raises InputError when there is no earlier model, or when its bytes do not exist any more.
        """
        current = self.get(name)
        earlier = [model for model in self.earlier(name) if model.digest.startswith(digest)]
        if not earlier:
            which = f" whose digest begins with {digest}" if digest else ""
            raise InputError(
                f"{name} has no earlier content{which}; only content that `safelight models add` replaced is stored"
            )
        wanted = earlier[0]
        found = next((m for m in self._candidates(wanted, on_bytes) if m.digest == wanted.digest), None)
        if found is None:
            raise InputError(
                f"{wanted.path}: the file with the earlier content {wanted.digest[:10]} is gone, and no file of its "
                f"size in {wanted.path.parent} has that content; put it back, then try again"
            )
        with alone(self.root):
            self._replace(name, replace(found, name=name, origin=current.origin))
        return self.get(name)

    def _candidates(self, wanted: Model, on_bytes: OnBytes | None) -> Iterator[Model]:
        """Yield models that may have the content of ``wanted``: from the model's own files, then from files of the same
        size. Reads all their bytes."""
        user_type: Any = wanted.prediction_type if wanted.told else None
        beside: list[Path] = []
        if wanted.path.parent.is_dir() and wanted.format not in CONVERTED:
            size = sum(hint.size for hint in wanted.manifest.files if hint.path == wanted.path)
            files = (path for path in sorted(wanted.path.parent.iterdir()) if path.is_file() and path != wanted.path)
            beside = [path for path in files if path.stat().st_size == size]
        if wanted.format in CONVERTED and wanted.manifest.files[0].holds():
            read = measure(layout_of(wanted.manifest.files[0].path).components)
            yield replace(wanted, manifest=replace(read, files=read.files))
        for path in (wanted.path, *beside):
            with contextlib.suppress(InputError):
                yield describe(self._conversions, path, wanted.name, "added", user_type, on_bytes)

    def _refuse_taken(self, name: str, path: Path) -> None:
        self._refuse_taken_among(self.cards(), name, path)

    @staticmethod
    def _refuse_taken_among(cards: Iterable[Card], name: str, path: Path | None) -> None:
        """Raise InputError if a name is taken. Case does not count: some file systems, and most people, ignore it."""
        taken = next((card for card in cards if card.name.casefold() == name.casefold()), None)
        if taken is not None and (taken.path != path or taken.name != name):
            called = "" if taken.name == name else f" ({taken.name})"
            raise InputError(f"the name {name!r} is taken by {taken.path}{called}; choose another with --name")

    def _refuse_starter(self, name: str, done: str) -> None:
        """Raise for a name that is not one of the user's own models: InputError for a starter or a file's name, else
        ModelNotFoundError."""
        model = self.get(name)
        if model.origin == "starter":
            raise InputError(f"{model.name!r} is a starter and part of the installation, so it cannot be {done}")
        raise InputError(f"{name!r} is the file of the model {model.name!r}; use that name")

    def remove(self, name: str) -> None:
        """Remove a model's record, even a damaged one, and its conversion. The model's own file stays.

        Raises InputError for a starter, ModelNotFoundError for an unknown name.
        """
        with alone(self.root):
            card = self._index.cards().get(names.canonical(name))
            if card is None:
                self._refuse_starter(name, "removed")
            assert card is not None
            card.record.unlink(missing_ok=True)
            self._index.changed()
            self._sweep(card.digest)

    def _sweep(self, removed: str = "") -> None:
        """Delete the records of paths that are gone or changed, and conversions that no record needs.

        ``removed``: the digest of a model that was removed; its conversion is deleted at once. Any other conversion
        younger than a day stays, because another process may be about to write its record.
        """
        needed = {card.digest for card in self._index.cards().values() if not card.problem}
        earlier = (self._records / "earlier").glob("*")
        needed |= {model.digest for folder in earlier for model in self._records_in(folder)}
        for path in (self.root / "seen").glob("*.json"):
            model = self._seen(path)
            if model is None or model.manifest.changed():
                path.unlink(missing_ok=True)
            else:
                needed.add(model.digest)
        for home in self._conversions.glob("*"):
            old = time.time() - home.stat().st_mtime > _YOUNG_SECONDS
            if home.name not in needed and (old or home.name == removed):
                shutil.rmtree(home, ignore_errors=True)

    def verify(self, name: str, on_bytes: OnBytes | None = None) -> Model:
        """Read and hash all of a model again. Ends the model's quarantine if its content is right.

        Raises IntegrityError, with the first tensor that differs.
        """
        model = self._checked(self.get(name), on_bytes)
        self._quarantine(model).unlink(missing_ok=True)
        return model

    def mended(self, model: Model) -> Model:
        """Read and hash all of a model again after some of its bytes were wrong. Repeats the conversion of a pickle.

        Raises IntegrityError when the content differs from the one that was added. The model then is in quarantine
        until :meth:`verify` or :meth:`add` ends it.
        """
        self._refuse_quarantined(model)
        try:
            if model.format in CONVERTED and all(source.holds() for source in model.manifest.files[1:]):
                user_type: Any = model.prediction_type if model.told else None
                fresh = describe(self._conversions, model.path, model.name, model.origin, user_type, None)
                refuse_other_content(model, fresh.manifest)
                return fresh
            return self._checked(model, None)
        except IntegrityError as error:
            files = self._files(model)
            if all(file["there"] for file in files):
                values = {"digest": model.digest, "files": files, "reason": str(error), "since": time.time()}
                write_whole(self._quarantine(model), records.encoded(values))
            raise

    def quarantined(self, model: Model) -> str | None:
        """Return why a model is in quarantine; None if it is not, or if its files changed since."""
        path = self._quarantine(model)
        try:
            values = read_json(path) if path.exists() else {}
        except FileError:
            return None
        if (values.get("digest"), values.get("files")) != (model.digest, self._files(model)):
            return None
        return str(values.get("reason"))

    @staticmethod
    def _files(model: Model) -> list[dict[str, Any]]:
        """Return the present sizes and times of a model's files."""
        found: list[dict[str, Any]] = []
        for hint in model.manifest.files:
            there = hint.path.is_file()
            look = asdict(FileHint.of(hint.path)) if there else {}
            found.append({**look, "path": str(hint.path), "there": there})
        return found

    def _refuse_quarantined(self, model: Model) -> None:
        reason = self.quarantined(model)
        if reason is not None:
            remedy = f"Put the right file back and run `safelight models verify {model.name}` to end the quarantine."
            raise IntegrityError(model.path, "", f"is in quarantine: {reason}", remedy)

    def _quarantine(self, model: Model) -> Path:
        name = named(str(model.path)) if model.origin == "path" else names.file_stem(model.name)
        return self.root / "quarantine" / f"{name}.json"

    def checked(self, model: Model) -> Model:
        """Return the model if its content is unchanged. Reads the files again only if their times or sizes changed.

        Stores the new times and sizes if the content is the same.
        Raises IntegrityError when the content changed, a file is gone, or the model is in quarantine.
        """
        self._refuse_quarantined(model)
        changed = model.manifest.changed()
        if not changed:
            return model
        gone = next((path for path in changed if not path.exists()), None)
        if gone is not None:
            raise IntegrityError(gone, "", f"the file of the model {model.name} is gone", GONE)
        return self._checked(model, None)

    def _checked(self, model: Model, on_bytes: OnBytes | None) -> Model:
        fresh = read_again(self._conversions, model, on_bytes)
        refuse_other_content(model, fresh.manifest)
        for field in ("base", "prediction_type", "zero_terminal_snr"):
            before, now = getattr(model, field), getattr(fresh, field)
            if before != now:
                raise IntegrityError(model.path, "", f"its {field} was {before}, its files now say {now}")
        if model.origin == "added" and fresh.manifest != model.manifest:
            self._refresh(model, fresh)
        return fresh

    def _refresh(self, model: Model, fresh: Model) -> None:
        """Store the new manifest of a model, unless its record was removed or replaced while its files were read."""
        with alone(self.root):
            current = self.named(model.name)
            if current is not None and current.manifest == model.manifest:
                self._write(model.name, fresh)
