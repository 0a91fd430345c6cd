"""Large 16-bit convolutions on a CPU are copied by rows, and have torch's numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from safelight.boundary import convolutions
from safelight.boundary.convolutions import Convolution, Seamless, convolve, replace_convolutions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("settings", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 0, 1, 1), (1, 2, 2, 1), (1, 1, 1, 4)])
@pytest.mark.parametrize("size", [(2, 16, 33, 47), (1, 4, 64, 8), (1, 128, 40, 80)])
def test_the_numbers_and_their_order_are_torchs(
    dtype: torch.dtype, settings: tuple[int, ...], size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(convolutions, "BLOCK_ELEMENTS", 1 << 11)
    torch.manual_seed(1)
    picture = torch.randn(size).to(dtype)
    weight, bias = torch.randn(12, size[1] // settings[3], 3, 3).to(dtype), torch.randn(12).to(dtype)
    found = convolve(picture, weight, bias, *settings)
    assert torch.equal(found, F.conv2d(picture, weight, bias, *settings))
    assert found.is_contiguous()


def test_only_large_pictures_of_16_bits_in_the_usual_order_are_copied_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "LEAST_ELEMENTS", 2 * 16 * 32 * 32)
    monkeypatch.setattr(convolutions, "native_on_cpu", lambda dtype: dtype == torch.bfloat16)
    copied: list[tuple[int, ...]] = []

    def copy(picture: torch.Tensor) -> torch.Tensor:
        copied.append(tuple(picture.shape))
        return picture.contiguous()

    monkeypatch.setattr(convolutions, "_with_channels_first", copy)
    picture, weight = torch.ones(2, 4, 32, 32, dtype=torch.bfloat16), torch.ones(16, 4, 3, 3, dtype=torch.bfloat16)
    convolve(picture[:1], weight, None, 1, 1)
    convolve(picture, weight[:15], None, 1, 1)
    convolve(picture.float(), weight.float(), None, 1, 1)
    convolve(picture.contiguous(memory_format=torch.channels_last), weight, None, 1, 1)
    assert not copied
    convolve(picture, weight, None, 1, 1)
    assert copied == [(2, 16, 32, 32)]


def test_a_modules_convolutions_are_replaced_and_those_with_other_paddings_are_not() -> None:
    module = nn.ModuleList(
        [
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            nn.Conv1d(3, 4, 3),
        ]
    )
    replace_convolutions(module, "")
    assert [type(one) for one in module] == [Convolution, Convolution, nn.Conv2d, nn.Conv1d]
    other = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)])
    replace_convolutions(other, "x")
    assert [type(one) for one in other] == [Seamless, Convolution]
