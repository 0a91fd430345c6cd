"""Every tensor of Qwen-Image's tables counts: changed, it changes what its component returns. Those that do not are
named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import qwen_image
from support.checkpoints import random_module

from safelight.families.parts import qwen25_model

CPU = torch.device("cpu")

WITHOUT_EFFECT = {
    r"transformer_blocks\.1\.(attn\.(add_q_proj|norm_added_q|to_add_out)\.|txt_mlp\.)": (
        "the text's states after the last block, which nothing reads"
    )
}


def returned(role: str, module: Any) -> torch.Tensor:
    if role == "text_encoder":
        return qwen25_model.hidden_states(module, [1, 2, 3, 50], CPU)
    generator = torch.Generator().manual_seed(1)
    if role == "vision_encoder":
        # Four windows of different sizes.
        patches = torch.randn(120, 1176, generator=generator)
        return module(patches, grid_thw=torch.tensor([[1, 10, 12]])).pooler_output
    if role == "transformer":
        tokens, text = torch.randn(1, 12, 64, generator=generator), torch.randn(1, 5, 32, generator=generator)
        return module(tokens, text, timestep=torch.tensor([0.5]), img_shapes=[[(1, 3, 4)]], return_dict=False)[0]
    encoded = module.encode(torch.randn(1, 3, 1, 16, 16, generator=generator)).latent_dist.parameters
    decoded = module.decode(torch.randn(1, 16, 1, 2, 2, generator=generator) * 0.1, return_dict=False)[0]
    return torch.cat([encoded.flatten(), decoded.flatten()])


@pytest.mark.full
@pytest.mark.parametrize("role", ["text_encoder", "transformer", "vae", "vision_encoder"])
@torch.no_grad()
def test_every_tensor_counts(role: str) -> None:
    torch.set_num_threads(1)
    module = random_module("qwen-image", qwen_image.configs("edit")[role], torch.Generator().manual_seed(2))
    plain = returned(role, module)
    idle: list[str] = []
    for name, parameter in module.named_parameters():
        before = parameter.clone()
        parameter.add_(torch.linspace(0.1, 0.4, parameter.numel()).view(parameter.shape))
        if torch.equal(returned(role, module), plain):
            idle.append(name)
        parameter.copy_(before)
    named = [name for name in dict(module.named_parameters()) if any(re.match(one, name) for one in WITHOUT_EFFECT)]
    assert idle == named
