"""Forty faults, each as it really happened somewhere or could: who finds them is in ``test_doctor.py``.

A fault is put into an engine that has made an image by each of two models, and taken away again.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from safelight.boundary import kernels, pictures
from safelight.files import safetensors
from safelight.pipeline import run
from safelight.workers.local_engine import LocalEngine

A, B = "one", "two"
"""The names of the models."""


@dataclass
class Scene:
    """``files``: the models' files, to be spoiled; ``chance``: seeded for the fault."""

    engine: LocalEngine
    files: dict[str, Path]
    chance: random.Random


Apply = Callable[[Scene], Any]


@dataclass(frozen=True)
class Fault:
    """``suspect``: whom the doctor has to name. ``device``: simulated, for what only such a device does."""

    name: str
    suspect: str
    apply: Apply
    device: str = "cpu"


# Loading


def bit_in_file(prefix: str) -> Apply:
    def apply(scene: Scene) -> None:
        path = scene.files[A]
        tensors = [
            t for n, t in safetensors.read_header(path).tensors.items() if n.startswith(prefix) and t.nbytes > 999
        ]
        tensor = scene.chance.choice(tensors)
        flip(path, tensor.offset + scene.chance.randrange(tensor.nbytes), 1 << scene.chance.randrange(8))

    return apply


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


def keeping_times(change: Apply) -> Apply:
    """As a restored backup, or a disk that rots: the times say nothing."""

    def apply(scene: Scene) -> None:
        before = scene.files[A].stat()
        change(scene)
        os.utime(scene.files[A], ns=(before.st_atime_ns, before.st_mtime_ns))

    return apply


def truncated(scene: Scene) -> None:
    os.truncate(scene.files[A], scene.files[A].stat().st_size - 100_000)


def deleted(scene: Scene) -> None:
    scene.files[A].unlink()


def replaced_by_other(scene: Scene) -> None:
    shutil.copy(scene.files[B], scene.files[A])


def replaced_by_older(scene: Scene) -> None:
    shutil.copy(scene.files[B], scene.files[A])
    os.utime(scene.files[A], (1_000_000_000, 1_000_000_000))


def text_encoder_of_another(scene: Scene) -> None:
    """The bytes of B's text encoder in A's file (both have the same shapes)."""
    ours, theirs = (safetensors.read_header(scene.files[name]).tensors for name in (A, B))
    with scene.files[A].open("r+b") as file, safe_open(scene.files[B], "pt") as other:
        for name, tensor in ours.items():
            if name.startswith("cond_stage_model") and name in theirs:
                values = other.get_tensor(name).float() if tensor.dtype == "F32" else other.get_tensor(name).half()
                data = values.contiguous().numpy().tobytes()
                if len(data) == tensor.nbytes:
                    file.seek(tensor.offset)
                    file.write(data)


def two_exchanged(scene: Scene) -> None:
    tensors = [t for t in safetensors.read_header(scene.files[A]).tensors.values() if len(t.shape) == 4]
    first = scene.chance.choice(tensors)
    second = next(t for t in tensors if t.shape == first.shape and t.name != first.name)
    with scene.files[A].open("r+b") as file:
        file.seek(first.offset)
        one = file.read(first.nbytes)
        file.seek(second.offset)
        two = file.read(second.nbytes)
        file.seek(first.offset)
        file.write(two)
        file.seek(second.offset)
        file.write(one)


def zeroed_page(scene: Scene) -> None:
    """A block that the disk lost."""
    tensor = max(safetensors.read_header(scene.files[A]).tensors.values(), key=lambda t: t.nbytes)
    with scene.files[A].open("r+b") as file:
        file.seek(tensor.offset + 4096)
        file.write(bytes(4096))


# State


def kept_modules(scene: Scene, role: str) -> list[nn.Module]:
    return [s.module for key, s in scene.engine.resources.skeletons._free.items() if key.role == role]


def left(role: str, leave: Callable[[nn.Module], None]) -> Apply:
    def apply(scene: Scene) -> None:
        (module,) = kept_modules(scene, role)
        leave(module)

    return apply


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, __, out: out)


def pre_hook(module: nn.Module) -> None:
    next(m for m in module.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(lambda _, args: args)


def forward(module: nn.Module) -> None:
    inner = next(m for m in module.modules() if isinstance(m, nn.Linear))
    original = inner.forward
    inner.forward = lambda x: original(x) * 1.01  # type: ignore[method-assign]


def processor(module: nn.Module) -> None:
    kernels.set_attention(module, "sliced")


def training(module: nn.Module) -> None:
    module.train()


def position_ids(module: nn.Module) -> None:
    for child in module.modules():
        if "position_ids" in child._buffers:
            child._buffers["position_ids"].zero_()  # type: ignore[union-attr]


def attribute(module: nn.Module) -> None:
    module.lora_scale = 0.8  # type: ignore[assignment]


def submodule(module: nn.Module) -> None:
    module.register_module("extra", nn.Identity())


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Generator[None]:
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def everywhere(owner: Any, name: str, make: Callable[[Any], Any]) -> Apply:
    getattr(owner, name)  # Now, so that `make test` notices when it has another name.
    return lambda _: patched(owner, name, make)


def louder(original: Any) -> Any:
    return lambda self, x: original(self, x) * 1.05


def other_noise(original: Any) -> Any:
    return lambda *arguments, **more: original(*arguments, **more) * 0.9


# Attention


def kernel(change: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]) -> Apply:
    def make(original: Any) -> Any:
        def call(self: Any, attn: Any, hidden: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
            return change(original(self, attn, hidden, *more, **named), hidden, attn)

        return call

    return everywhere(kernels.AttnProcessor2_0, "__call__", make)


def tokens(hidden: torch.Tensor) -> int:
    return hidden.shape[1] if hidden.ndim == 3 else hidden.shape[2] * hidden.shape[3]


def only_contiguous(original: Any) -> Any:
    def call(self: Any, attn: Any, hidden: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        flat = torch.as_strided(hidden, hidden.shape, torch.empty(hidden.shape, device="meta").stride())
        return original(self, attn, flat, *more, **named)

    return call


def few_keys(original: Any) -> Any:
    """As if the last keys had been out of bounds of a block."""

    def call(
        self: Any, attn: Any, hidden: torch.Tensor, encoder_hidden_states: Any = None, **more: Any
    ) -> torch.Tensor:
        keys = None if encoder_hidden_states is None else encoder_hidden_states[:, :64]
        return original(self, attn, hidden, keys, **more)

    return call


# Memory


def resident(scene: Scene, role: str) -> torch.Tensor:
    """The bytes of a resident tensor; between tensors there are bytes that belong to none."""
    residents = scene.engine.resources.residency.table.residents
    held = [h for piece, h in residents.items() if piece.component_key.startswith(role)]
    tensor = scene.chance.choice(list(scene.chance.choice(held).buffer.tensors.values()))
    return tensor.detach().view(-1).view(torch.uint8)


def bit_in_memory(role: str) -> Apply:
    def apply(scene: Scene) -> None:
        data = resident(scene, role)
        data[scene.chance.randrange(len(data))] ^= 1 << scene.chance.randrange(8)

    return apply


def nan_in_memory(scene: Scene) -> None:
    resident(scene, "unet").view(torch.float32)[:4] = float("nan")


def zeros_in_memory(scene: Scene) -> None:
    resident(scene, "vae").zero_()


def exchanged_in_memory(scene: Scene) -> None:
    residents = scene.engine.resources.residency.table.residents
    held = [h for piece, h in residents.items() if piece.component_key.startswith("unet")]
    for one in held:
        for two in held:
            if one is not two and one.buffer.segment.nbytes == two.buffer.segment.nbytes:
                size = one.buffer.segment.nbytes
                before = one.buffer.slab.base[:size].clone()
                if not torch.equal(before, two.buffer.slab.base[:size]):
                    one.buffer.slab.base[:size] = two.buffer.slab.base[:size]
                    two.buffer.slab.base[:size] = before
                    return
    raise AssertionError("no two segments of one size")


@contextmanager
def phantom(scene: Scene) -> Generator[None]:
    """Bytes that the books have and nobody else."""
    ledger = scene.engine.resources.residency.ledger
    number = ledger.charge("host", 5_000_000, "nobody", "lost", stored=True)
    try:
        yield
    finally:
        ledger.credit(number)


@contextmanager
def kept_reference(scene: Scene) -> Generator[None]:
    """Somebody keeps a tensor of a model that is dropped."""
    residency = scene.engine.resources.residency
    held = next(iter(residency.table.residents.values()))
    keeps = next(iter(held.buffer.tensors.values())).detach()
    scene.engine.loaded.unload(None)
    yield
    del keeps, held


MAKE_IMAGE = run.make_image.__name__
"""Looked up when this module is imported, so that `make test` notices when it has another name."""


@contextmanager
def leak(scene: Scene) -> Generator[None]:
    """Every image leaves 20 MB behind."""
    kept: list[bytearray] = []

    def make(original: Any) -> Any:
        def leaking(*arguments: Any, **more: Any) -> Any:
            kept.append(bytearray(b"x" * (20 << 20)))
            return original(*arguments, **more)

        return leaking

    with patched(run, MAKE_IMAGE, make):
        yield
    kept.clear()


# Device


def device_fault(name: str, value: Any) -> Apply:
    @contextmanager
    def apply(scene: Scene) -> Generator[None]:
        faults = scene.engine.resources.device.faults  # type: ignore[attr-defined]
        before = getattr(faults, name)
        setattr(faults, name, value)
        try:
            yield
        finally:
            setattr(faults, name, before)

    return apply


@contextmanager
def corrupting(scene: Scene) -> Generator[None]:
    faults = scene.engine.resources.device.faults  # type: ignore[attr-defined]
    faults.corrupt_above, faults.corrupted = 50_000, 10**6
    try:
        yield
    finally:
        faults.corrupt_above, faults.corrupted = None, 0


def drifting(original: Any) -> Any:
    """Every call is another: a device that does not repeat itself."""
    calls = [0]

    def call(*arguments: Any, **more: Any) -> torch.Tensor:
        calls[0] += 1
        decoded = original(*arguments, **more)
        noise = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(calls[0]))
        return decoded + 0.7 * noise

    return call


FAULTS = (
    Fault("a bit of the UNet in the file", "loading", bit_in_file("model.diffusion_model")),
    Fault("a bit of the text encoder in the file", "loading", bit_in_file("cond_stage_model")),
    Fault("a bit of the VAE's decoder in the file", "loading", bit_in_file("first_stage_model.decoder")),
    Fault("a bit in the file, its time kept", "loading", keeping_times(bit_in_file("model.diffusion_model"))),
    Fault("a bit of the VAE in the file, its time kept", "loading", keeping_times(bit_in_file("first_stage_model"))),
    Fault("the file is cut short", "loading", truncated),
    Fault("the file is gone", "loading", deleted),
    Fault("another checkpoint under its name", "loading", replaced_by_other),
    Fault("an older checkpoint under its name", "loading", replaced_by_older),
    Fault("the text encoder of another checkpoint", "loading", text_encoder_of_another),
    Fault("two tensors exchanged in the file", "loading", two_exchanged),
    Fault("a block of the file is zero", "loading", zeroed_page),
    Fault("a hook left on the UNet", "state", left("unet", hook)),
    Fault("a hook left within the VAE", "state", left("vae", pre_hook)),
    Fault("a forward replaced in the UNet", "state", left("unet", forward)),
    Fault("another attention left on the UNet", "state", left("unet", processor)),
    Fault("the UNet left in training", "state", left("unet", training)),
    Fault("position ids of the text encoder overwritten", "state", left("text_encoder", position_ids)),
    Fault("an attribute left on the UNet", "state", left("unet", attribute)),
    Fault("a module left in the VAE", "state", left("vae", submodule)),
    Fault("convolutions patched for the whole process", "state", everywhere(nn.Conv2d, "forward", louder)),
    Fault("noise patched for the whole process", "state", everywhere(torch, "randn", other_noise)),
    Fault(
        "attention gives junk above 1,024 tokens",
        "attention",
        kernel(lambda out, hidden, _: out.flip(1) if tokens(hidden) > 1024 else out),
    ),
    Fault(
        "attention gives junk above 4,096 tokens",
        "attention",
        kernel(lambda out, hidden, _: out * 0 if tokens(hidden) > 4096 else out),
    ),
    Fault(
        "attention reads what nobody wrote",
        "attention",
        kernel(lambda out, hidden, _: out + 0 * torch.empty_like(out)),
    ),
    Fault(
        "attention wants contiguous inputs",
        "attention",
        everywhere(kernels.AttnProcessor2_0, "__call__", only_contiguous),
    ),
    Fault(
        "attention is NaN for heads of 80",
        "attention",
        kernel(lambda out, _, attn: out * float("nan") if attn.inner_dim // attn.heads == 80 else out),
    ),
    Fault("attention is off by a tenth", "attention", kernel(lambda out, hidden, _: out * 1.1)),
    Fault(
        "attention leaves out the last keys",
        "attention",
        everywhere(kernels.AttnProcessor2_0, "__call__", few_keys),
    ),
    Fault("a bit of the UNet in memory", "memory", bit_in_memory("unet")),
    Fault("a bit of the VAE in memory", "memory", bit_in_memory("vae")),
    Fault("a bit of the text encoder in memory", "memory", bit_in_memory("text_encoder")),
    Fault("NaN in the UNet in memory", "memory", nan_in_memory),
    Fault("zeros in the VAE in memory", "memory", zeros_in_memory),
    Fault("two parts exchanged in memory", "memory", exchanged_in_memory),
    Fault("bytes that only the books have", "memory", phantom),
    Fault("somebody keeps a dropped model's tensor", "memory", kept_reference),
    Fault("every image leaves memory behind", "memory", leak),
    Fault("copies read a freed source", "device", device_fault("early_frees", 10**6), "simulated"),
    Fault("large copies lose bytes", "device", corrupting, "simulated"),
    Fault("a device that does not repeat itself", "device", everywhere(pictures, "decode", drifting)),
)
