"""Images and texts as sequences of tokens, as transformers read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from safelight.families.family_model import Tensors, change_each
from safelight.families.parts.tokens import PATCH


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (n, channels, height, width) as tokens (n, tokens, values)."""
    count, channels, height, width = latents.shape
    squares = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * PATCH**2)


def unpack(found: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return tokens (n, rows * columns, values) as latents (n, channels, height, width)."""
    squares = found.reshape(len(found), rows, columns, -1, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(found), -1, rows * PATCH, columns * PATCH)


def image_positions(latents: torch.Tensor, number: int = 0) -> torch.Tensor:
    """Return the positions of the tokens of latents, (tokens, 3): number, row, column. fp32, on the CPU.

    ``number``: 0 for the image, 1 for the reference image.
    """
    rows, columns = (side // PATCH for side in latents.shape[-2:])
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, number), row, column], dim=-1).reshape(-1, 3).float()


def join_texts(rows: Sequence[Tensors]) -> Tensors:
    """Join the ``hidden`` states (1, tokens, width) of texts that differ in length.

    Returns the states, padded to one length, and each text's ``length``.
    """
    states = [row["hidden"][0] for row in rows]
    lengths = torch.tensor([len(one) for one in states])
    return {"hidden": nn.utils.rnn.pad_sequence(states, batch_first=True), "length": lengths}


def lengthen(control: Tensors, tokens: int) -> Tensors:
    """Return what ControlNets add, with zeros for more ``tokens``: they do not see reference images."""
    return change_each(control, lambda one: F.pad(one, (0, 0, 0, tokens))) if tokens else control
