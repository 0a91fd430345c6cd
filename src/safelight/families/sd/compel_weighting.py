"""Weights prompts with compel, as InvokeAI does.

Only this module imports the package; ``compel_syntax.py`` loads just compel's parser file, without torch.

compel 2.5.1 uses ``text_encoder.text_model``, which transformers 5 no longer has, and applies its own clip skip. So it
gets stand-ins: a tokenizer with Safelight's vocabulary file, and an encoder that returns the hidden states for the
base's UNet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from safelight.families.sd.encoding import EncoderOutput
from safelight.request.prompts.tokens import END, POSITIONS, START, tokens_of, vocabulary
from safelight.request.prompts.words import InversionTokens, cut

RunEncoder = Callable[[torch.Tensor, torch.Tensor | None], EncoderOutput]


class _Tokenizer:
    """The part of a tokenizer that compel uses. ``inversion_tokens``: token ids by word of a textual inversion."""

    bos_token_id, eos_token_id, model_max_length = START, END, POSITIONS

    def __init__(self, inversion_tokens: InversionTokens, pad_id: int) -> None:
        self.pad_token_id = pad_id
        self._inversion_tokens = inversion_tokens

    def __call__(self, texts: Sequence[str], truncation: bool, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._ids(text, truncation) for text in texts]}

    def _ids(self, text: str, truncation: bool) -> list[int]:
        pieces = cut(text, self._inversion_tokens)
        ids = [token for piece in pieces for token in (piece if isinstance(piece, tuple) else tokens_of(piece))]
        return [START, *(ids[: POSITIONS - 2] if truncation else ids), END]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        known = vocabulary()
        return [known[token] for token in ids]


class _Encoder:
    """The part of a text encoder that compel uses. Its last hidden state is the one for the UNet."""

    def __init__(self, run_encoder: RunEncoder, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.dtype = dtype
        self._run_encoder = run_encoder

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **_: Any) -> SimpleNamespace:
        hidden, pooled = self._run_encoder(ids, mask)
        return SimpleNamespace(last_hidden_state=hidden, pooler_output=pooled)


class CompelEncoder:
    """compel with a bound text encoder.

    ``run_encoder``: runs the encoder on token ids and a mask.
    ``dtype``: the encoder's.
    ``pooled``: also return the pooled output of the plain text.
    """

    def __init__(
        self,
        run_encoder: RunEncoder,
        dtype: torch.dtype,
        inversion_tokens: InversionTokens,
        pad_id: int,
        device: torch.device,
        pooled: bool,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The import loads diffusers pipelines that nothing else needs.
            from compel import Compel
        stand_in: Any = _Encoder(run_encoder, dtype, device)
        tokenizer: Any = _Tokenizer(inversion_tokens, pad_id)
        self._pooled = pooled
        self._compel = Compel(
            tokenizer=tokenizer,
            text_encoder=stand_in,
            truncate_long_prompts=False,
            device=device,  # pyright: ignore[reportArgumentType]
        )

    def encoded(self, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode a prompt: hidden states (1, 77 * chunks, width), and the plain text's pooled output or None."""
        conjunction = self._compel.parse_prompt_string(text)
        hidden = self._compel.build_conditioning_tensor_for_conjunction(conjunction)[0]
        provider: Any = self._compel.conditioning_provider
        return hidden, provider.get_pooled_embeddings([text]) if self._pooled else None

    def padded(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pad all hidden states to the length of the longest, with those of an empty prompt."""
        return self._compel.pad_conditioning_tensors_to_same_length(list(hidden))
