"""Adds what was downloaded to the library: first what other files need, then models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.catalog.adapters import Adapters
from safelight.catalog.identify import Identity, identify
from safelight.catalog.library import Library
from safelight.errors import InputError, StorageError
from safelight.weights.adapter_file import is_adapter

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Added:
    """What became of a downloaded file.

    ``name``: in the library; "" if it was not added.
    ``kind``: such as ``checkpoint``, ``vae`` or ``lora``.
    ``problem``: why it was not added; "" if it was.
    ``known``: it was in the library before.
    """

    path: Path
    name: str = ""
    kind: str = ""
    problem: str = ""
    known: bool = False


def add(
    paths: Iterable[Path], library: Library, name: str | None = None, variant: str = "", on_bytes: OnBytes | None = None
) -> Iterator[Added]:
    """Add downloaded files. A text encoder or VAE comes before the model that needs it.

    ``name``: of the only model; the file's name by default.
    ``variant``: of models whose files do not say it.
    Raises StorageError. Other errors are in the results, because the other files may be right.
    """
    found: list[tuple[bool, Path, str, str]] = []
    for path in paths:
        try:
            identity = identify(path)
        except InputError as error:
            yield Added(path, problem=str(error))
            continue
        found.append((not is_adapter(identity.kind), path, identity.kind, _variant_for(identity, variant)))
    for is_model, path, kind, wanted in sorted(found):
        try:
            yield _added(path, kind, is_model, library, name, wanted, on_bytes)
        except StorageError:
            raise
        except InputError as error:
            yield Added(path, kind=kind, problem=str(error))


def _added(
    path: Path, kind: str, is_model: bool, library: Library, name: str | None, variant: str, on_bytes: OnBytes | None
) -> Added:
    adapters = Adapters(library.root)
    cards: list[Any] = [*library.cards(), *adapters.cards()]
    known = next((card for card in cards if card.path == path.absolute() and card.state() == "there"), None)
    if known is not None:
        return Added(path, known.name, kind, known=True)
    if not is_model:
        return Added(path, adapters.add(path).name, kind)
    model = library.add(path, name, None, on_bytes, variant)
    return Added(path, model.name, kind)


def _variant_for(found: Identity, variant: str) -> str:
    """Return the variant that the user named, if the file's family has it and the file does not say its own."""
    from safelight.families.registry import families

    family = families().get(found.base or "")
    fits = found.variant is None and family is not None and variant in family.variants
    return variant if fits else ""
