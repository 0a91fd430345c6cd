"""How far it is from a job to the modules that compute: each call between is one to read."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import safelight
from safelight.workers.local_engine import LocalEngine

MOST = 10
"""Frames of ours from LocalEngine.run to a forward pass."""

OURS = str(Path(safelight.__file__).parent)


def test_a_job_is_few_frames_from_the_text_encoder_and_the_denoiser(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: dict[str, list[str]] = {}
    original = nn.Module.__call__

    def call(self: nn.Module, *arguments: Any, **more: Any) -> Any:
        name = type(self).__name__
        if name not in stacks:
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(OURS)]
            names = [frame.name for frame in frames]
            # Skeletons call a module once when they are built.
            if "_images" in names and "build" not in names:
                stacks[name] = names[names.index("_images") :]
        return original(self, *arguments, **more)

    monkeypatch.setattr(nn.Module, "__call__", call)
    next(engine.generate(safelight.Request("red apple", "starter-noto", steps=1)))
    for name in ("CLIPTextModel", "UNet2DConditionModel"):
        assert len(stacks[name]) <= MOST, (name, stacks[name])
