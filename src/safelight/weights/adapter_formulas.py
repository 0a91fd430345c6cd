"""Computes in fp32 what an adapter adds to a weight: LoRA, LoHa, LoKr, DoRA, and full differences.

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), with convolutions and the Tucker form as in LoCon. LoHa (FedPara,
Hyeon-Woo et al. 2021, arXiv 2108.06098) and LoKr, as LyCORIS (arXiv 2309.14859) computes them. DoRA, Liu et al. 2024
(arXiv 2402.09353).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from safelight.extensions import by_reference, extensions
from safelight.weights.adapter_kinds import GROUP, WEIGHT_ADAPTER_KINDS
from safelight.weights.adapter_mapping import WeightChange, rank

Tensors = Mapping[str, torch.Tensor]
"""An adapter's tensors by slot, which is their role in the formula (``down``, ``up``, …); fp32."""


def difference(change: WeightChange, slots: Tensors, weight: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Compute what ``change`` adds to ``weight`` at strength 1, as a new tensor of the weight's shape, fp32.

    ``weight``: fp32; only DoRA and formulas of packages read its values.
    ``scale``: factor of the product if the adapter has no alpha; None for 1.
    """
    if WEIGHT_ADAPTER_KINDS.get(change.kind) is not None:
        return _by_package(change.kind, slots, weight)
    added = _rows(change, _product(change, slots)).reshape(weight.shape)
    added = added * _scale(change, slots, scale)
    # DoRA's magnitude is one number per output row (PEFT, new LyCORIS) or per input column (old LyCORIS).
    magnitude, per_output_row = slots.get("magnitude"), True
    if magnitude is None:
        magnitude = slots.get("dora_scale")
        per_output_row = magnitude is not None and _rows(change, magnitude).shape[:1] == weight.shape[:1]
    if magnitude is None:
        return added
    if per_output_row:
        magnitude = _rows(change, magnitude)
    whole = weight + added
    return whole * (_shaped(magnitude, weight, per_output_row) / _norm(whole, per_output_row)) - weight


@dataclass(frozen=True, slots=True)
class AppliedChange:
    """A change with its tensors, times ``strength``. ``scale``: see :func:`difference`."""

    change: WeightChange
    slots: Tensors
    strength: float
    scale: float | None = None


@contextmanager
def changing(weight: torch.Tensor, reads: bool) -> Generator[Callable[[AppliedChange], None]]:
    """Yield a function that adds a change to a copy of a weight. The sum is rounded once, when the context ends.

    ``weight``: any dtype, contiguous.
    ``reads``: whether any change depends on the weight's values (:func:`reads_weight`).
    """
    wide = weight.float()
    total = wide.clone() if wide is weight or reads else wide

    def add(one: AppliedChange) -> None:
        if is_low_rank(one.change.kind, one.slots):
            up, down = _pair(one)
            total.view(up.shape[0], down.shape[1]).addmm_(up, down, alpha=_factor_of(one))
        else:
            total.add_(difference(one.change, one.slots, wide, one.scale), alpha=one.strength)

    yield add
    weight.copy_(total)


def is_low_rank(kind: str, slots: Collection[str]) -> bool:
    """Return whether a change is a plain LoRA, whose product can be added to a part of the rows at a time.

    ``slots``: the names of the adapter's tensors.
    """
    return kind == "lora" and {"down", "up", "alpha"}.issuperset(slots)


CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS = 1 << 20, 1 << 23
"""Numbers of a weight that are in fp32 at a time while products are added, on the CPU and elsewhere.

A chunk stays in the CPU's caches. A GPU needs larger ones to be busy.
"""


def add_products(weight: torch.Tensor, applied: Sequence[AppliedChange]) -> None:
    """Add the products of plain LoRAs, a few rows at a time, because memory for the whole in fp32 takes longest."""
    pairs = [(*_pair(one), _factor_of(one)) for one in applied]
    rows = weight.view(weight.shape[0], -1)
    chunk = CHUNK_ELEMENTS if weight.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    count = max(1, chunk // max(1, rows.shape[1]))
    wide = torch.empty((min(count, rows.shape[0]), rows.shape[1]), dtype=torch.float32, device=weight.device)
    for first in range(0, rows.shape[0], count):
        part = rows[first : first + count]
        total = wide[: part.shape[0]]
        total.copy_(part)
        for up, down, factor in pairs:
            total.addmm_(up[first : first + count], down, alpha=factor)
        part.copy_(total)


def _pair(one: AppliedChange) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices of a plain LoRA: (rows, rank) and (rank, columns)."""
    return _rows(one.change, one.slots["up"]).flatten(1), one.slots["down"].flatten(1)


def _factor_of(one: AppliedChange) -> float:
    return one.strength * _scale(one.change, one.slots, one.scale)


def _rows(change: WeightChange, values: torch.Tensor) -> torch.Tensor:
    """Return the rows that are the target's, of a tensor with the rows that the adapter's module has."""
    if change.rows is None:
        return values
    pieces = [values[first : first + count] for first, count in change.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def reads_weight(change: WeightChange) -> bool:
    """Return whether the change's difference depends on the weight's values."""
    return (
        "dora_scale" in change.slots or "magnitude" in change.slots or WEIGHT_ADAPTER_KINDS.get(change.kind) is not None
    )


def _by_package(kind: str, slots: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Compute a difference by a package's formula. Raises ExtensionError if it fails or returns something else."""
    found = WEIGHT_ADAPTER_KINDS[kind]
    assert found is not None
    try:
        made: torch.Tensor = by_reference(found.difference)(slots, weight.clone())
        if made.shape != weight.shape or made.dtype != weight.dtype:
            raise ValueError(f"returned {made.dtype} {list(made.shape)} for a weight of {list(weight.shape)}")
    except Exception as error:
        raise extensions(GROUP).error(kind, error) from error
    return made


def _product(change: WeightChange, slots: Tensors) -> torch.Tensor:
    match change.kind:
        case "diff":
            return slots["diff"] if "diff" in slots else slots["w_norm"]
        case "lora":
            down, up = slots["down"], slots["up"]
            if "mid" in slots:
                down = torch.einsum("mnhw,ni->mihw", slots["mid"], down.flatten(1))
            return up.flatten(1) @ down.flatten(1)
        case "loha":
            return _factor(slots, "hada_w1", "hada_t1") * _factor(slots, "hada_w2", "hada_t2")
        case "lokr":
            first = slots["lokr_w1"] if "lokr_w1" in slots else slots["lokr_w1_a"] @ slots["lokr_w1_b"]
            second = slots["lokr_w2"] if "lokr_w2" in slots else _factor(slots, "lokr_w2", "lokr_t2")
            return torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second.contiguous())
        case other:
            raise ValueError(other)


def _factor(slots: Tensors, name: str, core: str) -> torch.Tensor:
    a, b = slots[f"{name}_a"], slots[f"{name}_b"]
    if core not in slots:
        return (a.flatten(1) @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])
    return torch.einsum("ijkl,jr,ip->prkl", slots[core], b, a)


def _scale(change: WeightChange, slots: Tensors, scale: float | None) -> float:
    """Return alpha divided by the rank, ``scale`` if there is no alpha, and 1 if the kind has no rank."""
    shapes = {slot: tuple(tensor.shape) for slot, tensor in slots.items()}
    dimension = rank(change.kind, shapes)
    if not dimension:
        return 1.0
    if "alpha" in slots:
        return float(slots["alpha"].reshape(-1)[0]) / dimension
    return 1.0 if scale is None else scale


def _shaped(magnitude: torch.Tensor, weight: torch.Tensor, per_output_row: bool) -> torch.Tensor:
    ones = (1,) * (weight.ndim - 2)
    return magnitude.reshape(-1, 1, *ones) if per_output_row else magnitude.reshape(1, -1, *ones)


def _norm(whole: torch.Tensor, per_output_row: bool) -> torch.Tensor:
    axes = tuple(axis for axis in range(whole.ndim) if axis != (0 if per_output_row else 1))
    return torch.linalg.vector_norm(whole, dim=axes, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
