"""The starter checkpoints. They are a read-only part of every library if their distribution is installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from safelight.catalog import records
from safelight.catalog.cards import Card, card
from safelight.catalog.model import Adapter, Model

PACKAGE = "safelight_starter"


def folder() -> Path | None:
    """Return the folder of the starters, None if they are not installed. Imports nothing."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def adapters() -> tuple[Adapter, ...]:
    """Return the starter adapters, sorted by name."""
    home = folder()
    if home is None:
        return ()
    there = home / "adapters"
    return tuple(records.read_adapter(path, there) for path in sorted(there.glob("*.json")))


@cache
def models() -> tuple[Model, ...]:
    """Return the starter models, sorted by name, from the records in their distribution."""
    home = folder()
    if home is None:
        return ()
    return tuple(records.read(path, home) for path in sorted(home.glob("*.json")))


def model(name: str) -> Model | None:
    """Return the starter of a name, None if there is none."""
    return next((found for found in models() if found.name == name), None)


@cache
def cards() -> tuple[Card, ...]:
    """Return the cards of the starter models."""
    return tuple(card(one.path, one) for one in models())


@cache
def adapter_cards() -> tuple[Card, ...]:
    """Return the cards of the starter adapters."""
    return tuple(card(adapter.path, adapter) for adapter in adapters())
