"""Binding: one at a time, exactly the tensors, and nothing of the weights survives it."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import torch
from support import checkpoints, memory
from torch import nn

from safelight.errors import AbsentTensorError, BindingError, ModuleModifiedError
from safelight.models.absent import AbsentParameter
from safelight.models.bind import bind
from safelight.models.skeleton import Skeleton, SkeletonCache, SkeletonKey
from safelight.weights.manifest import ComponentManifest


@pytest.fixture
def vae(tiny: Path) -> ComponentManifest:
    return memory.manifest(tiny / "a.safetensors").component("vae")


def key(component: ComponentManifest) -> SkeletonKey:
    return SkeletonKey("sd1", component.role, component.config, torch.float32, "torch-sdp")


def live_bytes() -> int:
    """Bytes of all distinct storages that any tensor alive refers to."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, AbsentParameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def test_nothing_survives_whatever_is_kept(vae: ComponentManifest) -> None:
    """References to a module, to a parameter, and to a traceback's frames are kept on purpose."""
    before = live_bytes()
    residency = memory.host()
    cache = SkeletonCache()
    kept: list[object] = []

    class Stop(Exception):
        pass

    def explode(module: nn.Module, args: object) -> None:
        raise Stop

    try:
        with residency.lease(vae, torch.float32) as weights, bind(cache, key(vae), weights) as module:
            kept += [module, module.decoder, next(module.parameters())]  # type: ignore[union-attr]
            held = residency.pool.used_bytes
            assert held > 100_000
            module.decoder.conv_in.register_forward_pre_hook(explode)  # type: ignore[union-attr]
            module.decode(torch.ones(1, 4, 8, 8))  # type: ignore[operator]
    except Stop:
        kept.append(sys.exc_info()[2])
    del weights
    residency.drop()
    assert residency.pool.used_bytes == residency.pool.cached_bytes == 0
    assert live_bytes() - before < 20_000
    assert len(kept) == 4


def test_a_module_that_is_kept_raises_when_it_is_used(vae: ComponentManifest) -> None:
    residency, cache = memory.host(), SkeletonCache()
    with residency.lease(vae, torch.float32) as weights, bind(cache, key(vae), weights) as module:
        module.decode(torch.ones(1, 4, 8, 8))  # type: ignore[operator]
        parameter = module.decoder.conv_in.weight  # type: ignore[union-attr]
    with pytest.raises(AbsentTensorError):
        module.decode(torch.ones(1, 4, 8, 8))  # type: ignore[operator]
    assert parameter.numel() == 0


def test_one_binding_at_a_time_gets_a_skeleton_of_its_own(vae: ComponentManifest) -> None:
    residency, cache = memory.host(), SkeletonCache()
    with residency.lease(vae, torch.float32) as weights:
        with bind(cache, key(vae), weights) as first, bind(cache, key(vae), weights) as second:
            assert first is not second
        with bind(cache, key(vae), weights) as third:
            assert third in (first, second)


def test_weights_that_do_not_fit_are_refused(vae: ComponentManifest) -> None:
    residency, cache = memory.host(), SkeletonCache()
    lacking = replace(vae, tensors=tuple(t for t in vae.tensors if t.name != "quant_conv.bias"), digest="lacking")
    with (
        residency.lease(lacking, torch.float32) as lease,
        pytest.raises(BindingError, match=r"quant_conv\.bias"),
        bind(cache, key(vae), lease),
    ):
        pass
    with (
        residency.lease(vae, torch.bfloat16) as lease,
        pytest.raises(BindingError, match="bfloat16"),
        bind(cache, key(vae), lease),
    ):
        pass
    with residency.lease(vae, torch.float32) as lease, bind(cache, key(vae), lease) as module:
        assert not any(isinstance(p, AbsentParameter) for p in module.parameters())


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def replaced_forward(module: nn.Module) -> None:
    module.forward = lambda *_: None


def replaced_processor(module: nn.Module) -> None:
    module.set_attn_processor(type(next(iter(module.attn_processors.values())))())  # type: ignore


def processor_state(module: nn.Module) -> None:
    next(iter(module.attn_processors.values())).leftover = 3  # type: ignore


def training(module: nn.Module) -> None:
    module.decoder.train()  # type: ignore


def tiling(module: nn.Module) -> None:
    module.enable_tiling()  # type: ignore


def inner_type(module: nn.Module) -> None:
    module.decoder.conv_in.__class__ = nn.ConvTranspose2d  # type: ignore


def buffer(module: nn.Module) -> None:
    module.register_buffer("left", torch.ones(1))


def bias(module: nn.Module) -> None:
    module.decoder.mid_block.attentions[0].to_q.register_parameter("extra", nn.Parameter(torch.ones(1)))  # type: ignore


def swapped(module: nn.Module) -> None:
    module.decoder.conv_act = nn.ReLU()  # type: ignore


@pytest.mark.parametrize(
    "leave",
    [hook, replaced_forward, replaced_processor, processor_state, training, tiling, inner_type, buffer, bias, swapped],
)
def test_state_24_what_is_left_on_a_skeleton_is_seen_and_dropped(vae: ComponentManifest, leave) -> None:
    """STATE 23, 24: a hook, a flag, a replaced forward never reach the next image."""
    residency, cache = memory.host(), SkeletonCache()
    with residency.lease(vae, torch.float32) as weights:
        with bind(cache, key(vae), weights) as clean:
            pass
        binding = bind(cache, key(vae), weights)
        with structlog.testing.capture_logs() as logs:
            left = binding.__enter__()
            assert left is clean
            leave(left)
            with pytest.raises(ModuleModifiedError, match="the vae was changed while it computed"):
                binding.__exit__(None, None, None)
        assert any("changed since it was built" in entry["event"] and entry["changed"] for entry in logs)
        with bind(cache, key(vae), weights) as fresh:
            assert fresh is not left


def test_state_01_weights_that_were_written_are_read_again(vae: ComponentManifest) -> None:
    residency, cache = memory.host(), SkeletonCache()
    with residency.lease(vae, torch.float32) as weights:
        right = weights.resident_tensor("quant_conv.weight").clone()  # type: ignore[union-attr]
        with bind(cache, key(vae), weights) as module, torch.no_grad():
            module.quant_conv.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert residency.resident_bytes < sum(segment.nbytes for segment in weights.segments)
    with residency.lease(vae, torch.float32) as weights:
        assert torch.equal(weights.resident_tensor("quant_conv.weight"), right)  # type: ignore[arg-type]


def test_use_leaves_no_trace(tiny: Path) -> None:
    """A forward pass of every component leaves its skeleton as built; else each image would build it anew."""
    for base in ("sd1", "sdxl"):
        for role, config in checkpoints.configs(base).items():
            if role.startswith("text"):
                skeleton = Skeleton(SkeletonKey(base, role, config, torch.float32, "torch-sdp"))
                real = checkpoints.modules(base)[role].state_dict()
                for name, (owner, attribute) in skeleton.parameter_owners.items():
                    owner._parameters[attribute] = nn.Parameter(real[name], requires_grad=False)
                skeleton.module(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
                skeleton.clear()
                assert skeleton.differences() == []


def test_kept_skeletons_are_bounded() -> None:
    cache = SkeletonCache(max_count=2)
    configs = checkpoints.configs("sdxl")
    keys = [SkeletonKey("sdxl", role, config, torch.float32, "torch-sdp") for role, config in configs.items()]
    for each in keys[:3]:
        cache.put_back(cache.take(each))
    assert len(cache._free) == 2


def test_a_buffer_written_through_data_is_seen() -> None:
    """The version counter does not see such a write, so the values are compared."""
    config = checkpoints.configs("sd1")["text_encoder"]
    skeleton = Skeleton(SkeletonKey("sd1", "text_encoder", config, torch.float32, "torch-sdp"))
    (positions,) = (b for name, b in skeleton.module.named_buffers() if name.endswith("position_ids"))
    assert skeleton.differences() == []
    positions.data.zero_()
    assert any("position_ids changed" in line for line in skeleton.differences())
