"""Computes the language model of Qwen2.5-VL as a text encoder: its module, its tokens, its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn

from safelight.boundary import exports, modules
from safelight.families.parts.qwen25 import PICTURE_TOKEN, SHIPPED, Qwen25Config
from safelight.families.parts.qwen25_vision import MERGED, Grid, count_tokens
from safelight.families.parts.tokenizer import check, content, load
from safelight.families.tokenizer_file import TokenizerContent

PICTURE = "<|image_pad|>"
"""The text of :data:`PICTURE_TOKEN`."""

EMBEDDINGS = "embed_tokens.weight"
"""The table of embeddings."""

ROPE_THETA = 1e6
NORM_EPSILON = 1e-6
POSITIONS = 128000


def tokenizer(own: TokenizerContent | None = None) -> Tokenizer:
    """Return Qwen2.5's tokenizer. ``own``: that of the checkpoint; None for Safelight's."""
    return load(SHIPPED, own)


def save_tokenizer(folder: Path, length: int, own: TokenizerContent | None) -> tuple[str, str]:
    """Save the tokenizer into an exported folder. Returns the name of its folder and its class.

    ``length``: the most tokens of a prompt.
    ``own``: as in :func:`tokenizer`.
    """
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": length, **tokens}
    exports.save_tokenizer_file(folder / "tokenizer", content(SHIPPED, own), settings)
    return "tokenizer", "Qwen2Tokenizer"


def build(config: Qwen25Config) -> nn.Module:
    """Build the module on the current default device."""
    half = config.head_size // 2
    quarter = half // 4
    settings = modules.library_class("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl:Qwen2_5_VLTextConfig")(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            # Components of a head that turn with the frame, the row and the column of a picture: of 64, 16, 24 and 24.
            "mrope_section": [quarter, (half - quarter) // 2, (half - quarter) // 2],
        },
        attn_implementation="sdpa",
    )
    return modules.library_class("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLTextModel")(settings)


def frequencies(config: Any) -> torch.Tensor:
    """Return the frequencies of the rotary embedding, fp32, on the CPU. ``config``: transformers' settings."""
    size = config.hidden_size // config.num_attention_heads
    return 1.0 / (ROPE_THETA ** (torch.arange(0, size, 2, dtype=torch.float, device="cpu") / size))


def hidden_states(module: nn.Module, ids: list[int], device: torch.device) -> torch.Tensor:
    """Return the hidden states (1, tokens, width) after the final norm."""
    check(ids, cast("Any", module).config.vocab_size, EMBEDDINGS)
    tokens = torch.tensor([ids], device=device)
    out = cast("Any", module)(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return out.last_hidden_state


def with_pictures(ids: Sequence[int], grids: Sequence[Grid]) -> list[int]:
    """Return token ids with as many tokens for each picture as it has, in place of one. ``grids``: of the pictures."""
    counts = iter([count_tokens(grid) for grid in grids])
    return [token for one in ids for token in [one] * (next(counts) if one == PICTURE_TOKEN else 1)]


def positions(ids: Sequence[int], grids: Sequence[Grid]) -> torch.Tensor:
    """Return the positions of tokens, (3, 1, tokens): frame, row, column; as transformers' ``get_rope_index``.

    The three are equal for a token of the text. ``ids``: from :func:`with_pictures`.
    """
    parts: list[torch.Tensor] = []
    start = at = 0
    for grid in grids:
        first = ids.index(PICTURE_TOKEN, at)
        parts.append(torch.arange(start, start + first - at).expand(3, -1))
        start += first - at
        rows, columns = (side // MERGED for side in grid)
        axes = torch.arange(1), torch.arange(rows), torch.arange(columns)
        parts.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1) + start)
        start, at = start + max(rows, columns), first + rows * columns
    parts.append(torch.arange(start, start + len(ids) - at).expand(3, -1))
    return torch.cat(parts, dim=1).unsqueeze(1)


def hidden_states_with_pictures(
    module: nn.Module, ids: list[int], grids: Sequence[Grid], seen: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return the hidden states (1, tokens, width) after the final norm, of a text with pictures.

    ``ids``: from :func:`with_pictures`.
    ``seen``: what the vision encoder returned for the pictures, (tokens of all pictures, width).
    """
    check(ids, cast("Any", module).config.vocab_size, EMBEDDINGS)
    language, tokens = cast("Any", module), torch.tensor([ids], device=device)
    states = language.embed_tokens(tokens)
    places = (tokens == PICTURE_TOKEN).unsqueeze(-1)
    out = language(
        inputs_embeds=states.masked_scatter(places, seen.to(states.dtype)),
        position_ids=positions(ids, grids).to(device),
        attention_mask=torch.ones_like(tokens),
        use_cache=False,
    )
    return out.last_hidden_state
