"""Which components stay quantised in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import checkpoints
from support.compact_files import write_compact

import safelight
from safelight.memory.planner import Planner
from safelight.memory.segments import needed_segments
from safelight.pipeline.compact import keep_compact
from safelight.pipeline.resources import dtype_of


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


def test_the_limit_is_the_setting_or_the_free_memory(root: Path) -> None:
    planner = safelight.open_engine(root, max_cache_ram_gb=0.5).resources.residency.planner  # type: ignore[attr-defined]
    assert planner.most_weight_bytes(1000) == 2**29
    planner = safelight.open_engine(root).resources.residency.planner  # type: ignore[attr-defined]
    assert planner.most_weight_bytes(1000) == planner.ledger.budget(planner.place) - 1000
