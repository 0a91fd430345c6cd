"""Overlays: tensors that are computed from weights and used in their place. The weights themselves are never written.

A component with overlays is a separate component, identified by the content of the underlying component and of the
overlays. The device that computes with a weight also computes its overlay:

- when the weight's segment arrives there. Such segments are cached and evicted like all others.
- when an operation uses the weight, if it stays quantised in memory.

Segments that arrive without an overlay are shared with the underlying component. To remove an adapter, use the
underlying component again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from safelight.weights.manifest import ComponentManifest, ManifestTensor

Overlay = Callable[[torch.Tensor], None]
"""Overwrites a copy of a weight by the tensor that is used in its place. The copy has the weight's numbers before."""

Bring = Callable[[str, torch.Tensor], torch.Tensor]
"""Returns a tensor of host memory on the device that computes the overlays. The text names its content."""


def _nothing() -> None:
    """Overlays that hold no memory have nothing to adapt."""


@dataclass(frozen=True, slots=True)
class OpenedOverlays:
    """Overlays whose sources are open.

    ``by_name``: by the name of their weight.
    ``follow_budget``: adapts the memory that the sources use to the machine's current limits. Sources that are in use
    are left for a later call, so nobody waits for them.
    """

    by_name: Mapping[str, Overlay]
    follow_budget: Callable[[], None] = _nothing

    def apply(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a weight by the tensor that is used in its place. ``name``: that of a weight with an overlay."""
        with torch.no_grad():
            self.by_name[name](tensor)


OpenOverlays = Callable[[Bring], AbstractContextManager[OpenedOverlays]]
"""Opens the sources of the overlays. They stay open within the context."""


def stay(what: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor: overlays are computed in host memory. See :data:`Bring`."""
    del what
    return tensor


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

    @property
    def underlying(self) -> ComponentManifest:
        """The component without overlays."""
        fields = (self.role, self.config, self.tensors, self.digest)
        return ComponentManifest(*fields, tokenizer=self.tokenizer, compact=self.compact, widened=self.widened)

    def arrives_with_overlay(self, tensor: ManifestTensor) -> bool:
        """Return whether a tensor's overlay is computed when it arrives in memory, and not at each use."""
        return tensor.name in self.overlaid_names and not self.stays_compact(tensor)

    @property
    def computes_at_use(self) -> bool:
        """Whether any overlay is computed at each use of its tensor."""
        return any(one.name in self.overlaid_names and self.stays_compact(one) for one in self.tensors)

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
