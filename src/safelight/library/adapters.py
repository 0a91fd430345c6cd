"""The adapters that a user has: ``ROOT/adapters/NAME.json`` is the record of one; its file stays where it is.

A pickle is converted once, into ``ROOT/adapters/converted``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safelight.errors import (
    FileError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    UnreadableFileError,
    UnsupportedModelError,
)
from safelight.files import settle, written
from safelight.formats import adapter as files
from safelight.formats.identify import identify, read_header
from safelight.library import convert, paths, records, starters
from safelight.library.index import Card, Index
from safelight.library.lock import alone
from safelight.library.model import Adapter, Origin
from safelight.names import canonical, file_stem
from safelight.weights.digest import named
from safelight.weights.manifest import FileHint, Manifest, measure, moved

CONVERTED = "converted"
"""Below the records: what pickles were converted to."""


@dataclass(frozen=True, eq=False)
class Inversions:
    """Textual inversions: ``shapes`` of the tensors of each, by its name. ``fitting``: what was found to fit which text
    encoders; kept here, so that it is never another library's or an earlier state's."""

    generation: int
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    fitting: dict[Hashable, tuple[str, ...]] = field(default_factory=dict[Hashable, tuple[str, ...]])


class Adapters:
    """The adapters under ``root``, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records = root / "adapters"
        self._index = Index(self._records, records.read_adapter, root / "index.db")
        self._inversions = Inversions(-1, {})

    def cards(self) -> list[Card]:
        """By name, the user's own before the starters, without their tensors. Damaged records are left out."""
        own = [card for card in self._index.cards().values() if not card.problem]
        taken = {card.name for card in own}
        return [*own, *(card for card in starters.adapter_cards() if card.name not in taken)]

    def inversions(self) -> Inversions:
        """The textual inversions as they are now; the same object as long as no adapter is added or removed."""
        # Read before the cards: what changes in between is then looked at once more, never overlooked.
        generation = self._index.generation
        cards = self.cards()
        if self._inversions.generation != self._index.generation:
            found = {card.name: card.vectors for card in cards if card.vectors is not None}
            self._inversions = Inversions(generation, found)
        return self._inversions

    def all(self) -> list[Adapter]:
        """The same as :meth:`cards`, whole: each record is read."""
        own = [self._index.whole(card) for card in self._index.cards().values() if not card.problem]
        taken = {adapter.name for adapter in own}
        return [*own, *(adapter for adapter in starters.adapters() if adapter.name not in taken)]

    def get(self, name: str) -> Adapter:
        """The adapter of that name, or of that file's name. Raises ModelNotFoundError, which names the nearest."""
        found = self._index.get(name) or next((one for one in starters.adapters() if one.name == name), None)
        if found is not None:
            return found
        cards = self.cards()
        fitting = [card for card in self._index.cards().values() if not card.problem and card.stem == canonical(name)]
        if len(fitting) == 1:
            # Prompts of other programs name files.
            return self._index.whole(fitting[0])
        raise ModelNotFoundError(name, paths.near(name, (card.name for card in cards)), "adapter")

    def resolve(self, name_or_path: str) -> Adapter:
        """An adapter by its name, else by a path; a file used by its path is read and hashed the first time."""
        path = paths.user_path(name_or_path)
        if not paths.is_path(name_or_path):
            return self.get(name_or_path)
        path = path.absolute()
        if not os.path.lexists(path):
            raise UnreadableFileError(path, f"does not exist{paths.beside(path)}")
        seen = self.root / "seen" / "adapters" / f"{named(str(path))}.json"
        with contextlib.suppress(FileError):
            known = records.read_adapter(seen)
            if not known.manifest.changed():
                return known
        found = self._describe(path, paths.stem(path), "path")
        with alone(self.root):
            records.write(seen, found)
        return found

    def used(self) -> Iterator[Adapter]:
        """Those that were used by their path."""
        for path in sorted((self.root / "seen" / "adapters").glob("*.json")):
            with contextlib.suppress(FileError):
                yield records.read_adapter(path)

    def find(self, name: str, digest: str, by_path: bool = True) -> Adapter:
        """The adapter of that name (or path if ``by_path``) with that content, or another of the same content. Raises
        IntegrityError when there is none."""
        with contextlib.suppress(InputError):
            found = self.resolve(name) if by_path else self.get(name)
            if found.digest == digest:
                return self.checked(found)
        for card in self.cards():
            # A card is only a hint: it may be that of an earlier record.
            if card.digest == digest and (found := self.get(card.name)).digest == digest:
                return self.checked(found)
        used = next((one for one in self.used() if one.digest == digest and not one.manifest.changed()), None)
        if used is not None and by_path:
            return used
        raise IntegrityError(Path(name), "", f"no adapter has the content {digest[:10]} that was asked for")

    def add(self, path: Path, name: str | None = None, base: str = "") -> Adapter:
        """Identify an adapter, read and hash all of it, and keep its record. The file stays where it is.

        ``base`` is the user's word for what it belongs to, and goes above what the file says.

        Raises InputError when the name is taken by another file or not allowed, FileError for a bad file.
        """
        path = paths.user_path(str(path)).absolute()
        chosen = paths.chosen(name, path)
        found = self._describe(path, chosen, "added", base)
        with alone(self.root):
            others = self.cards()
            taken = next((card for card in others if card.name.casefold() == chosen.casefold()), None)
            if taken is not None and (taken.path != path or taken.name != chosen):
                raise InputError(f"the name {chosen!r} is taken by {taken.path}; give another with --name")
            self._write(found)
        return found

    def _write(self, adapter: Adapter) -> None:
        records.write(self._record(adapter.name), adapter)
        self._index.changed()

    def _record(self, name: str) -> Path:
        """The file of that adapter's record, whether it is there or not."""
        card = self._index.cards().get(canonical(name))
        return card.record if card is not None else self._records / f"{file_stem(name)}.json"

    def rename(self, name: str, new: str) -> Adapter:
        """Give an adapter another name. Raises InputError when it is taken or not allowed, and for a starter."""
        with alone(self.root):
            adapter = self._index.get(name)
            if adapter is None:
                self._refuse_starter(name, "renamed")
            assert adapter is not None
            chosen = paths.chosen(new, adapter.path)
            taken = next((card for card in self.cards() if card.name.casefold() == chosen.casefold()), None)
            if taken is not None and taken.name != adapter.name:
                raise InputError(f"the name {chosen!r} is taken by {taken.path}; give another")
            record, renamed = self._record(name), replace(adapter, name=chosen)
            target = self._records / f"{file_stem(chosen)}.json"
            records.write(target, renamed)
            if not (record.exists() and target.samefile(record)):
                record.unlink(missing_ok=True)
            self._index.changed()
            return renamed

    def _refuse_starter(self, name: str, done: str) -> None:
        adapter = self.get(name)
        if adapter.origin == "starter":
            raise InputError(f"{adapter.name!r} is a starter, part of the installation; it cannot be {done}")
        raise InputError(f"{name!r} is the file of the adapter {adapter.name!r}; give that name")

    def remove(self, name: str) -> None:
        """Forget an adapter, also one whose record is damaged. Its file stays. Starters cannot be removed."""
        with alone(self.root):
            card = self._index.cards().get(canonical(name))
            if card is None:
                self._refuse_starter(name, "removed")
            assert card is not None
            card.record.unlink(missing_ok=True)
            self._index.changed()
            kept = {f"{card.digest}.safetensors" for card in self.cards()}
            for file in (self._records / CONVERTED).glob("*.safetensors"):
                if file.name not in kept:
                    file.unlink(missing_ok=True)

    def checked(self, adapter: Adapter) -> Adapter:
        """The adapter, if its file is as it was; when its hint differs, it is read again. Raises IntegrityError."""
        return adapter if not adapter.manifest.changed() else self.verify(adapter)

    def verify(self, adapter: Adapter) -> Adapter:
        """Read and hash all of it again. Raises IntegrityError when its content is another."""
        try:
            told = adapter.base if adapter.told else ""
            fresh = self._describe(adapter.path, adapter.name, adapter.origin, told)
        except FileError as error:
            raise IntegrityError(error.path, "", error.problem, "Put the right file back, or add it again.") from error
        if fresh.digest != adapter.digest:
            raise IntegrityError(adapter.path, "", "its content changed", "Add it again if that was meant.")
        if adapter.origin == "added" and fresh.manifest != adapter.manifest:
            self._refresh(adapter, fresh)
        return replace(fresh, name=adapter.name)

    def _refresh(self, adapter: Adapter, fresh: Adapter) -> None:
        """Write what was seen of an adapter's file, unless it was removed or replaced while it was read."""
        with alone(self.root):
            card = self._index.cards().get(canonical(adapter.name))
            if card is not None and not card.problem and self._index.whole(card).manifest == adapter.manifest:
                self._write(fresh)

    def _describe(self, path: Path, name: str, origin: Origin, told: str = "") -> Adapter:
        found = identify(path)
        if found.kind not in files.KINDS:
            todo = "; `safelight models add` takes it" if found.kind == "checkpoint" else ""
            raise UnsupportedModelError(path, f"is a {found.kind} ({found.rule}), not an adapter{todo}")
        if found.format == "pickle":
            manifest = self._converted(path, found.kind)
        else:
            manifest = measure((files.layout(read_header(path), found.kind),))
        base, rule = told or found.base or "", f"{found.rule}; for {told} by the user's word" if told else found.rule
        return Adapter(
            canonical(name), path, found.kind, base, found.dtype, found.format, origin, rule, manifest, bool(told)
        )

    def _converted(self, path: Path, kind: str) -> Manifest:
        """Of what a pickle was converted to, once, under the name of its content; it watches over the pickle too."""
        home = self._records / CONVERTED
        with written(home) as (file, temporary):
            convert.to_safetensors(files.read_tensors(read_header(path), kind), file)
            settle(file, temporary)
            with convert.blamed(path, temporary):
                manifest = measure((files.layout(read_header(temporary), kind),))
            place = home / f"{manifest.digest}.safetensors"
            os.replace(temporary, place)
        manifest = moved(manifest, place)
        return replace(manifest, files=(*manifest.files, FileHint.of(path)))
