"""Tiny random ControlNets for FLUX.1, Z-Image and Qwen-Image, in their published forms."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import flux, memory, qwen_image
from support.checkpoints import random_module
from support.libraries import diffusers
from torch import nn

from safelight.families.family_model import Call, ControlCall, family_model
from safelight.families.flux.controlnet import FluxControlNetConfig
from safelight.families.flux.transformer import FluxConfig
from safelight.families.qwen_image.controlnet import QwenImageControlNetConfig
from safelight.families.qwen_image.transformer import QwenImageConfig
from safelight.families.registry import family
from safelight.families.zimage.controlnet import ZImageControlNetConfig
from safelight.memory.lease import Use
from safelight.models.bind import bind
from safelight.models.skeleton import SkeletonCache, SkeletonKey
from safelight.weights.manifest import ComponentManifest

FLUX_NETS = {
    "latents": (2, 1, 0, False),
    "fewer": (1, 0, 0, False),
    "union": (1, 2, 10, False),
    "pixels": (1, 0, 0, True),
}
"""Double blocks, single blocks, types of pictures, and whether it reads pixels: as InstantX, Shakker Labs and XLabs
publish them."""


def flux_config(form: str) -> FluxControlNetConfig:
    layers, single_layers, modes, pixels = FLUX_NETS[form]
    transformer = flux.configs()["transformer"]
    assert isinstance(transformer, FluxConfig)
    net = replace(transformer, layers=layers, single_layers=single_layers, guidance=form != "fewer")
    return FluxControlNetConfig(net, modes, pixels)


def flux_net(form: str, seed: int = 7) -> nn.Module:
    """A ControlNet with seeded random weights, also where training starts from zero."""
    return random_module("flux", flux_config(form), torch.Generator().manual_seed(seed))


ZIMAGE_NETS = {"1": (16, 1, False), "2.0": (33, 2, True), "2.1": (33, 2, True)}
"""Channels, blocks, and whether the first ones add to the refiner, by version. 2.0 has these blocks and leaves them
out."""


def zimage_config(version: str) -> ZImageControlNetConfig:
    channels, layers, refines = ZIMAGE_NETS[version]
    return ZImageControlNetConfig(channels, 64, layers, 1, 32, refines)


def zimage_net(version: str, seed: int = 7) -> nn.Module:
    """A ControlNet with seeded random weights, also where training starts from zero."""
    module: Any = random_module("z-image", zimage_config(version), torch.Generator().manual_seed(seed))
    if version == "2.0":
        module.control_noise_refiner[0].before_proj.weight.zero_()
    return module


def zimage_net_of_diffusers(version: str) -> Any:
    """The same, as diffusers builds it by its published settings."""
    channels, layers, refines = ZIMAGE_NETS[version]
    adds: Any = {"1": None, "2.0": "control_layers", "2.1": "control_noise_refiner"}[version]
    module = diffusers.ZImageControlNetModel(
        control_layers_places=list(range(layers)),
        control_refiner_layers_places=[0] if refines else [],
        control_in_dim=channels,
        add_control_noise_refiner=adds,
        dim=64,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    ).requires_grad_(False)
    module.load_state_dict({n: t for n, t in zimage_net(version).state_dict().items() if n in module.state_dict()})
    return module.eval()


QWEN_NETS = {"whole": (2, 0), "fewer": (1, 0), "mask": (1, 4)}
"""Blocks, and values of a mask per token: ``mask`` is InstantX's ControlNet for inpainting."""


def qwen_config(form: str) -> QwenImageControlNetConfig:
    layers, mask_inputs = QWEN_NETS[form]
    transformer = qwen_image.configs()["transformer"]
    assert isinstance(transformer, QwenImageConfig)
    return QwenImageControlNetConfig(replace(transformer, layers=layers), mask_inputs)


def qwen_net(form: str, seed: int = 7) -> nn.Module:
    """A ControlNet with seeded random weights, also where training starts from zero."""
    return random_module("qwen-image", qwen_config(form), torch.Generator().manual_seed(seed))


def write(path: Path, module: nn.Module) -> Path:
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, path)
    return path


def xlabs_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the form ``pixels`` under XLabs' original names."""
    state = module.state_dict()
    out: dict[str, torch.Tensor] = {}
    fused: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for row in flux_config("pixels").rows():
        source = row.sources[-1]
        fused.setdefault(source.name, []).append((source.part(len(state[row.name]))[0], state[row.name]))
    for name, parts in fused.items():
        out[name] = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    return out


def predicted(
    base: str, parts: tuple[ComponentManifest, ComponentManifest], call: Call, how: ControlCall, streamed: bool
) -> torch.Tensor:
    """The prediction of a transformer with a ControlNet, bound to weights in memory, or streamed.

    ``parts``: the transformer and the ControlNet.
    ``streamed``: there is only the least memory.
    """
    model, cache = family_model(family(base)), SkeletonCache()
    residency = memory.host()
    least = [residency.planner.min_weight_bytes(part, torch.float32) for part in parts]
    if streamed:
        residency = memory.host(sum(least))
    with ExitStack() as stack:
        modules: list[nn.Module] = []
        for part, later in ((parts[1], least[0]), (parts[0], 0)):
            lease = stack.enter_context(residency.lease(part, torch.float32, Use(min_bytes_of_later_leases=later)))
            assert (lease.ring is not None) == streamed
            key = SkeletonKey(base, part.role, part.config, torch.float32, "torch-sdp")
            modules.append(stack.enter_context(bind(cache, key, lease)))
        stack.enter_context(torch.no_grad())
        added = model.control(modules[0], modules[1], call, how)
        return model.predict(modules[1], replace(call, control=added))
