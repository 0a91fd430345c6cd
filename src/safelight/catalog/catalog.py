"""What a user has: models, adapters, input images, and the components of them all, by content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.catalog import starters
from safelight.catalog.adapters import Adapters
from safelight.catalog.cards import Card, find_card
from safelight.catalog.inputs import Inputs
from safelight.catalog.library import Library
from safelight.catalog.model import Adapter, Model
from safelight.errors import FileError
from safelight.weights.manifest import ComponentManifest


@dataclass(frozen=True, slots=True)
class Catalog:
    """Where the contents that a request names are found."""

    library: Library
    adapters: Adapters
    inputs: Inputs

    @classmethod
    def under(cls, root: Path) -> Catalog:
        return cls(Library(root), Adapters(root), Inputs(root))

    def model_card(self, name: str) -> Card:
        """Return the card of a model. Raises ModelNotFoundError, which lists the nearest names."""
        return find_card(self.library.cards(), self.library.root, name)

    def adapter_card(self, name: str) -> Card:
        """Return the card of an adapter. Raises ModelNotFoundError, which lists the nearest names."""
        return find_card(self.adapters.cards(), self.library.root, name, "adapter")

    def cards_with_component(self, digest: str) -> list[Card]:
        """Return the cards of the models and adapters that have a component, by its digest.

        Those in the library come before files that were used by their path.
        """
        cards = (
            *self.library.cards(),
            *self.adapters.cards(),
            *self.library.records.cards_used_by_path(),
            *self.adapters.cards_used_by_path(),
        )
        return [card for card in cards if any(found == digest for _, found in card.components)]

    def component(self, digest: str) -> ComponentManifest | None:
        """Return a component by its digest, from any model or adapter with unchanged files; None if there is none."""
        owner = self.owner(digest)
        return None if owner is None else next(part for part in owner.manifest.components if part.digest == digest)

    def owner(self, digest: str) -> Model | Adapter | None:
        """Return a model or adapter with unchanged files that has a component, by its digest; None if there is none."""
        for owner in self._owners(digest):
            if any(part.digest == digest for part in owner.manifest.components):
                return owner
        return None

    def _owners(self, digest: str) -> Iterator[Model | Adapter]:
        for card in self.cards_with_component(digest):
            if card.state() != "there":
                continue
            owner = self._read(card)
            if isinstance(owner, Model) and self.library.quarantine_reason(owner) is None:
                yield self.library.ensure_unchanged(owner)
            elif isinstance(owner, Adapter):
                yield self.adapters.ensure_unchanged(owner)

    def _read(self, card: Card) -> Model | Adapter | None:
        """Return the model or adapter of a card; None if its record is gone or damaged."""
        starter = next(
            (one for one in (*starters.models(), *starters.adapters()) if one.path == card.record_path), None
        )
        try:
            if starter is not None:
                return starter
            return (
                self.library.records.read(card) if card.kind == "checkpoint" else self.adapters.index.read_record(card)
            )
        except FileError:
            return None
