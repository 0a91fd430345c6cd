"""The user's models, and the starters. A library is only a folder of records (:mod:`.model_records`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from safelight import names
from safelight.catalog import chosen_previews, paths, starters
from safelight.catalog.cards import Card, find_card, not_own
from safelight.catalog.composition import NamedParts, PartFinder
from safelight.catalog.describe import (
    CHANGED_REMEDY,
    CONVERTED,
    MISSING_REMEDY,
    Choices,
    OnBytes,
    Shelf,
    find_earlier_content,
    read_again,
    read_model,
    refuse_other_content,
)
from safelight.catalog.identify import PredictionType
from safelight.catalog.lock import library_lock
from safelight.catalog.model import Model
from safelight.catalog.model_records import ModelRecords
from safelight.catalog.quarantine import Quarantine
from safelight.catalog.unread import UnreadFile, UnreadFiles, besides, first_reading
from safelight.errors import (
    CorruptFileError,
    FileError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    UnreadableFileError,
)


class Library:
    """The models under ``root``, which need not exist, and the starters if they are installed. Without adapters.

    The attribute ``shelf`` finds components that a model's file lacks.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records = ModelRecords(root)
        self.unread = UnreadFiles(root)
        self.shelf = Shelf(self.records.conversions, PartFinder(root))
        self._quarantine = Quarantine(root)

    def cards(self) -> list[Card]:
        """Return the cards of all models by name. The user's own come first, then imported ones, then the starters.

        Skips damaged records; :meth:`damaged` returns these.
        """
        # This list comes first: a file that is read meanwhile is in both then, and would be in none otherwise.
        unread = self.unread.cards(models=True)
        own = [card for card in self.records.cards() if not card.problem]
        own += besides(unread, own)
        taken = {card.name for card in own}
        return [*own, *(card for card in starters.cards() if card.name not in taken)]

    def models(self) -> list[Model]:
        """Return all models of :meth:`cards` with their tensors. Reads each record."""
        own = [self.records.read(card) for card in self.records.cards() if not card.problem]
        taken = {model.name for model in own}
        return [*own, *(model for model in starters.models() if model.name not in taken)]

    def damaged(self) -> list[FileError]:
        """Return an error for each damaged record. Adding the model again replaces its record."""
        return [CorruptFileError(card.record_path, card.problem) for card in self.records.cards() if card.problem]

    def find_by_name(self, name: str) -> Model | None:
        """Return the user's own model or the starter of a name, None if there is none or its record is damaged."""
        return self.records.get_if_readable(name) or starters.model(name)

    def get(self, name: str) -> Model:
        """Return the model with this name or digest, or the only one whose file has this name.

        A model that was imported is read and hashed now.
        Raises ModelNotFoundError, which lists the nearest names.
        """
        unread = self.unread.find(name, models=True)
        found = self.records.get(name)
        if found is None and unread is not None:
            return _read_first(self, unread)
        found = found or starters.model(name)
        if found is None:
            card = find_card(self.cards(), self.root, name)
            unread = None if card.digest else self.unread.find(card.name, models=True)
            found = self.find_by_name(card.name) if unread is None else _read_first(self, unread)
            if found is None:
                raise ModelNotFoundError(name, [])
        return found

    def find(self, reference: str, on_bytes: OnBytes | None = None) -> Model:
        """Return a model by its name, path or digest (:mod:`safelight.catalog.paths` says which of them a text is).

        A file used by its path is read and hashed in whole at its first use. Its record is then stored.
        Raises ModelNotFoundError for an unknown name, UnreadableFileError for a path that does not exist.
        Raises InputError for the name of a folder in the current directory.
        """
        path = paths.user_path(reference)
        is_path = paths.is_path(reference)
        if not is_path or not os.path.lexists(path):
            try:
                return self.get(reference)
            except ModelNotFoundError:
                used = next(self.records.used_by_path(reference), None) if paths.is_digest(reference) else None
                if used is not None:
                    return used
                if is_path:
                    raise UnreadableFileError(path, f"does not exist{paths.did_you_mean(path)}") from None
                if path.is_dir():
                    hint = "for the folder of that name write ./NAME, for a file in it ./NAME/FILE"
                    raise InputError(f"no model named {reference!r}; {hint}") from None
                raise
        path = path.absolute()
        known = self.records.find_used_by_path(path)
        if known is not None:
            return known
        model = read_model(self.shelf, path, paths.stem(path), "path", Choices(), on_bytes)
        with library_lock(self.root):
            self.records.write_used_by_path(model)
        return model

    def find_by_digest(self, digest: str, prediction_type: str, name: str = "") -> Model | None:
        """Return a model by its content (``digest``) and prediction type, None if there is none.

        Models with unchanged files come first; among those, the one called ``name``. Models that were used by their
        path count too.
        """
        wanted = digest, prediction_type
        cards = [card for card in self.cards() if (card.digest, card.summary["prediction_type"]) == wanted]
        own = [self.find_by_name(card.name) for card in cards]
        fitting = [
            m
            for m in (*own, *self.records.used_by_path(digest))
            if m is not None and (m.digest, m.prediction_type) == wanted
        ]
        return min(fitting, key=lambda m: (bool(m.manifest.changed_files()), m.name != name), default=None)

    def add(
        self,
        path: Path,
        name: str | None = None,
        prediction_type: PredictionType | None = None,
        on_bytes: OnBytes | None = None,
        variant: str = "",
        parts: NamedParts = (),
        wanted: Mapping[str, str] | None = None,
        imported: bool = False,
    ) -> Model:
        """Identify a checkpoint, read and hash all of it, and store its record. The file stays where it is.

        ``variant``: set by the user; "" for the file's own.
        ``parts``: adapters, models or files that give text encoders or the VAE.
        ``wanted``: digests of components that other files give, by role.
        ``imported``: the file was imported, and may have been renamed or removed while it was read.
        Raises InputError when another file has the name, or when the name is not allowed.
        Raises FileError for a bad file.
        An error changes nothing.
        """
        path = paths.user_path(str(path)).absolute()
        chosen = paths.choose_name(name, path)
        refuse_taken(self.cards(), chosen, path)
        choices = Choices(prediction_type, variant, parts, wanted or {})
        model = read_model(self.shelf, path, chosen, "added", choices, on_bytes)
        with library_lock(self.root):
            if imported:
                listed = self.unread.find_path(path)
                if listed is None:
                    raise ModelNotFoundError(chosen, [])
                model = replace(model, name=listed.name, defaults=listed.defaults)
            refuse_taken(self.cards(), model.name, path)
            before = self.records.get_if_readable(model.name)
            if before is not None and not model.defaults:
                model = replace(model, defaults=before.defaults)
            self.records.replace(model)
            self.unread.forget(path)
            self._quarantine.end(model)
        return model

    def set_choices(
        self, name: str, variant: str = "", parts: NamedParts = (), on_bytes: OnBytes | None = None
    ) -> Model:
        """Change a model's variant, or from which files its components come. Reads and hashes all of it again.

        ``variant``, ``parts``: as in :meth:`add`; what is not named stays.
        Raises InputError as :meth:`add` does. An error changes nothing.
        """
        unread = self.unread.find(name, models=True)
        model = self.records.get(name)
        if model is None and unread is not None:
            return self.add(Path(unread.path), unread.name, None, on_bytes, variant or unread.given_variant, parts)
        if model is None:
            raise self._not_own(name, "changed")
        before = Choices.of(model)
        choices = replace(before, variant=variant or before.variant, named=parts)
        changed = read_model(self.shelf, model.path, model.name, model.origin, choices, on_bytes)
        with library_lock(self.root):
            changed = replace(changed, defaults=_present(self, model.name).defaults)
            self.records.replace(changed)
            self._quarantine.end(changed)
        return changed

    def earlier(self, name: str) -> list[Model]:
        """Return the models that had this name before, the newest first."""
        return self.records.earlier(name)

    def rename(self, name: str, new: str) -> Card:
        """Rename a model, with the earlier models of its name. Returns its card; nothing is read.

        Raises InputError when the new name is taken or not allowed, and for a starter.
        Raises ModelNotFoundError for an unknown name.
        """
        with library_lock(self.root):
            model, unread = self.records.get(name), self.unread.find(name, models=True)
            path = model.path if model is not None else None if unread is None else Path(unread.path)
            if path is None:
                raise self._not_own(name, "renamed")
            before, chosen = names.canonical(name), paths.choose_name(new, path)
            if chosen != before:
                refuse_taken((card for card in self.cards() if card.name != before), chosen, None)
                if model is not None:
                    self._quarantine.rename(model, self.records.rename(model, chosen))
                    chosen_previews.rename(self.root, "model", before, chosen)
                elif unread is not None:
                    self.unread.change(unread, name=chosen)
        return find_card(self.cards(), self.root, chosen)

    def roll_back(self, name: str, digest: str = "", on_bytes: OnBytes | None = None) -> Model:
        """Restore an earlier model of a name: the newest, or the one whose digest begins with ``digest``.

        The earlier bytes must still exist: under their path, in their conversion, or in a file of the same size in the
        same folder. All bytes are read and hashed.
        Raises InputError when there is no earlier model, or when its bytes do not exist any more.
        """
        current = self.get(name)
        earlier_models = [model for model in self.earlier(name) if model.digest.startswith(digest)]
        if not earlier_models:
            which = f" whose digest begins with {digest}" if digest else ""
            raise InputError(
                f"{name} has no earlier content{which}; only content that `safelight models add` replaced is stored"
            )
        earlier = earlier_models[0]
        found = find_earlier_content(self.shelf, earlier, on_bytes)
        if found is None:
            raise InputError(
                f"{earlier.path}: the file with the earlier content {earlier.digest[:10]} is gone, and no file of its "
                f"size in {earlier.path.parent} has that content; put it back, then try again"
            )
        with library_lock(self.root):
            defaults = _present(self, current.name).defaults
            restored = replace(found, name=current.name, origin=current.origin, defaults=defaults)
            self.records.replace(restored)
            self._quarantine.end(restored)
        return self.get(name)

    def _not_own(self, name: str, participle: str) -> InputError:
        """Return the error for a name that no record of the user's own has. Raises ModelNotFoundError."""
        return not_own(find_card(self.cards(), self.root, name), name, participle)

    def remove(self, name: str) -> None:
        """Remove a model's record, even a damaged one, and its conversion. The model's own file stays.

        Raises InputError for a starter, ModelNotFoundError for an unknown name.
        """
        with library_lock(self.root):
            card, unread = self.records.card(name), self.unread.find(name, models=True)
            if card is not None:
                self.records.remove(card)
                chosen_previews.forget(self.root, "model", card.name)
            elif unread is not None:
                self.unread.forget(Path(unread.path))
            else:
                raise self._not_own(name, "removed")

    def verify(self, name: str, on_bytes: OnBytes | None = None) -> Model:
        """Read and hash all of a model again. Ends the model's quarantine if its content is right.

        Raises IntegrityError, with the first tensor that differs.
        """
        model = self._read_again(self.get(name), on_bytes)
        self._quarantine.end(model)
        return model

    def recheck_after_corruption(self, model: Model) -> Model:
        """Read and hash all of a model again after some of its bytes were wrong. Repeats the conversion of a pickle.

        Raises IntegrityError when the content differs from the one that was added. The model then is in quarantine
        until :meth:`verify` or :meth:`add` ends it.
        """
        self._quarantine.refuse(model)
        try:
            if model.format in CONVERTED and all(source.is_unchanged() for source in model.manifest.files[1:]):
                fresh = read_model(self.shelf, model.path, model.name, model.origin, Choices.of(model), None)
                refuse_other_content(model, fresh.manifest)
                return replace(fresh, defaults=model.defaults)
            return self._read_again(model, None)
        except IntegrityError as error:
            self._quarantine.put(model, str(error))
            raise

    def quarantine_reason(self, model: Model) -> str | None:
        """Return why a model is in quarantine; None if it is not, or if its files changed since."""
        return self._quarantine.reason(model)

    def ensure_unchanged(self, model: Model) -> Model:
        """Return the model if its content is unchanged. Reads the files again only if their times or sizes changed.

        Stores the new times and sizes if the content is the same.
        Raises IntegrityError when the content changed, a file is gone, or the model is in quarantine.
        """
        self._quarantine.refuse(model)
        changed = model.manifest.changed_files()
        if not changed:
            return model
        # A conversion is made again.
        conversions = self.records.conversions
        lost = (path for path in changed if not path.exists() and not path.is_relative_to(conversions))
        gone = next(lost, None)
        if gone is not None:
            raise IntegrityError(gone, "", f"the file of the model {model.name} is gone", MISSING_REMEDY)
        return self._read_again(model, None)

    def _read_again(self, model: Model, on_bytes: OnBytes | None) -> Model:
        """Read and hash all of a model, and store its new manifest. Raises IntegrityError for other content."""
        fresh = replace(read_again(self.shelf, model, on_bytes), defaults=model.defaults)
        refuse_other_content(model, fresh.manifest)
        for field in ("base", "prediction_type", "zero_terminal_snr"):
            before, now = getattr(model, field), getattr(fresh, field)
            if before != now:
                problem = f"its {field} was {before}, its files now say {now}"
                raise IntegrityError(model.path, "", problem, CHANGED_REMEDY)
        if model.origin == "added" and fresh.manifest != model.manifest:
            with library_lock(self.root):
                current = self.records.get_if_readable(model.name)
                # Another process may have removed or replaced the record meanwhile.
                if current is not None and current.manifest == model.manifest:
                    # Its defaults may have been changed meanwhile.
                    fresh = replace(fresh, defaults=current.defaults)
                    self.records.write(fresh)
        return fresh


def _present(library: Library, name: str) -> Model:
    """Return a model as its record is now: it may have been changed or removed while its files were read."""
    current = library.records.get(name)
    if current is None:
        raise InputError(f"{name} was removed or renamed while its files were read")
    return current


def refuse_taken(cards: Iterable[Card], name: str, path: Path | None) -> None:
    """Raise InputError if a name is taken. Case does not count: some file systems, and most people, ignore it.

    ``path``: the file that is to have the name, and may have it already.
    """
    taken = next((card for card in cards if card.name.casefold() == name.casefold()), None)
    if taken is not None and (taken.path != path or taken.name != name):
        called = "" if taken.name == name else f" ({taken.name})"
        raise InputError(f"the name {name!r} is taken by {taken.path}{called}; choose another with --name")


def _read_first(library: Library, unread: UnreadFile) -> Model:
    """Read and hash a model that was imported, and store its record."""
    with first_reading(unread.path):
        known = next((card for card in library.records.cards() if str(card.path) == unread.path), None)
        if known is not None and not known.problem:
            return library.records.read(known)
        return library.add(Path(unread.path), unread.name, variant=unread.given_variant, imported=True)
