"""A model of two blocks, so small that a test can try thousands of sequences of switches in a minute."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from safelight.devices.transfer import checksum_of
from safelight.families.parts.vae import VAEConfig
from safelight.models.skeleton import SkeletonCache, SkeletonKey
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest, ManifestTensor

WIDTH = 16
CONFIG = VAEConfig(1, 1, 1, (1,), 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.linear(x)))


class Toy(nn.Module):
    """Two blocks, a parameter outside any leaf layer, and a weight that is used twice, the second time transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.ModuleList([Block(), Block()])
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(x * self.scale)
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.tied.weight.t())


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Toy().named_parameters()}


def write(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in state.values()))


def manifest(path: Path, state: dict[str, torch.Tensor], name: str) -> ComponentManifest:
    tensors, at = [], 0
    for key, tensor in state.items():
        nbytes = tensor.numel() * 4
        tensors.append(
            ManifestTensor(key, "F32", tuple(tensor.shape), path, at, nbytes, False, checksum_of(tensor.contiguous()))
        )
        at += nbytes
    return ComponentManifest("vae", CONFIG, tuple(tensors), hash_texts(name))


def key(at: torch.device) -> SkeletonKey:
    return SkeletonKey("toy", "vae", CONFIG, torch.float32, "torch-sdp", at)


def _build(_: SkeletonKey) -> nn.Module:
    with torch.device("meta"):
        return Toy().eval().requires_grad_(False)


def skeletons() -> SkeletonCache:
    return SkeletonCache(build=_build)


def output(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The model's output, computed on the host without Safelight, with weights at aligned addresses."""
    toy = Toy().eval()
    for name, parameter in toy.named_parameters():
        parameter.data = state[name].clone()
    with torch.no_grad():
        return toy(x)
