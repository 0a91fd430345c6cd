"""Tells adapters for FLUX.1 and Chroma from those for FLUX.2 klein.

Many of their modules have the same names. Some of these have other proportions.
"""

from __future__ import annotations

import math
import re

from safelight.files.header import Header

_BLOCK = re.compile(r"(^|[._])(?P<kind>double|single)(_transformer)?_blocks[._](?P<number>[0-9]{1,3})[._]")

_KLEIN_BLOCKS = {"double": 8, "single": 24}
"""The most blocks of klein, which its larger size has. FLUX.1 and Chroma have 19 and 38."""

_FLUX1_RATIOS, _KLEIN_RATIOS = frozenset({4, 7}), frozenset({6, 9})
"""Rows / columns of ``mlp.0`` and ``linear1``."""

_WIDENING = re.compile(
    r"(?P<module>.*(double_blocks[._][0-9]+[._](img|txt)_mlp[._]0|single_blocks[._][0-9]+[._]linear1))\.(?P<slot>.+)"
)
"""Layers with more rows than columns. Their ratio is one number for all sizes of a family."""

_ROWS = re.compile(r"lora_up\.weight|lora_B(\..+)?\.weight|lokr_w[12](_a)?|hada_w1_a|diff")
_COLUMNS = re.compile(r"lora_down\.weight|lora_A(\..+)?\.weight|lokr_w[12](_b)?|hada_w1_b|diff")


def row_ratios(header: Header) -> frozenset[float]:
    """Return rows / columns of the changed feed-forward layers (``mlp.0``) and fused projections (``linear1``).

    The names are the original's, as they are in kohya's, ai-toolkit's and LyCORIS' files.
    """
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    for name, info in header.tensors.items():
        found = _WIDENING.fullmatch(name)
        if found is None or len(info.shape) < 2:
            continue
        if _ROWS.fullmatch(found["slot"]):
            rows.setdefault(found["module"], []).append(info.shape[0])
        if _COLUMNS.fullmatch(found["slot"]):
            columns.setdefault(found["module"], []).append(info.shape[1])
    return frozenset(math.prod(rows[module]) / math.prod(columns[module]) for module in rows.keys() & columns.keys())


def may_change_flux1(header: Header) -> bool:
    """Return whether an adapter may be for the blocks of FLUX.1 and Chroma, which have the same names and shapes."""
    return any(_BLOCK.search(name) for name in header.tensors) and row_ratios(header) <= _FLUX1_RATIOS


def may_change_klein(header: Header) -> bool:
    """Return whether an adapter may be for the blocks of FLUX.2 klein."""
    blocks = [found for name in header.tensors if (found := _BLOCK.search(name)) is not None]
    within = all(int(found["number"]) < _KLEIN_BLOCKS[found["kind"]] for found in blocks)
    return bool(blocks) and within and row_ratios(header) <= _KLEIN_RATIOS
