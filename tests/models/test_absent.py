"""LOAD 14: a tensor that is not there raises in every module type, and never gives uninitialised memory."""

from __future__ import annotations

import pytest
import torch
from support import checkpoints
from torch import nn

from safelight.errors import AbsentTensorError
from safelight.models.absent import AbsentParameter
from safelight.models.skeleton import Skeleton, SkeletonKey, build

LEAVES = {
    "linear": (nn.Linear(4, 4), torch.ones(1, 4)),
    "conv1d": (nn.Conv1d(4, 4, 1), torch.ones(1, 4, 4)),
    "conv2d": (nn.Conv2d(4, 4, 1), torch.ones(1, 4, 4, 4)),
    "conv3d": (nn.Conv3d(4, 4, 1), torch.ones(1, 4, 4, 4, 4)),
    "conv transposed": (nn.ConvTranspose2d(4, 4, 1), torch.ones(1, 4, 4, 4)),
    "group norm": (nn.GroupNorm(2, 4), torch.ones(1, 4, 4, 4)),
    "layer norm": (nn.LayerNorm(4), torch.ones(1, 4)),
    "rms norm": (nn.RMSNorm(4), torch.ones(1, 4)),
    "batch norm": (nn.BatchNorm2d(4), torch.ones(1, 4, 4, 4)),
    "embedding": (nn.Embedding(4, 4), torch.zeros(1, dtype=torch.long)),
    "embedding bag": (nn.EmbeddingBag(4, 4), torch.zeros(1, 1, dtype=torch.long)),
    "bilinear": (nn.Bilinear(4, 4, 4), torch.ones(1, 4)),
    "prelu": (nn.PReLU(4), torch.ones(1, 4)),
    "attention": (nn.MultiheadAttention(4, 2), torch.ones(1, 1, 4)),
}


@pytest.mark.parametrize("label", LEAVES)
def test_load_14_each_tensor_of_each_leaf_type(label: str) -> None:
    module, x = LEAVES[label]
    module = module.eval()
    inputs = {"bilinear": (x, x), "attention": (x, x, x)}.get(label, (x,))
    with torch.no_grad():
        module(*inputs)
        for path, owner in module.named_modules():
            for name, real in list(owner._parameters.items()):
                if real is None:
                    continue
                owner._parameters[name] = AbsentParameter(f"{path}.{name}", real.shape, real.dtype)
                with pytest.raises(AbsentTensorError, match=name):
                    module(*inputs)
                owner._parameters[name] = real
        module(*inputs)


def test_meta_alone_is_not_enough() -> None:
    """The behaviour of torch for which absent parameters exist. If this fails, torch has been mended."""
    conv = nn.Conv2d(4, 4, 1, device="meta")
    out = conv(torch.ones(1, 4, 4, 4))
    assert out.device.type in ("cpu", "meta")


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_load_14_one_tensor_of_each_kind_left_out_of_each_component(base: str) -> None:
    """In whole modules, for one tensor of every leaf type and name: an error, never a result."""
    inputs = {
        "text_encoder": (torch.zeros(1, 77, dtype=torch.long),),
        "text_encoder_2": (torch.zeros(1, 77, dtype=torch.long),),
        "vae": (torch.ones(1, 3, 16, 16),),
    }
    for role, config in checkpoints.configs(base).items():
        key = SkeletonKey(base, role, config, torch.float32, "torch-sdp")
        skeleton = Skeleton(key)
        real = checkpoints.modules(base)[role].state_dict()
        kinds: set[tuple[type, str, str]] = set()
        for name, (owner, attribute) in skeleton.parameter_owners.items():
            owner._parameters[attribute] = nn.Parameter(real[name], requires_grad=False)
        calls = inputs.get(role)
        extra = {}
        if role == "unet":
            width = config.cross_attention_dim  # type: ignore[union-attr]
            calls = (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 77, width))
            if base == "sdxl":
                extra = {"added_cond_kwargs": {"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)}}
        with torch.no_grad():
            skeleton.module(*calls, **extra)
            for name, (owner, attribute) in skeleton.parameter_owners.items():
                kind = (type(owner), attribute, name.split(".")[0])
                if kind in kinds:
                    continue
                kinds.add(kind)
                kept = owner._parameters[attribute]
                owner._parameters[attribute] = AbsentParameter(name, skeleton.shapes[name], torch.float32)
                with pytest.raises(AbsentTensorError, match=name.replace(".", r"\.")):
                    skeleton.module(*calls, **extra)
                owner._parameters[attribute] = kept
        assert len(kinds) > 4


def test_an_absent_parameter_can_be_described_and_nothing_else() -> None:
    absent = AbsentParameter("unet.x", (2, 3), torch.float16)
    assert (absent.shape, absent.dtype, absent.dim(), absent.numel()) == (torch.Size([2, 3]), torch.float16, 2, 6)
    assert "unet.x" in repr(absent)
    for use in (
        lambda: absent + 1,
        lambda: torch.cat([absent]),
        lambda: absent.view(6),
        lambda: absent.cpu(),
        lambda: absent.tolist(),
    ):
        with pytest.raises(AbsentTensorError, match=r"unet\.x"):
            use()


def test_skeletons_hold_no_weights() -> None:
    for base in ("sd1", "sd2", "sdxl"):
        for role, config in checkpoints.configs(base).items():
            skeleton = Skeleton(SkeletonKey(base, role, config, torch.float32, "torch-sdp"))
            assert all(isinstance(p, AbsentParameter) for p in skeleton.module.parameters())
            assert all(b.device.type == "cpu" and b.numel() < 1000 for b in skeleton.module.buffers())
            assert not [
                name for name in skeleton.module.state_dict(keep_vars=True) if name not in skeleton.parameter_owners
            ]
            assert skeleton.differences() == []


def test_buffers_that_are_made_for_real_are_those_of_a_real_module() -> None:
    real = checkpoints.modules("sd1")["text_encoder"]
    config = checkpoints.configs("sd1")["text_encoder"]
    built = build(SkeletonKey("sd1", "text_encoder", config, torch.float32, "torch-sdp", torch.device("cpu")))
    theirs, ours = dict(real.named_buffers()), dict(built.named_buffers())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
