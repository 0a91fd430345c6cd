"""Building, loading and binding in several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from support import checkpoints, memory

from safelight.models.bind import bind
from safelight.models.skeleton import Skeleton, SkeletonCache, SkeletonKey


def test_copy_12_building_a_model_never_meets_a_move(tiny: Path) -> None:
    """One thread builds skeletons on meta while others read, bind and compute: no tensor lands on the wrong side."""
    component = memory.manifest(tiny / "a.safetensors").component("vae")
    key = SkeletonKey("sd1", "vae", component.config, torch.float32, "torch-sdp")
    residency, cache = memory.host(), SkeletonCache()
    configs = checkpoints.configs("sd1")
    latents = torch.ones(1, 4, 8, 8)

    def build(_: int) -> None:
        for role, config in configs.items():
            assert Skeleton(SkeletonKey("sd1", role, config, torch.float32, "torch-sdp")).differences() == []

    def use(_: int) -> torch.Tensor:
        torch.set_num_threads(1)
        with (
            torch.no_grad(),
            residency.lease(component, torch.float32) as lease,
            bind(cache, key, lease) as module,
        ):
            return module.decode(latents).sample  # type: ignore[operator]

    with ThreadPoolExecutor(3) as pool:
        building = [pool.submit(build, n) for n in range(4)]
        used = [pool.submit(use, n) for n in range(8)]
        outputs = [future.result() for future in used]
        for future in building:
            future.result()
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
