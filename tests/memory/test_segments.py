"""Segments: every tensor once, in the order of use, about as large as each other, along the blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support import memory

from safelight.devices.base import ALIGNMENT
from safelight.families.components import Config
from safelight.memory.segments import PARTS, ROUNDING, component_key, split_into_segments


@dataclass(frozen=True, slots=True)
class WideNorms(Config):
    """The settings of a component with a tensor that stays in fp32."""

    name: str

    def keeps_fp32(self, name: str) -> bool:
        return name == self.name


@pytest.mark.parametrize("name", ["a", "v2", "xl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_once_and_in_order(tiny: Path, name: str, dtype: torch.dtype) -> None:
    for component in memory.manifest(tiny / f"{name}.safetensors").components:
        segments = split_into_segments(component, dtype)
        assert [t.name for segment in segments for t in segment.tensors] == [t.name for t in component.tensors]
        assert [segment.piece.index for segment in segments] == list(range(len(segments)))
        assert {segment.piece.component_key for segment in segments} == {component_key(component, dtype)}
        assert all(segment.nbytes % ROUNDING == 0 for segment in segments)
        assert ROUNDING % ALIGNMENT == 0


def test_no_segment_is_larger_than_it_must_be(tiny: Path) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    segments = split_into_segments(component, torch.float32)
    total = sum(segment.nbytes for segment in segments)
    largest = max(t.nbytes for t in component.tensors)
    assert max(segment.nbytes for segment in segments) <= max(total // PARTS, largest * 1.05 + 2 * ROUNDING)
    assert len(segments) <= 2.5 * PARTS


def test_a_leaf_module_is_never_cut_and_labels_name_blocks(tiny: Path) -> None:
    component = memory.manifest(tiny / "xl.safetensors").component("unet")
    where: dict[str, int] = {}
    for segment in split_into_segments(component, torch.float32):
        assert segment.label.startswith("unet ")
        for tensor in segment.tensors:
            leaf = tensor.name.rpartition(".")[0]
            assert where.setdefault(leaf, segment.piece.index) == segment.piece.index


def test_dtypes_are_other_components_to_the_planner(tiny: Path) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("vae")
    assert component_key(component, torch.float32) != component_key(component, torch.bfloat16)


def test_tensors_that_stay_in_fp32_have_room_for_it(tiny: Path) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("vae")
    plain = split_into_segments(component, torch.bfloat16)
    wide = split_into_segments(replace(component, config=WideNorms(component.tensors[0].name)), torch.bfloat16)
    dtypes = {t.name: dtype for s in wide for t, dtype in zip(s.tensors, s.dtypes, strict=True)}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {component.tensors[0].name}
    assert {dtype for segment in plain for dtype in segment.dtypes} == {torch.bfloat16}
    assert sum(segment.nbytes for segment in wide) > sum(segment.nbytes for segment in plain)
