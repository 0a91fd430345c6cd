"""What is relied on of diffusers and transformers: when one of these fails, a new version behaves otherwise."""

from __future__ import annotations

import pytest
import torch
from support import checkpoints

from safelight.boundary import kernels, modules
from safelight.errors import InputError
from safelight.models.skeleton import SkeletonKey, build

CPU = torch.device("cpu")


def test_attention_08_the_chosen_processor_is_the_one_that_is_called() -> None:
    config = checkpoints.configs("sd1")["unet"]
    counts: dict[str, int] = {}
    for name, kind in (
        ("torch-sdp", kernels.AttnProcessor2_0),
        ("normal", kernels.AttnProcessor),
        ("sliced", kernels.SlicedAttnProcessor),
    ):
        unet = checkpoints.modules("sd1")["unet"]
        kernels.set_attention(unet, name)
        original = kind.__call__

        def counted(self, *args, _original=original, _name=name, **kwargs):
            counts[_name] = counts.get(_name, 0) + 1
            return _original(self, *args, **kwargs)

        kind.__call__ = counted  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 77, 64))
        finally:
            kind.__call__ = original  # type: ignore[method-assign]
        built = build(SkeletonKey("sd1", "unet", config, torch.float32, name, CPU))
        assert {type(p) for p in built.attn_processors.values()} == {kind}  # type: ignore[union-attr]
    attentions = sum("attn" in n and n.endswith("to_q") for n, _ in unet.named_modules())
    assert counts == dict.fromkeys(("torch-sdp", "normal", "sliced"), attentions)


def test_attention_02_kernels_agree() -> None:
    outs = []
    for name in ("torch-sdp", "normal", "sliced"):
        unet = checkpoints.modules("sd1")["unet"]
        kernels.set_attention(unet, name)
        with torch.no_grad():
            outs.append(unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 77, 64)).sample)
    assert all(torch.allclose(outs[0], other, atol=1e-4) for other in outs[1:])


def test_building_changes_nothing_of_the_process() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        built = build(SkeletonKey("sd1", "vae", checkpoints.configs("sd1")["vae"], torch.float32, "torch-sdp", CPU))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


def test_a_library_that_is_too_old_for_a_model_is_named() -> None:
    with pytest.raises(InputError, match=r"needs Nothing, which diffusers .* does not have: upgrade diffusers"):
        modules.library_class("diffusers.models.modeling_utils:Nothing")
    with pytest.raises(InputError, match=r"needs Other, which transformers .* does not have"):
        modules.library_class("transformers.models.nothing:Other")
