"""Cards: the summary of a model or adapter that listings show (``safelight models list``, the page), without its
tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight import names
from safelight.catalog import paths
from safelight.catalog.model import Adapter, Model
from safelight.errors import InputError, ModelNotFoundError


@dataclass(frozen=True, slots=True)
class Card:
    """A model or adapter without its tensors.

    ``record_path``: the file of its record; for a starter, the path of the model or adapter itself.
    ``summary``: the values that ``--json`` prints.
    ``files``: (path, size in bytes, modification time in nanoseconds) of its files, to notice changes.
    ``components``: (role, digest) of each component.
    ``vectors``: shapes of a textual inversion's tensors, by name; None for all other kinds.
    ``problem``: why the record cannot be read; "" if it can.
    """

    name: str
    record_path: Path
    summary: Mapping[str, Any]
    files: tuple[tuple[str, int, int], ...] = ()
    components: tuple[tuple[str, str], ...] = ()
    vectors: Mapping[str, tuple[int, ...]] | None = None
    problem: str = ""

    @property
    def path(self) -> Path:
        return Path(self.summary["path"])

    @property
    def stem(self) -> str:
        """The name of its file without the suffix. Prompts of other programs use it."""
        folder = str(self.summary["format"]).startswith("diffusers")
        return names.canonical(self.path.name if folder else self.path.stem)

    @property
    def kind(self) -> str:
        return self.summary["kind"]

    @property
    def digest(self) -> str:
        return self.summary["digest"]

    def own_bytes(self) -> int | None:
        """Return the size of its own file, without those of its components from elsewhere; None for a folder."""
        return next((size for path, size, _ in self.files if path == self.summary["path"]), None)

    def state(self) -> str:
        """Return ``there``, ``changed`` or ``gone``, from the present sizes and times of its files."""
        for path, size, mtime_ns in self.files:
            try:
                status = os.stat(path)
            except OSError:
                return "gone"
            if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                return "changed"
        return "there"


def card(record: Path, found: Model | Adapter) -> Card:
    """Return the card of a record."""
    stamps = tuple((str(stamp.path), stamp.size, stamp.mtime_ns) for stamp in found.manifest.files)
    vectors = None
    if isinstance(found, Adapter) and found.kind == "textual_inversion":
        vectors = {tensor.name: tensor.shape for tensor in found.component.tensors}
    components = tuple((component.role, component.digest) for component in found.manifest.components)
    return Card(found.name, record, found.summary(), stamps, components, vectors)


def find_card(cards: Sequence[Card], root: Path, name: str, what: str = "model") -> Card:
    """Return the card of a name, of a digest, or the only one of the user's own whose file has this name.

    ``cards``: of all models or adapters. ``root``: the library's.
    Raises ModelNotFoundError, which lists the nearest names.
    """
    wanted = names.canonical(name)
    fitting = [card for card in cards if card.name == wanted][:1]
    if not fitting and paths.is_digest(name):
        fitting = [card for card in cards if card.digest == name][:1]
    # Prompts of other programs contain file names.
    fitting = fitting or [card for card in cards if card.stem == wanted and card.record_path.is_relative_to(root)]
    if len(fitting) != 1:
        raise ModelNotFoundError(name, paths.similar_names(name, (card.name for card in cards)), what)
    return fitting[0]


def not_own(card: Card, name: str, participle: str) -> InputError:
    """Return the error for a card that has no record of the user's own, or has another name.

    ``participle``: what cannot be done, such as ``renamed``.
    """
    if card.summary["origin"] == "starter":
        problem = f"is a starter and part of the installation, so it cannot be {participle}"
        return InputError(f"{card.name!r} {problem}")
    kind = "a model" if card.kind == "checkpoint" else "an adapter"
    return InputError(f"{name!r} is the file name of {kind}; use its name, {card.name!r}")
