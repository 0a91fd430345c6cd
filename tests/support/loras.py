"""Weights into which LoRAs and their relatives are merged: by Safelight, and by diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from safelight.families.components import Config
from safelight.families.registry import family
from safelight.weights.adapter_formulas import AppliedChange, add_products, changing, is_low_rank, reads_weight
from safelight.weights.adapter_mapping import AdapterMatch, match_adapter, modules_by_name

Tensors = dict[str, torch.Tensor]
Weights = dict[str, Tensors]
"""The tensors of each component, by role."""


def matched(base: str, configs: Mapping[str, Config], tensors: Tensors) -> AdapterMatch:
    """What an adapter changes in a checkpoint with these settings."""
    known = modules_by_name((family(base).component(role), config.rows()) for role, config in configs.items())
    return match_adapter({name: tuple(tensor.shape) for name, tensor in tensors.items()}, known)


def merged(base: str, configs: Mapping[str, Config], weights: Weights, tensors: Tensors, strength: float) -> Weights:
    """The changed weights, by Safelight. Every tensor of the adapter must be used."""
    found = matched(base, configs, tensors)
    assert (found.unknown, found.mismatched) == ((), ())
    out: Weights = {}
    for role, changes in found.changes.items():
        for change in changes:
            slots = {slot: tensors[name].float() for slot, name in change.slots.items()}
            changed = out.setdefault(role, {}).setdefault(change.target, weights[role][change.target].clone())
            add_changes(changed, [AppliedChange(change, slots, strength)])
    return out


def add_changes(weight: torch.Tensor, applied: Sequence[AppliedChange]) -> None:
    """Add the differences of changes to a copy of a weight, in place: in fp32, in their order, rounded once.

    ``weight``: any dtype, contiguous.
    """
    if all(is_low_rank(one.change.kind, one.slots) for one in applied):
        add_products(weight, applied)
        return
    with changing(weight, any(reads_weight(one.change) for one in applied)) as add:
        for one in applied:
            add(one)


def merged_by_diffusers(pipe: Any, tensors: Tensors, strength: float) -> Weights:
    """The changed weights of a pipeline, by ``load_lora_weights`` and ``fuse_lora``."""
    roles = [role for role in pipe._lora_loadable_modules if getattr(pipe, role, None) is not None]
    before = {role: {n: t.clone() for n, t in getattr(pipe, role).state_dict().items()} for role in roles}
    prefixes = tuple(f"{role}." for role in roles)
    converted = pipe.lora_state_dict(dict(tensors))
    if not all(name.startswith(prefixes) for name in converted):
        # Its converters forget the prefix of some modules, which ``load_lora_weights`` then leaves out without a word.
        tensors = {name if name.startswith(prefixes) else f"transformer.{name}": t for name, t in converted.items()}
    pipe.load_lora_weights(dict(tensors), adapter_name="one")
    pipe.fuse_lora(lora_scale=strength, adapter_names=["one"])
    pipe.unload_lora_weights()
    after = {role: getattr(pipe, role).state_dict() for role in roles}
    return {
        role: found
        for role in roles
        if (found := {n: t for n, t in after[role].items() if not torch.equal(t, before[role][n])})
    }


def assert_same(ours: Weights, theirs: Weights) -> None:
    """Assert that two mergers changed the same tensors, and that their values differ by no more than the rounding."""
    assert {role: sorted(some) for role, some in ours.items()} == {role: sorted(some) for role, some in theirs.items()}
    for role, some in ours.items():
        for name, tensor in some.items():
            torch.testing.assert_close(tensor, theirs[role][name], rtol=2e-6, atol=2e-6, msg=f"{role}.{name}")
