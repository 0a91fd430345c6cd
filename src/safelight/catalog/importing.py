"""Imports the models of another program. Only headers are read; weights are read at the first use."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
from safelight.errors import InputError, StorageError, UnsupportedModelError
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
    cards = [*catalog.library.cards(), *catalog.adapters.cards()]
    known = {str(card.path): card for card in cards}
    taken = _Names(card.name for card in cards)
    unread: list[UnreadFile] = []
    try:
        for candidate in candidates:
            path = candidate.found.path.absolute()
            card = known.get(str(path))
            if card is not None and not _is_new(card, candidate.found, choose_variant):
                base, nbytes = card.summary["base"], card.summary["bytes"]
                note = "" if card.state() == "there" else "its file may have changed; run models verify"
                yield ImportedFile(path, "known", card.name, card.kind, base, nbytes, note)
                continue
            try:
                identity = _identify(path, choose_variant(candidate.found))
                name = taken.choose(candidate.name, path) if card is None else card.name
                if identity.kind == INVERSION:
                    catalog.adapters.add(path, name)
                else:
                    unread.append(_unread(path, name, identity, candidate.trigger_words))
            except StorageError:
                raise
            except InputError as error:
                yield ImportedFile(path, "refused", note=str(error))
                continue
            yield ImportedFile(
                path, "imported", name, identity.kind, identity.base or "", identity.nbytes, _note(identity)
            )
    finally:
        if unread:
            with library_lock(catalog.library.root):
                catalog.library.unread.add(unread)


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
    status = os.stat(path)
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

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {name.casefold() for name in taken}

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
