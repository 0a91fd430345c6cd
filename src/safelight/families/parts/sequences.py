"""Texts as sequences of tokens, as transformers read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from safelight.families.family_model import Tensors


def join_texts(rows: Sequence[Tensors]) -> Tensors:
    """Join the ``hidden`` states (1, tokens, width) of texts that differ in length.

    Returns the states, padded to one length, and each text's ``length``.
    """
    states = [row["hidden"][0] for row in rows]
    lengths = torch.tensor([len(one) for one in states])
    return {"hidden": nn.utils.rnn.pad_sequence(states, batch_first=True), "length": lengths}
