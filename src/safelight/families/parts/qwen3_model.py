"""Computes Qwen3 as a text encoder: its module, its tokens, its hidden states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn

from safelight.boundary import exports, modules
from safelight.families.family_model import PromptText, TextInput, TextInputs
from safelight.families.parts.qwen3 import PAD, SHIPPED, Qwen3Config
from safelight.families.parts.tokenizer import check, content, load
from safelight.families.tokenizer_file import TokenizerContent

ENDING = "<|im_end|>\n<|im_start|>assistant\n"
"""What follows a prompt in the chat template."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The part of Qwen3's chat template that diffusers' pipelines use, for exported folders."""

EMBEDDINGS = "embed_tokens.weight"
"""The table of embeddings."""

CAUSAL_MASK = "transformers.masking_utils:create_causal_mask"

ROPE_THETA = 1e6
NORM_EPSILON = 1e-6
POSITIONS = 40960


def tokenizer(own: TokenizerContent | None = None) -> Tokenizer:
    """Return Qwen3's tokenizer. ``own``: that of the checkpoint; None for Safelight's."""
    return load(SHIPPED, own)


def chat(prompt: str, thinking: bool) -> str:
    """Return a prompt in Qwen3's chat template, as the user's message, followed by the start of the answer.

    ``thinking``: the template's ``enable_thinking``. Without it, the answer begins with an empty thought.
    """
    answer = "" if thinking else "<think>\n\n</think>\n\n"
    return f"<|im_start|>user\n{prompt}{ENDING}{answer}"


def tokens_of(text: str, most: int, by: Tokenizer) -> tuple[list[int], str]:
    """Return the token ids of a text, at most ``most``, and the part of the text that they leave out."""
    encoding = by.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= most:
        return encoding.ids, ""
    return encoding.ids[:most], text[encoding.offsets[most][0] :]


def text_inputs(texts: Sequence[PromptText], thinking: bool, most: int, own: TokenizerContent | None) -> TextInputs:
    """Tokenize prompts in the chat template, at most ``most`` tokens of each. ``own``: as in :func:`tokenizer`."""
    read = {pair: tokens_of(chat(pair.text, thinking), most, tokenizer(own)) for pair in texts}
    # The template's ending comes after the prompt, so it is cut off first.
    end = len(chat("", thinking).partition("user\n")[2])
    cut = {pair: left[:-end] for pair, (_, left) in read.items() if len(left) > end}
    return TextInputs({pair: TextInput(ids, json.dumps(ids)) for pair, (ids, _) in read.items()}, cut=cut)


def build(config: Qwen3Config, final_norm: bool = False) -> nn.Module:
    """Build the module on the current default device. It returns the last hidden layer.

    ``final_norm``: it normalises the layer.
    """
    settings = modules.library_class("transformers.models.qwen3.configuration_qwen3:Qwen3Config")(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_size,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=NORM_EPSILON,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    module = modules.library_class("transformers.models.qwen3.modeling_qwen3:Qwen3Model")(settings)
    if not final_norm:
        module.norm = nn.Identity()
    return module


def save_tokenizer(folder: Path, own: TokenizerContent | None) -> tuple[str, str]:
    """Save the tokenizer into an exported folder. Returns the name of its folder and its class.

    ``own``: as in :func:`tokenizer`.
    """
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    exports.save_tokenizer_file(
        folder / "tokenizer", content(SHIPPED, own), {"tokenizer_class": "Qwen2Tokenizer", **settings}
    )
    return "tokenizer", "Qwen2Tokenizer"


def frequencies(config: Any, theta: float = ROPE_THETA) -> torch.Tensor:
    """Return the frequencies of the rotary embedding, fp32, on the CPU. ``config``: transformers' settings."""
    sizes = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").to(dtype=torch.float)
    return 1.0 / (theta ** (sizes / config.head_dim))


def hidden_states(module: nn.Module, ids: list[int], length: int, device: torch.device) -> torch.Tensor:
    """Return the hidden states (1, n, width) of the n tokens.

    ``length``: the tokens are padded to this number, as diffusers' pipelines do; the padding is hidden by the mask.
    """
    padded, mask = _padded(ids, length, cast("Any", module).config.vocab_size, device)
    out = cast("Any", module)(input_ids=padded, attention_mask=mask, use_cache=False)
    return out.last_hidden_state[:, : len(ids)]


def states_after(
    module: nn.Module, ids: list[int], length: int, layers: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    """Return the hidden states (1, length, width) after some layers, padding included. Later layers are not computed.

    ``length``: as in :func:`hidden_states`.
    ``layers``: numbers of layers, from 1, in ascending order.
    """
    padded, mask = _padded(ids, length, cast("Any", module).config.vocab_size, device)
    return states_at(module, padded, mask, torch.arange(length, device=device).unsqueeze(0), layers)


def states_at(
    module: nn.Module, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, layers: Sequence[int]
) -> list[torch.Tensor]:
    """Return the hidden states (1, n, width) after some layers. Later layers are not computed.

    ``tokens``: token ids, (1, n).
    ``mask``: (1, n), False for tokens that others do not see.
    ``positions``: of the tokens, as the module's rotary embedding wants them.
    ``layers``: numbers of layers, from 1, in ascending order.
    """
    # This is the loop of transformers' forward method. That method has no hidden states of its own: it reads them with
    # hooks, which stay in the module, and it always computes all layers.
    model = cast("Any", module)
    states = model.embed_tokens(tokens)
    causal = modules.library_class(CAUSAL_MASK)(
        config=model.config, inputs_embeds=states, attention_mask=mask, past_key_values=None, position_ids=None
    )
    rotary = model.rotary_emb(states, positions)
    found: list[torch.Tensor] = []
    for number, layer in enumerate(model.layers[: layers[-1]], 1):
        states = layer(states, attention_mask=causal, position_embeddings=rotary)
        if number in layers:
            found.append(states)
    return found


def _padded(ids: list[int], length: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens (1, length) with padding, and the mask (1, length) that is False for the padding.

    ``rows``: of the table of embeddings.
    """
    check(ids, rows, EMBEDDINGS)
    padded = torch.tensor([ids + [PAD] * (length - len(ids))], device=device)
    return padded, torch.tensor([[True] * len(ids) + [False] * (length - len(ids))], device=device)
