"""The models in an engine's memory: loads, pins and unloads them, and says which ones are there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from safelight.catalog.library import Library
from safelight.catalog.model import Model
from safelight.devices.base import free_cache
from safelight.memory.plan import Piece
from safelight.memory.residency import Residency
from safelight.pipeline import components
from safelight.pipeline.compact import keep_compact
from safelight.pipeline.resources import Resources
from safelight.request.run_settings import RunSettings


class LoadedModels:
    """The models in the memory of an engine.

    resources_for: returns the resources of a generation by a model.
    tiers: all residencies of the engine, the host's first.
    turn: held while the device is used.
    """

    def __init__(
        self,
        library: Library,
        resources: Resources,
        resources_for: Callable[[Model], Resources],
        tiers: Sequence[Residency],
        turn: AbstractContextManager[object],
    ) -> None:
        self._library = library
        self._resources = resources
        self._resources_for = resources_for
        self._tiers = tiers
        self._turn = turn
        self._pins: dict[str, ExitStack] = {}
        self._used: dict[str, frozenset[Piece]] = {}

    def mark_used(self, model: Model, settings: RunSettings) -> None:
        """Record that a job uses a model with these run settings. It is now the most recently used one."""
        self._used.pop(model.digest, None)
        compact = keep_compact(model, self._resources, settings)
        self._used[model.digest] = components.needed_pieces(compact, settings)

    def resident(self) -> list[str]:
        """Return the digests of the models that are completely resident on the computing device, the most recently used
        first."""
        used = list(reversed(list(self._used.items())))
        return [digest for digest, pieces in used if self._resources.residency.are_resident(pieces)]

    def prefetch(self, name: str) -> bool:
        """Load as much of a model as free memory allows; evict nothing. Returns whether all of it is resident."""
        model = self._library.find(name)
        with self._turn:
            resources = self._resources_for(model)
            return components.prefetch(keep_compact(model, resources), resources)

    def load(self, model: Model) -> None:
        """Load as much of a model as fits, without making an image; evict other models if necessary."""
        unchanged = self._library.ensure_unchanged(model)
        with self._turn:
            resources = self._resources_for(model)
            components.preload(keep_compact(unchanged, resources), resources)

    def unload(self, digest: str | None) -> None:
        """Evict what no lease holds of one model (``digest``) or of all (None). Clear the text encoders' cache.

        The freed memory is returned to the system, for other programs.
        """
        self._resources.embedding_cache.clear()
        name = next((card.name for card in self._library.cards() if card.digest == digest), None)
        model = None if name is None else self._library.find_by_name(name)
        with self._turn:
            for tier in self._tiers:
                if digest is None:
                    tier.drop()
                elif model is not None:
                    for component in model.manifest.components:
                        tier.drop(component.digest)
                    tier.pool.trim()
            free_cache(self._resources.device)

    def pin(self, name: str) -> None:
        """Load a model and keep it in memory until :meth:`unpin`.

        Raises OutOfMemoryError when the complete model does not fit.
        """
        model = self._library.ensure_unchanged(self._library.find(name))
        self.unpin(name)
        with self._turn:
            resources = self._resources_for(model)
            self._pins[name] = components.pin(keep_compact(model, resources), resources)

    def unpin(self, name: str) -> None:
        """End the pin of a model; do nothing if it is not pinned."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            with self._turn:
                pin.close()

    @contextmanager
    def without_pin(self, name: str) -> Generator[None]:
        """Within the context, a model is not pinned, so that wrong bytes can be evicted. Afterwards it is pinned again.

        Raises OutOfMemoryError as :meth:`pin` does.
        """
        pinned = name in self._pins
        self.unpin(name)
        yield
        if pinned:
            self.pin(name)

    def close(self) -> None:
        """End all pins and evict all models."""
        for name in list(self._pins):
            self.unpin(name)
        with self._turn:
            for tier in self._tiers:
                tier.drop()
            free_cache(self._resources.device)
