"""The user's adapters. ``ROOT/adapters/NAME.json`` is the record of an adapter; the adapter's file stays where it is.

Safelight converts a pickle once, into ``ROOT/adapters/converted``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safelight.catalog import chosen_previews, convert, paths, records, starters, trigger_words
from safelight.catalog.cards import Card, find_card, not_own
from safelight.catalog.identify import identify, read_header, read_raw_header
from safelight.catalog.index import Index
from safelight.catalog.index_file import IndexFile
from safelight.catalog.lock import library_lock
from safelight.catalog.model import Adapter, Origin
from safelight.catalog.model_records import ModelRecords
from safelight.catalog.unread import UnreadFile, UnreadFiles, besides, first_reading
from safelight.errors import (
    FileError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    UnreadableFileError,
    UnsupportedModelError,
)
from safelight.files.disk import flush_to_disk, temporary_file_in
from safelight.names import canonical, file_stem
from safelight.weights import adapter_file
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import FileStamp, Manifest, hash_components, relocate

CONVERTED = "converted"
"""The folder of converted pickles, in the folder of records."""


@dataclass(frozen=True, eq=False)
class Inversions:
    """The textual inversions of a library in one state.

    ``generation``: the generation of the index from which they come.
    ``shapes``: shapes of the tensors of each inversion, by its name.
    ``fitting``: a cache of the inversions that fit given text encoders. It is part of this object, so that it never
    belongs to another library or to an earlier state.
    """

    generation: int
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    fitting: dict[Hashable, tuple[str, ...]] = field(default_factory=dict[Hashable, tuple[str, ...]])


class Adapters:
    """The adapters under ``root``. The folder need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records = root / "adapters"
        file = IndexFile(root / "index.db")
        self.index = Index(self._records, records.read_adapter, file)
        self._used_by_path = Index(root / "seen" / "adapters", records.read_adapter, file)
        self.unread = UnreadFiles(root)
        self._inversions = Inversions(-1, {})

    def cards(self) -> list[Card]:
        """Return the cards of all adapters by name. The user's own come first, then imported ones, then the starters.

        Skips damaged records.
        """
        # This list comes first: a file that is read meanwhile is in both then, and would be in none otherwise.
        unread = self.unread.cards(models=False)
        own = [card for card in self.index.cards().values() if not card.problem]
        own += besides(unread, own)
        taken = {card.name for card in own}
        return [*own, *(card for card in starters.adapter_cards() if card.name not in taken)]

    def inversions(self) -> Inversions:
        """Return the present textual inversions. The object stays the same until an adapter is added or removed."""
        # ``cards()`` may scan the folder and increase the generation. Store the value from before the scan: a change
        # during the scan then forces another rebuild at the next call, and no change is missed. So the first call after
        # a change is followed by one needless rebuild.
        generation = self.index.generation
        cards = self.cards()
        if self._inversions.generation != self.index.generation:
            found = {card.name: card.vectors for card in cards if card.vectors is not None}
            self._inversions = Inversions(generation, found)
        return self._inversions

    def all(self) -> list[Adapter]:
        """Return all adapters of :meth:`cards` with their tensors. Reads each record."""
        own = [self.index.read_record(card) for card in self.index.cards().values() if not card.problem]
        taken = {adapter.name for adapter in own}
        return [*own, *(adapter for adapter in starters.adapters() if adapter.name not in taken)]

    def get(self, name: str) -> Adapter:
        """Return the adapter of a name, of its file's name, or of a digest.

        An adapter that was imported is read and hashed now.
        Raises ModelNotFoundError, which lists the nearest names.
        """
        unread = self.unread.find(name, models=False)
        found = self.index.get(name)
        if found is None and unread is not None:
            return _read_first(self, unread)
        found = found or next((item for item in starters.adapters() if item.name == name), None)
        if found is None:
            card = find_card(self.cards(), self.root, name, "adapter")
            unread = None if card.digest else self.unread.find(card.name, models=False)
            if unread is not None:
                return _read_first(self, unread)
            found = self.index.get(card.name) or next(one for one in starters.adapters() if one.name == card.name)
        return found

    def find(self, reference: str) -> Adapter:
        """Return an adapter by its name, path or digest (:mod:`safelight.catalog.paths` says which of them a text is).

        A file used by its path is read and hashed at its first use.
        """
        path = paths.user_path(reference)
        if not paths.is_path(reference):
            used = next(self.adapters_used_by_path(reference), None) if paths.is_digest(reference) else None
            return self.get(reference) if used is None else used
        path = path.absolute()
        if not os.path.lexists(path):
            raise UnreadableFileError(path, f"does not exist{paths.did_you_mean(path)}")
        record_path = self.root / "seen" / "adapters" / f"{hash_texts(str(path))}.json"
        with contextlib.suppress(FileError):
            known = records.read_adapter(record_path)
            if not known.manifest.changed_files():
                return known
        found = self._describe(path, paths.stem(path), "path")
        with library_lock(self.root):
            records.write(record_path, found)
            self._used_by_path.invalidate()
        return found

    def cards_used_by_path(self) -> list[Card]:
        """Return the cards of the adapters that were used by their path."""
        return [card for card in self._used_by_path.all() if not card.problem]

    def adapters_used_by_path(self, digest: str = "") -> Iterator[Adapter]:
        """Yield the adapters that were used by their path and whose files are unchanged.

        ``digest``: only adapters of this content; "" for all.
        """
        for card in self.cards_used_by_path():
            if digest in ("", card.digest) and card.state() == "there":
                with contextlib.suppress(FileError):
                    yield records.read_adapter(card.record_path)

    def find_by_digest(self, name: str, digest: str, by_path: bool = True) -> Adapter:
        """Return an adapter by its content. The one called ``name`` comes before others of the same content.

        ``digest``: the content.
        ``by_path``: ``name`` may be a path.
        Raises IntegrityError when no adapter has this content.
        """
        with contextlib.suppress(InputError):
            found = self.find(name) if by_path else self.get(name)
            if found.digest == digest:
                return self.ensure_unchanged(found)
        for card in self.cards():
            # A card is only a hint: it may belong to an earlier record.
            if card.digest == digest and (found := self.get(card.name)).digest == digest:
                return self.ensure_unchanged(found)
        used = next(self.adapters_used_by_path(digest), None)
        if used is not None and by_path:
            return used
        remedy = "Add the adapter with this content with `safelight adapters add`."
        raise IntegrityError(Path(name), "", f"no adapter has the content {digest[:10]}", remedy)

    def add(
        self,
        path: Path,
        name: str | None = None,
        base: str = "",
        words: tuple[str, ...] = (),
        imported: bool = False,
    ) -> Adapter:
        """Identify an adapter, read and hash all of it, and store its record. The file stays where it is.

        ``base``: the base set by the user; it overrides the file's.
        ``words``: its trigger words, if nothing beside the file says them.
        ``imported``: the file was imported, and may have been renamed or removed while it was read.
        Raises InputError when another file has the name, or when the name is not allowed.
        Raises FileError for a bad file.
        """
        path = paths.user_path(str(path)).absolute()
        chosen = paths.choose_name(name, path)
        found = self._describe(path, chosen, "added", base, words)
        with library_lock(self.root):
            if imported:
                listed = self.unread.find_path(path)
                if listed is None:
                    raise ModelNotFoundError(chosen, [], "adapter")
                chosen, found = listed.name, replace(found, name=listed.name)
            others = self.cards()
            taken = next((card for card in others if card.name.casefold() == chosen.casefold()), None)
            if taken is not None and (taken.path != path or taken.name != chosen):
                raise InputError(f"the name {chosen!r} is taken by {taken.path}; choose another with --name")
            self._write(found)
            self.unread.forget(path)
        return found

    def _write(self, adapter: Adapter) -> None:
        records.write(self._record(adapter.name), adapter)
        self.index.invalidate()

    def _record(self, name: str) -> Path:
        """Return the path of an adapter's record, which need not exist."""
        card = self.index.cards().get(canonical(name))
        return card.record_path if card is not None else self._records / f"{file_stem(name)}.json"

    def rename(self, name: str, new: str) -> Card:
        """Rename an adapter. Returns its card; nothing is read.

        Raises InputError when the name is taken or not allowed, and for a starter.
        Raises ModelNotFoundError for an unknown name.
        """
        with library_lock(self.root):
            adapter, unread = self.index.get(name), self.unread.find(name, models=False)
            path = adapter.path if adapter is not None else None if unread is None else Path(unread.path)
            if path is None:
                raise self._not_own(name, "renamed")
            chosen = _free_name(self.cards(), new, path, canonical(name))
            if adapter is not None:
                record, target = self._record(name), self._records / f"{file_stem(chosen)}.json"
                records.write(target, replace(adapter, name=chosen))
                if not (record.exists() and target.samefile(record)):
                    record.unlink(missing_ok=True)
                chosen_previews.rename(self.root, "adapter", canonical(name), chosen)
                self.index.invalidate()
            elif unread is not None:
                self.unread.change(unread, name=chosen)
        return find_card(self.cards(), self.root, chosen, "adapter")

    def _not_own(self, name: str, participle: str) -> InputError:
        """Return the error for a name that no record of the user's own has. Raises ModelNotFoundError."""
        return not_own(find_card(self.cards(), self.root, name, "adapter"), name, participle)

    def remove(self, name: str) -> None:
        """Remove an adapter's record, even a damaged one. The adapter's file stays. Raises InputError for a starter."""
        with library_lock(self.root):
            card, unread = self.index.cards().get(canonical(name)), self.unread.find(name, models=False)
            if card is None and unread is not None:
                self.unread.forget(Path(unread.path))
                return
            if card is None:
                raise self._not_own(name, "removed")
            card.record_path.unlink(missing_ok=True)
            self.index.invalidate()
            chosen_previews.forget(self.root, "adapter", card.name)
            # A conversion may be a part of a model, or be used by its path.
            used = {path for one in (*self.cards(), *self._used_by_path.all()) for path, *_ in one.files}
            needed = {Path(path).name for path in used | ModelRecords(self.root).used_files()}
            for file in (self._records / CONVERTED).glob("*.safetensors"):
                if file.name not in needed:
                    file.unlink(missing_ok=True)

    def ensure_unchanged(self, adapter: Adapter) -> Adapter:
        """Return the adapter if its content is unchanged.

        Reads the file again only if its size, times or inode changed.
        Raises IntegrityError when the content changed.
        """
        return adapter if not adapter.manifest.changed_files() else self.verify(adapter)

    def verify(self, adapter: Adapter) -> Adapter:
        """Read and hash all of an adapter again. Raises IntegrityError when its content changed."""
        try:
            user_base = adapter.base if adapter.base_from_user else ""
            fresh = self._describe(adapter.path, adapter.name, adapter.origin, user_base, adapter.trigger_words)
        except FileError as error:
            raise IntegrityError(error.path, "", error.problem, "Put the right file back, or add it again.") from error
        if fresh.digest != adapter.digest:
            raise IntegrityError(adapter.path, "", "its content changed", "If you changed it, add it again.")
        if adapter.origin == "added" and fresh.manifest != adapter.manifest:
            self._refresh(adapter, fresh)
        return replace(fresh, name=adapter.name)

    def _refresh(self, adapter: Adapter, fresh: Adapter) -> None:
        """Store the new manifest of an adapter, unless its record was removed or replaced while the file was read."""
        with library_lock(self.root):
            card = self.index.cards().get(canonical(adapter.name))
            if card is not None and not card.problem and self.index.read_record(card).manifest == adapter.manifest:
                self._write(fresh)

    def _describe(
        self, path: Path, name: str, origin: Origin, user_base: str = "", words: tuple[str, ...] = ()
    ) -> Adapter:
        found = identify(path)
        if not adapter_file.is_adapter(found.kind):
            todo = "; use `safelight models add`" if found.kind == "checkpoint" else ""
            raise UnsupportedModelError(path, f"is a {found.kind} ({found.rule}), not an adapter{todo}")
        if found.format == "pickle":
            manifest = self._converted(path, found.kind)
        else:
            manifest = hash_components(adapter_file.layout(read_header(path), found.kind))
        base = user_base or found.base or ""
        rule = f"{found.rule}; the user set the base {user_base}" if user_base else found.rule
        if found.kind in WEIGHT_ADAPTER_KINDS:
            words = trigger_words.find(path, found.metadata) or words
        return Adapter(
            canonical(name),
            path,
            found.kind,
            base,
            found.dtype,
            found.format,
            origin,
            rule,
            manifest,
            bool(user_base),
            words,
        )

    def _converted(self, path: Path, kind: str) -> Manifest:
        """Convert a pickle and return the manifest of the conversion.

        The manifest also lists the pickle, so that Safelight notices when it changes. The conversion is named after its
        content.
        """
        conversions = self._records / CONVERTED
        with temporary_file_in(conversions) as (file, temporary):
            convert.to_safetensors(adapter_file.tensors_to_read(read_raw_header(path), kind), file)
            flush_to_disk(file, temporary)
            with convert.reporting_errors_for(path, temporary):
                manifest = hash_components(adapter_file.layout(read_header(temporary), kind))
            converted = conversions / f"{manifest.digest}.safetensors"
            os.replace(temporary, converted)
        manifest = relocate(manifest, converted)
        return replace(manifest, files=(*manifest.files, FileStamp.of(path)))


def _free_name(cards: Iterable[Card], wanted: str, path: Path, before: str) -> str:
    """Return a new name for the adapter that was called ``before``. Raises InputError if another one has it."""
    chosen = paths.choose_name(wanted, path)
    taken = next((card for card in cards if card.name.casefold() == chosen.casefold()), None)
    if taken is not None and taken.name != before:
        raise InputError(f"the name {chosen!r} is taken by {taken.path}; choose another")
    return chosen


def _read_first(adapters: Adapters, unread: UnreadFile) -> Adapter:
    """Read and hash an adapter that was imported, and store its record."""
    with first_reading(unread.path):
        known = next((card for card in adapters.index.cards().values() if str(card.path) == unread.path), None)
        if known is not None and not known.problem:
            return adapters.index.read_record(known)
        return adapters.add(Path(unread.path), unread.name, words=unread.trigger_words, imported=True)
