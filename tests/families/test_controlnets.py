"""The ControlNets of the families with rectified flow: recognition, missing tensors, and what each tensor is for."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from support import naming
from support.checkpoints import random_module
from support.families import LDM
from support.scale import ALL

from safelight.catalog import identify
from safelight.errors import IncompleteModelError
from safelight.families.components import Config
from safelight.families.family_model import Call, ControlCall, Tensors, family_model
from safelight.families.flux.controlnet import FluxControlNetConfig
from safelight.families.flux.transformer import FluxConfig
from safelight.families.qwen_image.controlnet import QwenImageControlNetConfig
from safelight.families.qwen_image.transformer import QwenImageConfig
from safelight.families.registry import families, family
from safelight.families.zimage.controlnet import ZImageControlNetConfig
from safelight.weights import adapter_file

if any(find_spec(f"diffusers.models.controlnets.controlnet_{name}") is None for name in ("z_image", "qwenimage")):
    pytest.skip("the installed diffusers lacks these ControlNets", allow_module_level=True)

from support import flow_controls, flux, qwen_image, zimage

_FLUX = FluxConfig(64, 16, 3072, 5, 10, 128, 4096, 768, True)
_QWEN = QwenImageConfig(64, 16, 3072, 5, 128, 3584)

PUBLISHED: dict[str, tuple[str, Config]] = {
    "FLUX.1's Union by InstantX": ("flux", FluxControlNetConfig(_FLUX, 10, False)),
    "FLUX.1's by XLabs": ("flux", FluxControlNetConfig(replace(_FLUX, layers=2, single_layers=0), 0, True)),
    "Z-Image's Union 1": ("z-image", ZImageControlNetConfig(16, 3840, 6, 2, 128, False)),
    "Z-Image's Union 2.1": ("z-image", ZImageControlNetConfig(33, 3840, 15, 2, 128, True)),
    "Qwen-Image's Union by InstantX": ("qwen-image", QwenImageControlNetConfig(_QWEN, 0)),
    "Qwen-Image's for inpainting by InstantX": ("qwen-image", QwenImageControlNetConfig(_QWEN, 4)),
}
"""The family and the settings of published ControlNets."""


@pytest.mark.parametrize("label", PUBLISHED)
def test_the_rules_of_one_family_fire(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = PUBLISHED[label]
    names = list(families())
    random.Random(label).shuffle(names)
    shuffled = {name: families()[name] for name in names}
    monkeypatch.setattr(identify, "families", lambda: shuffled)
    for which in (0, LDM):
        header = naming.header_of(naming.in_files(config, naming.on_meta(config), which))
        monkeypatch.setattr(identify, "read_header", lambda _, header=header: header)
        found = identify.identify(header.path)
        assert (found.kind, found.base) == ("controlnet", base)
        [layout] = adapter_file.layout(header, found.kind)
        assert layout.config == config


@dataclass(frozen=True)
class Tiny:
    """A tiny ControlNet.

    ``denoiser``: settings of the transformer to which it adds.
    ``condition``, ``how``: how it is called.
    ``without_effect``: a pattern of tensors that change nothing: the text's half of the last block.
    ``optional``: a pattern of tensors that a ControlNet may lack.
    """

    base: str
    config: Config
    denoiser: Config
    condition: Tensors
    how: ControlCall
    without_effect: str = r"$"
    optional: str = r"$"


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


TOKENS = drawn(1, 12, 64)
_TEXT = {"hidden": drawn(1, 9, 32), "length": torch.tensor([9])}
_FLUX_TEXT = {"hidden": drawn(1, 8, 32), "pooled": drawn(1, 64)}
_FLUX_NET, _ZIMAGE_NET, _QWEN_NET = (one.configs()["transformer"] for one in (flux, zimage, qwen_image))

TINY = {
    "flux union": Tiny(
        "flux",
        flow_controls.flux_config("union"),
        _FLUX_NET,
        _FLUX_TEXT,
        ControlCall(TOKENS, union_type="pose"),
        # Without it, the ControlNet is no union.
        optional=r"controlnet_mode_embedder\.",
    ),
    "flux pixels": Tiny(
        "flux",
        flow_controls.flux_config("pixels"),
        _FLUX_NET,
        _FLUX_TEXT,
        ControlCall(drawn(1, 3, 48, 64)),
        r"transformer_blocks\.0\.(attn\.(add_q_proj|norm_added_q|to_add_out)|ff_context)\.",
    ),
    "z-image": Tiny("z-image", flow_controls.zimage_config("2.1"), _ZIMAGE_NET, _TEXT, ControlCall(drawn(1, 16, 6, 8))),
    "qwen-image": Tiny(
        "qwen-image",
        flow_controls.qwen_config("whole"),
        _QWEN_NET,
        _TEXT,
        ControlCall(TOKENS),
        r"transformer_blocks\.1\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)\.",
    ),
}


@pytest.mark.parametrize("label", TINY)
@torch.no_grad()
def test_every_tensor_changes_what_is_added(label: str) -> None:
    tiny = TINY[label]
    generator = torch.Generator().manual_seed(5)
    net, denoiser = (random_module(tiny.base, config, generator) for config in (tiny.config, tiny.denoiser))
    call = Call(drawn(1, 16, 6, 8), torch.tensor(500.0), tiny.condition, guidance=3.5)

    def added() -> list[torch.Tensor]:
        return list(family_model(family(tiny.base)).control(net, denoiser, call, tiny.how).values())

    right, silent = added(), list[str]()
    for name, tensor in net.state_dict().items():
        before = tensor.clone()
        tensor.mul_(1.5).add_(0.1)
        if all(map(torch.equal, added(), right)):
            silent.append(name)
        tensor.copy_(before)
    assert all(map(torch.equal, added(), right))
    assert silent == [name for name in net.state_dict() if re.match(tiny.without_effect, name)]


@pytest.mark.parametrize("label", TINY)
def test_each_missing_tensor_and_each_wrong_shape_is_named(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, silent = TINY[label].config, list[str]()
    rows = {re.sub("[0-9]+", "N", row.name): row for row in config.rows()}.values()
    whole = naming.on_meta(config)
    for row in config.rows() if ALL else rows:
        columns = torch.empty((*row.shape, 3), device="meta")
        lacking = () if re.match(TINY[label].optional, row.name) else ({},)
        for changed in (*lacking, {row.name: columns}):
            tensors = {name: one for name, one in whole.items() if name != row.name} | changed
            header = naming.header_of(tensors)
            monkeypatch.setattr(identify, "read_header", lambda _, header=header: header)
            try:
                adapter_file.layout(header, identify.identify(header.path).kind)
            except IncompleteModelError as error:
                if not any(source.name in str(error) for source in row.sources):
                    silent.append(f"{row.name}, {len(changed)}: {error}")
            else:
                silent.append(f"{row.name}, {len(changed)}: no error")
    assert silent == []
