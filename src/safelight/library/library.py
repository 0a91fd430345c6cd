"""The models that a user has, and the starters: a folder of records, no more.

``ROOT/models/NAME.json`` is a model's record, ``ROOT/converted/`` holds what pickles were converted to, and
``ROOT/seen/`` the manifests of files that were used by their path.
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
from safelight.errors import (
    CorruptFileError,
    FileError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    UnreadableFileError,
)
from safelight.files import write_whole
from safelight.formats.folder import read_json
from safelight.formats.identify import PredictionType
from safelight.library import paths, records, starters
from safelight.library.describe import CONVERTED, GONE, OnBytes, describe, layout_of, read_again, refuse_other_content
from safelight.library.index import Card, Index
from safelight.library.lock import alone
from safelight.library.model import Model
from safelight.weights.digest import named
from safelight.weights.manifest import FileHint, measure

_YOUNG_SECONDS = 86_400
"""A day: no conversion takes as long."""


class Library:
    """The models under ``root``, which need not exist yet, and the starters where they are installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records = root / "models"
        self._conversions = root / "converted"
        self._index = Index(self._records, records.read, root / "index.db")

    def cards(self) -> list[Card]:
        """All models by name, the user's own before the starters, without their tensors. Damaged records are left out:
        :meth:`damaged`."""
        own = [card for card in self._index.cards().values() if not card.problem]
        taken = {card.name for card in own}
        return [*own, *(card for card in starters.cards() if card.name not in taken)]

    def models(self) -> list[Model]:
        """The same, whole: each record is read."""
        own = [self._index.whole(card) for card in self._index.cards().values() if not card.problem]
        taken = {model.name for model in own}
        return [*own, *(model for model in starters.models() if model.name not in taken)]

    def damaged(self) -> list[FileError]:
        """What is wrong with records that cannot be read; adding the model again writes a new one."""
        found = self._index.cards().values()
        return [CorruptFileError(card.record, card.problem) for card in found if card.problem]

    def named(self, name: str) -> Model | None:
        """The user's own model of that name, None when there is none, or its record is damaged."""
        try:
            return self._index.get(name)
        except FileError:
            return None

    def find_named(self, name: str) -> Model | None:
        """The model of that name, None when there is none that can be used."""
        return self.named(name) or next((model for model in starters.models() if model.name == name), None)

    def get(self, name: str) -> Model:
        """The model of that name, or of that file's name. Raises ModelNotFoundError, which names the nearest."""
        found = self._index.get(name) or next((model for model in starters.models() if model.name == name), None)
        if found is None:
            cards = self.cards()
            found = self._of_file(name, cards)
            if found is None:
                raise ModelNotFoundError(name, paths.near(name, (card.name for card in cards)))
        return found

    def _of_file(self, name: str, cards: list[Card]) -> Model | None:
        """The one model whose file is called so: prompts of other programs name files."""
        fitting = [card for card in cards if card.stem == names.canonical(name)]
        return (
            self._index.whole(fitting[0]) if len(fitting) == 1 and fitting[0].record.parent == self._records else None
        )

    def resolve(self, name_or_path: str, on_bytes: OnBytes | None = None) -> Model:
        """A model by its name in the library, else by a path.

        A file used by its path is read and hashed in whole the first time; its manifest is kept.
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
                    hint = "there is a folder of that name; ./ before it makes it a path, -m ./NAME/FILE a file in it"
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
        """The record there, None when there is none that can be read."""
        try:
            return records.read(path)
        except FileError:
            return None

    def used(self) -> Iterator[Model]:
        """Those that were used by their path, and whose files are as they were."""
        for path in sorted((self.root / "seen").glob("*.json")):
            model = self._seen(path)
            if model is not None and not model.manifest.changed():
                yield model

    def find(self, digest: str, prediction_type: str, name: str = "") -> Model | None:
        """The model of that content and prediction type: the one called ``name`` if there is one, then those whose
        files are as they were; also one that was used by its path."""
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
        """Identify a checkpoint, read and hash all of it, and keep its record. The file stays where it is.

        Raises InputError when the name is taken by another file or not allowed, FileError for a bad file; nothing is
        changed then.
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
        """Write a record; one of other content that had the name is kept for :meth:`roll_back`."""
        before = self.named(name)
        if before is not None and before.digest != model.digest:
            records.write(self._earlier(name) / f"{time.time():.3f}.json", before)
        self._write(name, model)
        self._quarantine(model).unlink(missing_ok=True)

    def _write(self, name: str, model: Model) -> None:
        records.write(self._record(name), model)
        self._index.changed()

    def _record(self, name: str) -> Path:
        """The file of that model's record, whether it is there or not."""
        card = self._index.cards().get(names.canonical(name))
        return card.record if card is not None else self._records / f"{names.file_stem(name)}.json"

    def _earlier(self, name: str) -> Path:
        return self._records / "earlier" / names.file_stem(name)

    def earlier(self, name: str) -> list[Model]:
        """What had the name before, the newest first."""
        return self._kept_in(self._earlier(name))

    def _kept_in(self, folder: Path) -> list[Model]:
        found = (self._seen(path) for path in sorted(folder.glob("*.json"), reverse=True))
        return [model for model in found if model is not None]

    def rename(self, name: str, new: str) -> Model:
        """Give a model another name; what had its old name before comes along. Raises InputError when the new name is
        taken or not allowed, ModelNotFoundError, and InputError for a starter."""
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
        """Give a name back to what it named before: the newest earlier content, or the one whose digest begins so.

        Its bytes must still be there: under the path that it had, in the conversion that was made of it, or in a file
        of the same folder and size. All of it is read and hashed. Raises InputError when there is none.
        """
        current = self.get(name)
        earlier = [model for model in self.earlier(name) if model.digest.startswith(digest)]
        if not earlier:
            what = f"no earlier content of {name}" + (f" begins with {digest}" if digest else "")
            raise InputError(f"{what} is known; `safelight models add` keeps what it replaces")
        wanted = earlier[0]
        found = next((m for m in self._candidates(wanted, on_bytes) if m.digest == wanted.digest), None)
        if found is None:
            raise InputError(
                f"{wanted.path}: the file with the earlier content {wanted.digest[:10]} is not there any more, nor is "
                f"another of its size in {wanted.path.parent}; put it back, then try again"
            )
        with alone(self.root):
            self._replace(name, replace(found, name=name, origin=current.origin))
        return self.get(name)

    def _candidates(self, wanted: Model, on_bytes: OnBytes | None) -> Iterator[Model]:
        """What may hold a model's bytes, read in whole: its own files, then files that look like it."""
        told: Any = wanted.prediction_type if wanted.told else None
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
                yield describe(self._conversions, path, wanted.name, "added", told, on_bytes)

    def _refuse_taken(self, name: str, path: Path) -> None:
        self._refuse_taken_among(self.cards(), name, path)

    @staticmethod
    def _refuse_taken_among(cards: Iterable[Card], name: str, path: Path | None) -> None:
        """Names that differ in capitals only are the same to some file systems, and to most people."""
        taken = next((card for card in cards if card.name.casefold() == name.casefold()), None)
        if taken is not None and (taken.path != path or taken.name != name):
            called = "" if taken.name == name else f" ({taken.name})"
            raise InputError(f"the name {name!r} is taken by {taken.path}{called}; give another with --name")

    def _refuse_starter(self, name: str, done: str) -> None:
        """Raise for a model that is not the user's own: ModelNotFoundError, or InputError for a starter."""
        model = self.get(name)
        if model.origin == "starter":
            raise InputError(f"{model.name!r} is a starter, part of the installation; it cannot be {done}")
        raise InputError(f"{name!r} is the file of the model {model.name!r}; give that name")

    def remove(self, name: str) -> None:
        """Forget a model, also one whose record is damaged. Its file stays; what Safelight converted from it goes.

        Starters cannot be removed.
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
        """Remove manifests of paths that are gone or changed, and conversions that no record names any more.

        A conversion younger than a day is left, but for that of the model ``removed``: another process may be about to
        write its record.
        """
        kept = {card.digest for card in self._index.cards().values() if not card.problem}
        earlier = (self._records / "earlier").glob("*")
        kept |= {model.digest for folder in earlier for model in self._kept_in(folder)}
        for path in (self.root / "seen").glob("*.json"):
            model = self._seen(path)
            if model is None or model.manifest.changed():
                path.unlink(missing_ok=True)
            else:
                kept.add(model.digest)
        for home in self._conversions.glob("*"):
            old = time.time() - home.stat().st_mtime > _YOUNG_SECONDS
            if home.name not in kept and (old or home.name == removed):
                shutil.rmtree(home, ignore_errors=True)

    def verify(self, name: str, on_bytes: OnBytes | None = None) -> Model:
        """Read and hash all of a model again; what is right again leaves its quarantine. Raises IntegrityError, naming
        the first tensor that differs."""
        model = self._checked(self.get(name), on_bytes)
        self._quarantine(model).unlink(missing_ok=True)
        return model

    def mended(self, model: Model) -> Model:
        """The model, after bytes of it were wrong: read and hashed again in whole, a conversion made anew from its
        source. Raises IntegrityError when its files are not those that were added; it is in quarantine then, which
        :meth:`verify` and :meth:`add` end."""
        self._refuse_quarantined(model)
        try:
            if model.format in CONVERTED and all(source.holds() for source in model.manifest.files[1:]):
                told: Any = model.prediction_type if model.told else None
                fresh = describe(self._conversions, model.path, model.name, model.origin, told, None)
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
        """Why the model is not used, None when it may be: nothing was wrong, or its files were changed since."""
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
        """What a look at a model's files says now."""
        found: list[dict[str, Any]] = []
        for hint in model.manifest.files:
            there = hint.path.is_file()
            look = asdict(FileHint.of(hint.path)) if there else {}
            found.append({**look, "path": str(hint.path), "there": there})
        return found

    def _refuse_quarantined(self, model: Model) -> None:
        reason = self.quarantined(model)
        if reason is not None:
            remedy = f"`safelight models verify {model.name}` ends its quarantine when its file is right again."
            raise IntegrityError(model.path, "", f"is in quarantine: {reason}", remedy)

    def _quarantine(self, model: Model) -> Path:
        name = named(str(model.path)) if model.origin == "path" else names.file_stem(model.name)
        return self.root / "quarantine" / f"{name}.json"

    def checked(self, model: Model) -> Model:
        """The model, if its files are as they were; their times and sizes are only the hint to look.

        When the hint differs, all is read again: the same content is accepted and its new hint kept, other content
        raises IntegrityError.
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
        """Write what was seen of a model's files, unless it was removed or replaced while they were read."""
        with alone(self.root):
            current = self.named(model.name)
            if current is not None and current.manifest == model.manifest:
                self._write(model.name, fresh)
