"""Imports the models of another program. Only headers are read; weights are read at the first use."""

from __future__ import annotations

import itertools
import os
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
from safelight.catalog.identify import Identity, identify, read_raw_header
from safelight.catalog.lock import library_lock
from safelight.catalog.other_programs import Candidate
from safelight.catalog.unread import UnreadFile
from safelight.errors import InputError, StorageError, UnreadableFileError, UnsupportedModelError
from safelight.weights.adapter_file import INVERSION, is_adapter
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS

State = Literal["imported", "known", "refused"]


@dataclass(frozen=True, slots=True)
class ImportedFile:
    """What became of a file.

    ``name``, ``kind``, ``base``: "" for a file that was refused before they were known.
    ``note``: why it was refused, or what the user should know.
    ``replaces``: the entry that it had at another place.
    """

    path: Path
    state: State
    name: str = ""
    kind: str = ""
    base: str = ""
    nbytes: int = 0
    note: str = ""
    replaces: Card | None = None


ChooseVariant = Callable[[Found], str]
"""Returns the variant that the user chose for a file, "" for the file's own."""


def import_files(
    candidates: Iterable[Candidate], catalog: Catalog, choose_variant: ChooseVariant
) -> Iterator[ImportedFile]:
    """Import files. They stay where they are. Textual inversions, which are small, are read at once.

    Raises StorageError, UnreadableFileError if the library cannot be written. What was yielded before is imported.
    """
    left = iter(candidates)
    while batch := list(itertools.islice(left, BATCH)):
        yield from _Batch(catalog, choose_variant).imported(batch)


BATCH = 50
"""Files after which the list is written."""


class _Batch:
    """Some files that are imported together."""

    def __init__(self, catalog: Catalog, choose_variant: ChooseVariant) -> None:
        self._catalog, self._choose_variant = catalog, choose_variant
        cards = [*catalog.library.cards(), *catalog.adapters.cards()]
        self._known = {os.path.realpath(card.path): card for card in cards}
        self._moved = {(card.files[0][1:]): card for card in cards if not card.digest and card.state() == "gone"}

    def imported(self, batch: Sequence[Candidate]) -> list[ImportedFile]:
        """Import the files, and return what became of each."""
        found = [self._one(candidate) for candidate in batch]
        library = self._catalog.library
        with library_lock(library.root):
            # Another process may have chosen the same names meanwhile.
            cards = [*library.cards(), *self._catalog.adapters.cards()]
            taken = _Names(cards)
            named: list[ImportedFile] = []
            unread: list[UnreadFile] = []
            for result, entry, wanted in found:
                if entry is None:
                    named.append(result)
                    continue
                own = next((card for card in cards if str(card.path) == entry.path or card is result.replaces), None)
                name = own.name if own is not None else taken.choose(wanted, result.path)
                unread.append(replace(entry, name=name))
                named.append(replace(result, name=name))
                if result.replaces is not None:
                    library.unread.forget(result.replaces.path)
            if unread:
                library.unread.add(unread)
        return [self._inversion(one, wanted) for one, (_, _, wanted) in zip(named, found, strict=True)]

    def _one(self, candidate: Candidate) -> tuple[ImportedFile, UnreadFile | None, str]:
        """Return what becomes of a file, its entry for the list if it gets one, and the name that its program has."""
        path = Path(os.path.normpath(candidate.found.path.absolute()))
        card = self._known.get(os.path.realpath(path))
        if card is not None and not _is_new(card, candidate.found, self._choose_variant):
            base, nbytes = card.summary["base"], card.summary["bytes"]
            note = "" if card.state() == "there" else "its file may have changed; run models verify"
            return ImportedFile(path, "known", card.name, card.kind, base, nbytes, note), None, ""
        try:
            identity = _identify(path, self._choose_variant(candidate.found))
            entry = _unread(path, "", identity, candidate.trigger_words)
        except StorageError:
            raise
        except InputError as error:
            return ImportedFile(path, "refused", note=str(error)), None, ""
        moved = self._moved.get((entry.size, entry.mtime_ns)) if card is None else None
        base = identity.base or ""
        made = ImportedFile(path, "imported", "", identity.kind, base, identity.nbytes, _note(identity), moved)
        return made, None if identity.kind == INVERSION else entry, candidate.name

    def _inversion(self, one: ImportedFile, wanted: str) -> ImportedFile:
        """Read a textual inversion: a prompt needs its vectors. Other files are returned as they are."""
        if one.kind != INVERSION or one.state != "imported":
            return one
        name = _Names(self._catalog.adapters.cards()).choose(wanted, one.path)
        try:
            self._catalog.adapters.add(one.path, name)
        except StorageError:
            raise
        except InputError as error:
            return ImportedFile(one.path, "refused", note=str(error))
        return replace(one, name=name)


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


def _note(identity: Identity) -> str:
    if identity.layout is None or identity.variant is not None:
        return ""
    return "say its variant before its first use: import again with --variant"


def _unread(path: Path, name: str, found: Identity, words: tuple[str, ...]) -> UnreadFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UnreadableFileError(path, f"cannot be read ({error.strerror})") from error
    if found.kind in WEIGHT_ADAPTER_KINDS:
        words = trigger_words.find(path, read_raw_header(path).metadata) or words
    resolution = 0
    if found.layout is not None:
        resolution = found.resolution or native_resolution(found.layout.family, found.prediction_type)
    return UnreadFile(
        name=name,
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
