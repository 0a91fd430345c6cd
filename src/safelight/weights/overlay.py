"""Overlays: tensors that are computed from weights and used in their place. The weights themselves are never written.

A component with overlays is a separate component, identified by the content of the underlying component and of the
overlays. Its segments are computed from the underlying component's bytes when they are needed, and cached and evicted
like all others. Segments without an overlay are shared with the underlying component. To remove an adapter, use the
underlying component again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from safelight.errors import BindingError
from safelight.weights.manifest import ComponentManifest, ManifestTensor


@dataclass(frozen=True, eq=False)
class Overlay:
    """``function`` computes a new tensor of a weight's shape and dtype, and must not change the weight."""

    function: Callable[[torch.Tensor], torch.Tensor]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Compute the new tensor. Raises BindingError if its shape, dtype or device differs from the weight's."""
        new = self.function(weight)
        if new.shape != weight.shape or new.dtype != weight.dtype or new.device != weight.device:
            raise BindingError(
                f"an overlay gave {new.dtype} {list(new.shape)} for a weight of {weight.dtype} {list(weight.shape)}"
            )
        return new if new.untyped_storage() is not weight.untyped_storage() else new.clone()


OpenOverlays = Callable[[], AbstractContextManager[Mapping[str, Overlay]]]
"""Opens the sources of the overlays, and yields the overlays by the name of their weight."""


@dataclass(frozen=True, slots=True, eq=False)
class OverlaidComponent(ComponentManifest):
    """A component with overlays. The inherited fields, also ``digest``, are those of the underlying component.

    ``overlay_digest``: the overlays' content hash (BLAKE3, hex), strengths included.
    ``overlaid_names``: names of the tensors with an overlay.
    ``open_overlays``: opens the overlays.
    ``working_bytes``: bytes needed to compute one overlaid tensor.
    ``sources``: digests of the components from which the overlays are computed.
    """

    overlay_digest: str
    overlaid_names: frozenset[str]
    open_overlays: OpenOverlays
    working_bytes: int
    sources: tuple[str, ...]

    def stays_compact(self, tensor: ManifestTensor) -> bool:
        """See :class:`ComponentManifest`. A tensor with an overlay is in memory as the overlay computes it."""
        # ``super()`` does not work in a dataclass with slots.
        return ComponentManifest.stays_compact(self, tensor) and tensor.name not in self.overlaid_names

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OverlaidComponent):
            return False
        theirs = other.digest, other.overlay_digest, other.compact, other.widened
        if theirs != (self.digest, self.overlay_digest, self.compact, self.widened):
            return False
        # The same content may be in another file by now.
        return other.tensors == self.tensors

    def __hash__(self) -> int:
        return hash((self.role, self.digest, self.overlay_digest))


def with_overlays(
    component: ComponentManifest,
    overlay_digest: str,
    overlaid_names: frozenset[str],
    open_overlays: OpenOverlays,
    working_bytes: int = 0,
    sources: tuple[str, ...] = (),
) -> OverlaidComponent:
    """Return a component with overlays. Arguments: see :class:`OverlaidComponent`."""
    return OverlaidComponent(
        component.role,
        component.config,
        component.tensors,
        component.digest,
        overlay_digest,
        overlaid_names,
        open_overlays,
        working_bytes,
        sources,
        tokenizer=component.tokenizer,
        compact=component.compact,
        widened=component.widened,
    )


def digests(component: ComponentManifest) -> tuple[str, ...]:
    """Return the digests of a component and of all sources of its overlays."""
    return (component.digest, *component.sources) if isinstance(component, OverlaidComponent) else (component.digest,)
