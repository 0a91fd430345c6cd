"""Imports the models of another program. Only headers are read; weights are read at the first use."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safelight import names
from safelight.catalog import paths, trigger_words
from safelight.catalog.cards import Card
from safelight.catalog.catalog import Catalog
from safelight.catalog.describe import native_resolution
from safelight.catalog.found import Found
from safelight.catalog.identify import Identity, identify
from safelight.catalog.lock import library_lock
from safelight.catalog.other_programs import Candidate
from safelight.catalog.program_defaults import NONE, ProgramDefaults, beside, fitting
from safelight.catalog.unread import UnreadFile
from safelight.errors import InputError, StorageError, UnreadableFileError, UnsupportedModelError, printable
from safelight.weights.adapter_file import INVERSION, is_adapter
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS

State = Literal["imported", "known", "refused"]


@dataclass(frozen=True, slots=True)
class ImportedFile:
    """What became of a file.

    ``name``, ``kind``, ``base``: "" for a file that was refused before they were known.
    ``note``: why it was refused, or what the user should know.
    """

    path: Path
    state: State
    name: str = ""
    kind: str = ""
    base: str = ""
    nbytes: int = 0
    note: str = ""


ChooseVariant = Callable[[Found], str]
"""Returns the variant that the user chose for a file, "" for the file's own."""


def import_files(
    candidates: Iterable[Candidate], catalog: Catalog, choose_variant: ChooseVariant
) -> Iterator[ImportedFile]:
    """Import files. They stay where they are. Textual inversions, which are small, are read at once.

    Raises StorageError, UnreadableFileError if the library cannot be written. What was yielded before is imported.
    """
    importer, left = _Importer(catalog, choose_variant), iter(candidates)
    while batch := list(itertools.islice(left, BATCH)):
        yield from importer.import_batch(batch)


BATCH = 200
"""Files after which the list is written."""


@dataclass(frozen=True, slots=True)
class _Result:
    """What becomes of a file, before it has a name.

    ``entry``: for the list; None for a file that does not get into it.
    ``wanted``: the name that its program has, "" for none.
    ``before``: the card that it had with another content, variant or place; None for a new file.
    """

    file: ImportedFile
    entry: UnreadFile | None = None
    wanted: str = ""
    before: Card | None = None


class _Importer:
    """Imports files into one library."""

    def __init__(self, catalog: Catalog, choose_variant: ChooseVariant) -> None:
        self._catalog, self._choose_variant = catalog, choose_variant
        cards = [*catalog.library.cards(), *catalog.adapters.cards()]
        self._known = {os.path.realpath(card.path): card for card in cards}
        self._gone: defaultdict[tuple[int, int], list[Card]] = defaultdict(list)
        """Imported files that are not at their place any more, by size and time."""
        for card in cards:
            if not card.digest and card.state() == "gone":
                self._gone[card.files[0][1:]].append(card)

    def import_batch(self, batch: Sequence[Candidate]) -> list[ImportedFile]:
        """Import files, and return what became of each."""
        results = [self._examine(candidate) for candidate in batch]
        library, adapters = self._catalog.library, self._catalog.adapters
        with library_lock(library.root):
            # Another process may have chosen the same names meanwhile.
            cards = [*library.cards(), *adapters.cards()]
            taken, present = _Names(cards), {card.summary["path"]: card for card in cards}
            made: list[ImportedFile] = []
            entries: list[UnreadFile] = []
            for one in results:
                if one.entry is None:
                    made.append(one.file)
                    continue
                before = present.get(one.entry.path) or one.before
                name = taken.choose(one.wanted, one.file.path) if before is None else before.name
                entries.append(replace(one.entry, name=name))
                made.append(replace(one.file, name=name))
            if entries:
                gone = [str(one.before.path) for one in results if one.before is not None]
                library.unread.add(entries, gone)
        return [self._read_inversion(file, one.wanted) for file, one in zip(made, results, strict=True)]

    def _examine(self, candidate: Candidate) -> _Result:
        """Read a file's header, and decide what becomes of it."""
        if "\0" in str(candidate.found.path) or not _is_path(candidate.found.path):
            shown = Path(printable(str(candidate.found.path)))
            return _Result(ImportedFile(shown, "refused", note=f"{shown}: is no path that a file can have"))
        path = Path(os.path.normpath(candidate.found.path.absolute()))
        card = self._known.get(os.path.realpath(path))
        if card is not None and not _is_new(card, candidate.found, self._choose_variant):
            base, nbytes = card.summary["base"], card.summary["bytes"]
            note = "" if card.state() == "there" else "its file may have changed; run models verify"
            return _Result(ImportedFile(path, "known", card.name, card.kind, base, nbytes, note))
        try:
            identity = _identify(path, self._choose_variant(candidate.found))
            defaults = _defaults(path, identity, candidate)
            entry = _unread(path, identity, candidate.trigger_words, defaults)
        except StorageError:
            raise
        except InputError as error:
            return _Result(ImportedFile(path, "refused", note=str(error)))
        moved = self._gone[entry.size, entry.mtime_ns] if card is None else []
        before = moved.pop(0) if moved else card
        base, note = identity.base or "", _note(identity, defaults)
        file = ImportedFile(path, "imported", "", identity.kind, base, identity.nbytes, note)
        return _Result(file, None if identity.kind == INVERSION else entry, candidate.name, before)

    def _read_inversion(self, file: ImportedFile, wanted: str) -> ImportedFile:
        """Add a textual inversion: a prompt needs its vectors. Other files are returned as they are."""
        if file.kind != INVERSION or file.state != "imported":
            return file
        name = _Names(self._catalog.adapters.cards()).choose(wanted, file.path)
        try:
            self._catalog.adapters.add(file.path, name)
        except StorageError:
            raise
        except InputError as error:
            return ImportedFile(file.path, "refused", note=str(error))
        return replace(file, name=name)


def _is_path(path: Path) -> bool:
    """Return whether the system can encode a path. A program's database may contain anything."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _is_new(card: Card, found: Found, choose_variant: ChooseVariant) -> bool:
    """Return whether a file that was imported before, and not read yet, has changed or gets another variant now."""
    if card.digest:
        return False
    if card.state() != "there":
        return True
    try:
        chosen = choose_variant(found)
    except InputError:
        return True
    return bool(chosen) and chosen != card.summary.get("variant")


def _identify(path: Path, variant: str) -> Identity:
    """Identify a file. Raises UnsupportedModelError for one that Safelight does not use."""
    found = identify(path, variant=variant)
    if not is_adapter(found.kind) and found.layout is None:
        raise UnsupportedModelError(path, f"is a {found.kind} that Safelight does not use ({found.rule})")
    return found


def _defaults(path: Path, identity: Identity, candidate: Candidate) -> ProgramDefaults:
    """Return the defaults that the program has for a model, as far as its family has them."""
    if identity.layout is None:
        return NONE
    found = candidate.defaults if candidate.defaults.values or candidate.defaults.left_out else beside(path)
    family = identity.layout.family
    return fitting(found, family, identity.variant or next(iter(family.variants)))


def _note(identity: Identity, defaults: ProgramDefaults) -> str:
    notes: list[str] = []
    if identity.layout is not None and identity.variant is None:
        notes.append("say its variant before its first use: import again with --variant")
    if defaults.left_out:
        notes.append(f"these of its defaults are not taken over: {printable(', '.join(defaults.left_out))}")
    return "; ".join(notes)


def _unread(path: Path, found: Identity, words: tuple[str, ...], defaults: ProgramDefaults) -> UnreadFile:
    """Return the entry of a file, without its name. ``words``: its trigger words, if nothing beside it says them."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UnreadableFileError(path, f"cannot be read ({error.strerror})") from error
    if found.kind in WEIGHT_ADAPTER_KINDS:
        words = trigger_words.find(path, found.metadata) or words
    resolution = 0
    if found.layout is not None:
        resolution = found.resolution or native_resolution(found.layout.family, found.prediction_type)
    return UnreadFile(
        name="",
        path=str(path),
        kind=found.kind,
        base=found.base or "",
        variant=found.variant or "",
        prediction_type=found.prediction_type or "",
        dtype=found.dtype,
        format=found.format,
        rule=found.rule,
        nbytes=found.nbytes,
        resolution=resolution,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        variant_from_user=found.variant_from_user,
        trigger_words=words,
        defaults=defaults.values,
    )


class _Names:
    """Chooses names that nothing else has."""

    def __init__(self, cards: Iterable[Card]) -> None:
        self._taken = {card.name.casefold() for card in cards}

    def choose(self, wanted: str, path: Path) -> str:
        """Return the program's name of a file, or its file's name; with its folder or a number if that is taken."""
        plain = names.of_stem(wanted) or names.of_stem(paths.stem(path)) or "model"
        folder = names.of_stem(f"{plain} ({path.parent.name})")
        numbered = (f"{plain[: names.MOST_CHARACTERS - 8]} {number}" for number in range(2, 1_000_000))
        chosen = next(
            name for name in itertools.chain((plain, folder), numbered) if name and name.casefold() not in self._taken
        )
        self._taken.add(chosen.casefold())
        return chosen
