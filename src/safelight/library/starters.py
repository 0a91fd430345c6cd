"""The starter checkpoints: a read-only part of every library, where the distribution that holds them is installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from safelight.library import records
from safelight.library.index import Card, card
from safelight.library.model import Adapter, Model

PACKAGE = "safelight_starter"


def folder() -> Path | None:
    """Where the starters are, None when they are not installed. Imports nothing."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def adapters() -> tuple[Adapter, ...]:
    """The starter adapters by name."""
    home = folder()
    if home is None:
        return ()
    there = home / "adapters"
    return tuple(records.read_adapter(path, there) for path in sorted(there.glob("*.json")))


@cache
def models() -> tuple[Model, ...]:
    """The starters by name, from the records that were made when they were packed."""
    home = folder()
    if home is None:
        return ()
    return tuple(records.read(path, home) for path in sorted(home.glob("*.json")))


@cache
def cards() -> tuple[Card, ...]:
    """The starters without their tensors."""
    return tuple(card(model.path, model) for model in models())


@cache
def adapter_cards() -> tuple[Card, ...]:
    """The starter adapters without their tensors."""
    return tuple(card(adapter.path, adapter) for adapter in adapters())
