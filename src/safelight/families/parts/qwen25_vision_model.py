"""Computes the vision encoder of Qwen2.5-VL: its module, its pictures, what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import nn

from safelight.boundary import modules
from safelight.families.parts.qwen25_vision import (
    CHANNELS,
    FRAMES,
    MERGED,
    PATCH,
    WINDOW,
    Qwen25VisionConfig,
    grid_of,
)

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of each colour, by which pictures are normalised: CLIP's."""

ROPE_THETA = 1e4

ENCODER = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel"
SETTINGS = "transformers.models.qwen2_5_vl.configuration_qwen2_5_vl:Qwen2_5_VLVisionConfig"


def build(config: Qwen25VisionConfig) -> nn.Module:
    """Build the module on the current default device."""
    settings = modules.library_class(SETTINGS)(
        depth=config.layers,
        hidden_size=config.width,
        hidden_act="silu",
        intermediate_size=config.intermediate,
        num_heads=config.heads,
        in_channels=CHANNELS,
        patch_size=PATCH,
        spatial_merge_size=MERGED,
        temporal_patch_size=FRAMES,
        window_size=WINDOW,
        out_hidden_size=config.returned,
        fullatt_block_indexes=config.full_attention_blocks,
        attn_implementation="sdpa",
    )
    return modules.library_class(ENCODER)(settings)


def frequencies(config: Any) -> torch.Tensor:
    """Return the frequencies of the rotary embedding, fp32, on the CPU. ``config``: transformers' settings."""
    # Half of a head turns with the row, half with the column.
    size = config.hidden_size // config.num_heads // 2
    return 1.0 / (ROPE_THETA ** (torch.arange(0, size, 2, dtype=torch.float, device="cpu") / size))


def see(module: nn.Module, pictures: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Return what a bound vision encoder returns for PIL pictures (RGB): (tokens of all pictures, width)."""
    dtype = next(module.parameters()).dtype
    patches = torch.from_numpy(np.concatenate([patches_of(one) for one in pictures]))
    grids = torch.tensor([(1, *grid_of(one.size)) for one in pictures], device=device)
    return cast("Any", module)(patches.to(device=device, dtype=dtype), grid_thw=grids).pooler_output


def patches_of(picture: Any) -> NDArray[np.float32]:
    """Return the normalised patches of a PIL picture (RGB), as transformers' ``Qwen2VLImageProcessor`` makes them.

    Returns (patches, values), the patches of one token after another. A picture is a frame that stands still.
    """
    rows, columns = grid_of(picture.size)
    resized = picture.resize((columns * PATCH, rows * PATCH), resample=PILImage.Resampling.BICUBIC)
    plain = (np.asarray(resized).astype(np.float64) * (1 / 255)).astype(np.float32)
    values = (plain - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    split = values.reshape(rows // MERGED, MERGED, PATCH, columns // MERGED, MERGED, PATCH, CHANNELS)
    # The order: token row, token column, patch row, patch column, colour, frame, pixel row, pixel column.
    patches = split.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    shape = (*patches.shape[:5], FRAMES, *patches.shape[6:])
    return np.broadcast_to(patches, shape).reshape(rows * columns, -1)
