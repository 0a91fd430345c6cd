"""Which components stay quantised in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints
from support.compact_files import write_compact

import safelight
from safelight.memory.plan import Piece
from safelight.memory.planner import Planner
from safelight.memory.segments import Segment, needed_segments, widened_bytes
from safelight.pipeline.compact import _Plan, keep_compact
from safelight.pipeline.resources import dtype_of
from safelight.pipeline.stages import unread_tensors


def test_a_component_stays_quantised_where_it_would_not_fit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints.write_single(tmp_path / "tiny.safetensors", "sd1", seed=5)
    tensors = {name: one for name, one in load_file(path).items() if one.is_floating_point()}
    compact, _ = write_compact(tmp_path / "compact.safetensors", tensors, "Q8_0")
    engine: Any = safelight.open_engine(root)
    model, plain = engine.library.add(compact), engine.library.add(path)
    resources = engine.resources_for(model, "fp32")
    assert keep_compact(model, resources).manifest == model.manifest

    sizes: dict[str, int] = {}
    for one in model.manifest.components:
        dtype = dtype_of(resources.run_settings, model.family, one.role)
        sizes[one.role] = sum(segment.nbytes for segment in needed_segments(one, dtype, frozenset()))
    largest = max(sizes, key=lambda role: sizes[role])
    monkeypatch.setattr(Planner, "most_weight_bytes", lambda *_: sizes[largest] - 1)
    kept = keep_compact(model, resources)
    assert {one.role for one in kept.manifest.components if one.compact} == {largest}
    said = {key.split()[0]: why.partition(":")[0] for key, why in engine.memory()["forms"].items()}
    assert said == {role: "quantised" if role == largest else "dequantised" for role in sizes}
    assert kept.digest == model.digest

    monkeypatch.setattr(Planner, "most_weight_bytes", lambda *_: 0)
    assert all(one.compact for one in keep_compact(model, resources).manifest.components)
    assert not any(one.compact for one in keep_compact(plain, resources).manifest.components)


@pytest.fixture
def compact(tmp_path: Path) -> Path:
    """Return a quantised checkpoint of Stable Diffusion."""
    path = checkpoints.write_single(tmp_path / "tiny.safetensors", "sd1", seed=5)
    tensors = {name: one for name, one in load_file(path).items() if one.is_floating_point()}
    return write_compact(tmp_path / "compact.safetensors", tensors, "Q8_0")[0]


def unet_segments(model: Any) -> tuple[Segment, ...]:
    return needed_segments(model.manifest.component("unet"), torch.float32, frozenset())


def room_for(engine: Any, model: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the bytes that suffice for all components, quantised, and for ``count`` dequantised segments.

    There is room to dequantise a weight, too.
    """
    resources = engine.resources_for(model, "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "most_weight_bytes", lambda *_: 0)
        kept = keep_compact(model, resources)
    total = 0
    for one in kept.manifest.components:
        dtype = dtype_of(resources.run_settings, model.family, one.role)
        total += sum(segment.nbytes for segment in needed_segments(one, dtype, unread_tensors(model, one)))
    planner = resources.residency.planner
    total += max(planner.dequantised_bytes(one, torch.float32) for one in kept.manifest.components)
    unet = kept.manifest.component("unet")
    return total + sum(
        widened_bytes(unet, segment, torch.float32) - segment.nbytes for segment in unet_segments(kept)[:count]
    )


def test_segments_are_dequantised_as_far_as_there_is_room(
    root: Path, compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more room, only the pieces of further segments change. Pixels do not."""
    engine: Any = safelight.open_engine(root)
    model = engine.library.add(compact, "a")
    resources = engine.resources_for(model, "fp32")
    request = safelight.Request("an apple", "a", steps=2, width=64, height=64, precision="fp32")
    right = next(engine.generate(request)).pixels_sha256
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "most_weight_bytes", lambda *_: 0)
        all_of_them = len(unet_segments(keep_compact(model, resources)))
    before = set[Piece]()
    for count in (0, 1, 2, 7, all_of_them):
        most = room_for(engine, model, count, monkeypatch)
        with monkeypatch.context() as patch:
            # The components alone would fit.
            patch.setattr(_Plan, "of", as_if_too_large(_Plan.of))
            patch.setattr(Planner, "most_weight_bytes", lambda *_, most=most: most)
            kept = keep_compact(model, resources)
            assert next(engine.generate(request)).pixels_sha256 == right
        pieces = {segment.piece for segment in unet_segments(kept)}
        wide = {piece for piece in pieces if piece.component_key.endswith(" dequantised")}
        assert {piece.index for piece in wide} == set(range(count))
        assert len(before - pieces) <= count
        said = engine.memory()["forms"][f"unet {model.manifest.component('unet').digest[:16]}"]
        assert (f"quantised, but {count} of its {all_of_them} segments dequantised" in said) == (count > 0), said
        before = pieces
        [place] = engine.memory()["places"].values()
        assert place["stored"] <= place["budget"]
        resident = {one["component"]: one["nbytes"] for one in place["resident"]}
        # What was quantised there before is evicted when something else needs the memory.
        found = sum(size for name, size in resident.items() if name.startswith("unet") and " dequantised" in name)
        assert found == sum(piece.nbytes for piece in wide)


def as_if_too_large(of: Any) -> Any:
    def too_large(component: Any, *given: Any) -> _Plan:
        made = of(component, *given)
        kept = replace(component, compact=True)
        segments = needed_segments(kept, made.dtype, unread_tensors(given[0], kept))
        return replace(made, component=kept, segments=segments)

    return staticmethod(too_large)


def test_other_components_come_before_dequantised_segments(
    root: Path, compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = safelight.open_engine(root)
    model = engine.library.add(compact, "a")
    resources = engine.resources_for(model, "fp32")
    most = room_for(engine, model, 0, monkeypatch) + 100
    monkeypatch.setattr(_Plan, "of", as_if_too_large(_Plan.of))
    monkeypatch.setattr(Planner, "most_weight_bytes", lambda *_: most)
    assert all(not one.widened for one in keep_compact(model, resources).manifest.components)


def test_the_limit_is_the_setting_or_the_free_memory(root: Path) -> None:
    planner = safelight.open_engine(root, max_cache_ram_gb=0.5).resources.residency.planner  # type: ignore[attr-defined]
    assert planner.most_weight_bytes(1000) == 2**29
    planner = safelight.open_engine(root).resources.residency.planner  # type: ignore[attr-defined]
    assert planner.most_weight_bytes(1000) == planner.ledger.budget(planner.place) - 1000
