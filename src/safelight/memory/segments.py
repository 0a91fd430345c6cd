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
    over = f" +{component.overlay_digest[:16]}" if isinstance(component, OverlaidComponent) else ""
    return _underlying_key(component, dtype) + over


def _underlying_key(component: ComponentManifest, dtype: torch.dtype) -> str:
    form = " quantised" if component.compact else ""
    return f"{component.role} {component.digest[:16]} {str(dtype).removeprefix('torch.')}{form}"


@lru_cache(maxsize=64)
def split_into_segments(component: ComponentManifest, dtype: torch.dtype) -> tuple[Segment, ...]:
    """Split a component into segments, in the order in which a forward pass uses them.

    Segments without an overlay are shared with the underlying component. Tensors of one leaf module stay together. A
    segment has at most 1/32 of the component's bytes, or those of the component's largest leaf module if that is more.
    Larger blocks are split, and smaller neighbours are merged.
    """

    dtypes = partial(slab_views.dtypes_of, component, dtype=dtype, stays_compact=component.stays_compact)
    # A tensor with an overlay is not quantised in memory. The limits between segments are those of the underlying
    # component nevertheless: it shares segments.
    without_overlays = partial(ComponentManifest.stays_compact, component)
    underlying_dtypes = partial(slab_views.dtypes_of, component, dtype=dtype, stays_compact=without_overlays)

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
    touched = component.overlaid_names if isinstance(component, OverlaidComponent) else frozenset[str]()
    own_key, underlying_key = component_key(component, dtype), _underlying_key(component, dtype)

    def key(part: list[ManifestTensor]) -> str:
        return own_key if any(tensor.name in touched for tensor in part) else underlying_key

    return tuple(
        Segment(_label(component.role, part), dtypes(part), tuple(part), Piece(key(part), index, nbytes(part, dtypes)))
        for index, part in enumerate(parts)
    )


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
