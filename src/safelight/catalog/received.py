"""Stores the records of models and adapters that another machine has identified. No torch."""

from __future__ import annotations

from safelight.catalog import records
from safelight.catalog.catalog import Catalog
from safelight.catalog.lock import library_lock
from safelight.catalog.model import Adapter, Model
from safelight.catalog.quarantine import Quarantine
from safelight.names import file_stem


def take_over(catalog: Catalog, owner: Model | Adapter) -> None:
    """Store a record in place of one of its name. The model's quarantine ends."""
    root = catalog.library.root
    with library_lock(root):
        if isinstance(owner, Model):
            catalog.library.records.replace(owner)
            Quarantine(root).end(owner)
        else:
            records.write(root / "adapters" / f"{file_stem(owner.name)}.json", owner)
            catalog.adapters.index.invalidate()
