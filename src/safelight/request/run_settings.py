"""What can change a pixel beside the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]
AttentionType = Literal["auto", "normal", "sliced", "torch-sdp", "xformers", "flash", "sage"]
SliceSize = Literal["auto", "balanced", "max", "1", "2", "3", "4", "5", "6", "7", "8"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything besides the request that can change a pixel; decided before the job, recorded with the image.

    ``dtype`` is that of text encoders and UNet, ``vae_dtype`` the VAE's. ``attention`` is a kernel's name,
    ``attention_slice_size`` says how many heads ``sliced`` computes at once. ``versions`` names the libraries that
    compute; ``hardware`` the processor or GPU and its instruction set: kernels for another one may round otherwise.
    """

    device: str
    hardware: str
    dtype: str
    vae_dtype: str
    attention: str
    threads: int
    versions: Mapping[str, str]
    attention_slice_size: str = "auto"
