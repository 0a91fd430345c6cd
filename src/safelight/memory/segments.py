"""Segments: groups of a component's tensors along the architecture's blocks. They are the units of partial loading."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from safelight.memory.plan import Piece
from safelight.weights import slab_views
from safelight.weights.manifest import ComponentManifest, ManifestTensor
from safelight.weights.overlay import OverlaidComponent

PARTS = 32
"""About how many segments a component is split into. More would mean many small reads, fewer would mean large slots."""

ROUNDING = 512
"""Segment sizes are rounded up to a multiple of this, in bytes, as CUDA's allocator does. So the ledger is exact."""

Dtypes = Callable[[list[ManifestTensor]], tuple[torch.dtype, ...]]
"""Returns the dtypes of tensors in memory."""

_BLOCK = re.compile(r"(.*\b(?:resnets|attentions|transformer_blocks|layers|downsamplers|upsamplers)\.\d+)\.")


@dataclass(frozen=True, eq=False)
class Segment:
    """A group of a component's tensors in one slab.

    ``label``: names its blocks.
    ``dtypes``: of the tensors.
    ``piece``: the planner's view.
    """

    label: str
    dtypes: tuple[torch.dtype, ...]
    tensors: tuple[ManifestTensor, ...]
    piece: Piece

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes


def component_key(component: ComponentManifest, dtype: torch.dtype) -> str:
    """Return the planner's name of a component in a dtype.

    It consists of role, digest and dtype of the underlying component, followed by ``quantised`` if its quantised
    tensors stay so, and by the digest of its overlays if it has any.
    """
    return _underlying_key(component, dtype, QUANTISED) + _overlay_key(component)


def piece_keys(component: ComponentManifest, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the keys of a component's pieces: its own, that of what it shares, and that of what is widened."""
    return tuple(dict.fromkeys(segment.piece.component_key for segment in split_into_segments(component, dtype)))


QUANTISED, WIDENED = " quantised", " dequantised"


def _underlying_key(component: ComponentManifest, dtype: torch.dtype, form: str) -> str:
    name = f"{component.role} {component.digest[:16]} {str(dtype).removeprefix('torch.')}"
    return name + form if component.compact else name


def has_overlays(key: str) -> bool:
    """Return whether a key is that of a component with overlays, and not of what it shares."""
    return _OVERLAY in key


_OVERLAY = " +"


def _overlay_key(component: ComponentManifest) -> str:
    return f"{_OVERLAY}{component.overlay_digest[:16]}" if isinstance(component, OverlaidComponent) else ""


@lru_cache(maxsize=64)
def split_into_segments(component: ComponentManifest, dtype: torch.dtype) -> tuple[Segment, ...]:
    """Split a component into segments, in the order in which a forward pass uses them.

    Segments that arrive without an overlay are shared with the underlying component. Tensors of one leaf module stay
    together. A segment has at most 1/32 of the component's bytes, or those of the component's largest leaf module if
    that is more. Larger blocks are split, and smaller neighbours are merged.
    """

    dtypes = partial(slab_views.dtypes_of, component, dtype=dtype, stays_compact=component.stays_compact)
    # A widened tensor is not quantised in memory. The limits between segments do not depend on it, so that segments
    # stay when there is more room or less.
    underlying_dtypes = partial(slab_views.dtypes_of, component, dtype=dtype, stays_compact=component.can_stay_compact)

    def nbytes(tensors: list[ManifestTensor], dtypes: Dtypes = underlying_dtypes) -> int:
        exact = slab_views.bytes_needed(tensors, dtypes(tensors))
        return -(-exact // ROUNDING) * ROUNDING

    leaves = [list(group) for _, group in itertools.groupby(component.tensors, lambda t: t.name.rpartition(".")[0])]
    blocks = [list(group) for _, group in itertools.groupby(component.tensors, lambda t: _block(t.name))]
    most = max(nbytes(list(component.tensors)) // PARTS, *(nbytes(leaf) for leaf in leaves))
    runs: list[list[ManifestTensor]] = []
    for block in blocks:
        if nbytes(block) <= most:
            runs.append(block)
        else:
            runs += [list(group) for _, group in itertools.groupby(block, lambda t: t.name.rpartition(".")[0])]
    parts: list[list[ManifestTensor]] = []
    for run in runs:
        if parts and nbytes(parts[-1]) + nbytes(run) <= most:
            parts[-1] = parts[-1] + run
        else:
            parts.append(run)

    def key(part: list[ManifestTensor]) -> str:
        widened = any(tensor.name in component.widened for tensor in part)
        own = isinstance(component, OverlaidComponent) and any(map(component.arrives_with_overlay, part))
        underlying = _underlying_key(component, dtype, WIDENED if widened else QUANTISED)
        return underlying + _overlay_key(component) if own else underlying

    return tuple(
        Segment(_label(component.role, part), dtypes(part), tuple(part), Piece(key(part), index, nbytes(part, dtypes)))
        for index, part in enumerate(parts)
    )


def widened_bytes(component: ComponentManifest, segment: Segment, dtype: torch.dtype) -> int:
    """Return the bytes of a segment if all its tensors were dequantised."""
    dtypes = slab_views.dtypes_of(component, segment.tensors, dtype, stays_compact=lambda _: False)
    return -(-slab_views.bytes_needed(segment.tensors, dtypes) // ROUNDING) * ROUNDING


def needed_segments(component: ComponentManifest, dtype: torch.dtype, unread: Collection[str]) -> tuple[Segment, ...]:
    """Return the segments of a component that have any tensor besides ``unread``, in the order of use."""
    segments = split_into_segments(component, dtype)
    return tuple(segment for segment in segments if any(tensor.name not in unread for tensor in segment.tensors))


@lru_cache(maxsize=64)
def index_tensors(component: ComponentManifest, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, torch.Size]]:
    """Each tensor's segment index and shape, by name. The result is cached: do not modify it."""
    segments = split_into_segments(component, dtype)
    return (
        {t.name: segment.piece.index for segment in segments for t in segment.tensors},
        {t.name: torch.Size(t.shape) for t in component.tensors},
    )


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found[1] if found else name.partition(".")[0]


def _label(role: str, tensors: list[ManifestTensor]) -> str:
    first, last = _block(tensors[0].name), _block(tensors[-1].name)
    return f"{role} {first}" if first == last else f"{role} {first} to {last}"
