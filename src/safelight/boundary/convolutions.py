"""Convolutions of pictures: large 16-bit ones, which torch copies slowly on a CPU, and ones that wrap around."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from safelight.devices.choice import native_on_cpu

LEAST_ELEMENTS = 1 << 23
"""Numbers of a result. torch copies smaller ones as quickly, because they stay in the cache."""

BLOCK_ELEMENTS = 1 << 18
"""Numbers that are copied at a time, about as many as a core's cache holds."""


def convolve(picture: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    """Return ``F.conv2d(picture, weight, bias, *settings)``, in the usual order of axes.

    oneDNN convolves 16-bit numbers with the channels last in memory. If the picture has them first, torch copies the
    result back number by number, which takes longer than to convolve. This copies it by rows. The numbers are the same
    bit for bit, because oneDNN's function is.

    ``picture``: (images, channels, height, width).
    """
    if not _is_copied_slowly(picture, weight.shape[0]):
        return F.conv2d(picture, weight, bias, *settings)
    found = F.conv2d(picture.contiguous(memory_format=torch.channels_last), weight, bias, *settings)
    return found if found.is_contiguous() else _with_channels_first(found)


def _is_copied_slowly(picture: torch.Tensor, channels: int) -> bool:
    """Return whether torch takes long to copy the result. ``channels``: of the result."""
    if picture.device.type != "cpu" or picture.dim() != 4 or not picture.is_contiguous():
        return False
    large = picture.numel() // max(1, picture.shape[1]) * channels >= LEAST_ELEMENTS
    return large and native_on_cpu(picture.dtype)


def _with_channels_first(picture: torch.Tensor) -> torch.Tensor:
    """Return a copy whose memory has the usual order of axes."""
    found = torch.empty(picture.shape, dtype=picture.dtype, device=picture.device)
    images, channels, height, width = picture.shape
    rows = max(1, BLOCK_ELEMENTS // (images * channels * width))
    for row in range(0, height, rows):
        found[:, :, row : row + rows] = picture[:, :, row : row + rows]
    return found


class Convolution(nn.Conv2d):
    """A convolution by :func:`convolve`."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        return convolve(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Seamless(nn.Conv2d):
    """A convolution that wraps around along ``axes``, and pads with zeros along other axes."""

    axes: str

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        down, across = (int(pad) for pad in self.padding)
        for axis, sides in (("x", (across, across, 0, 0)), ("y", (0, 0, down, down))):
            input = F.pad(input, sides, "circular" if axis in self.axes else "constant")  # noqa: A001
        return convolve(input, weight, bias, self.stride, 0, self.dilation, self.groups)


def replace_convolutions(module: nn.Module, axes: str) -> None:
    """Let the convolutions of a module be those of this file. ``axes``: along which they wrap around."""
    for child in module.modules():
        if type(child) is not nn.Conv2d or child.padding_mode != "zeros":
            continue
        if axes and any(child.padding):
            child.__class__ = Seamless
            cast("Seamless", child).axes = axes
        else:
            child.__class__ = Convolution
