"""What of some bundles is really to be downloaded: not the files that the library has already, whatever their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safelight.catalog.adapters import Adapters
from safelight.catalog.cards import Card
from safelight.catalog.file_hashes import FileHashes
from safelight.catalog.library import Library
from safelight.downloads.remote import Bundle


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is downloaded.

    ``bundles``: the bundles that are missing from the library.
    ``present``: the names of the models and adapters that are in the library already.
    ``title``, ``notes``: what the sources say of all of them.
    """

    bundles: tuple[Bundle, ...]
    present: tuple[str, ...]
    title: str
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int | None:
        """Bytes to download, None if the size of a file is unknown."""
        sizes = [bundle.nbytes for bundle in self.bundles]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @staticmethod
    def of(bundles: Sequence[Bundle], library: Library, hashes: FileHashes) -> Wanted:
        """Return what is to be downloaded. Files of the same size are hashed, if they were not before."""
        cards = [*library.cards(), *Adapters(library.root).cards()]
        found = [(bundle, find_present(bundle, cards, hashes)) for bundle in bundles]
        notes = [note for bundle in bundles for note in bundle.notes]
        notes += [f"{bundle.title}: the library has it as {card.name}" for bundle, card in found if card is not None]
        return Wanted(
            tuple(bundle for bundle, card in found if card is None),
            tuple(card.name for _, card in found if card is not None),
            ", ".join(dict.fromkeys(bundle.title for bundle in bundles)),
            tuple(dict.fromkeys(notes)),
        )


def find_present(bundle: Bundle, cards: Iterable[Card], hashes: FileHashes) -> Card | None:
    """Return the card of a file with the content of a bundle's only one, by size and SHA-256; None if there is none."""
    needed = [one for one in bundle.files if not one.optional]
    if len(needed) != 1 or needed[0].nbytes is None or needed[0].sha256 is None:
        return None
    [file] = needed
    for card in cards:
        if card.own_bytes() == file.nbytes and card.state() == "there":
            found = hashes.of(card.path)
            if found is not None and found.sha256 == file.sha256:
                return card
    return None
