"""The prompts of the variants that edit: texts with pictures, for the text encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from safelight.errors import RequestError
from safelight.families.family_model import (
    PromptText,
    Reference,
    ReferencePrompts,
    Tensors,
    TextInput,
    TextInputs,
)
from safelight.families.parts import qwen25_model, qwen25_vision_model
from safelight.families.parts.qwen3_model import tokens_of
from safelight.families.parts.qwen25_vision import Grid, grid_of
from safelight.families.parts.qwen_chat import ENDING
from safelight.families.qwen_image.spec import EDIT
from safelight.families.tokenizer_file import TokenizerContent

BEGINNING = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
"""What precedes the pictures and the prompt."""

BEGINNING_TOKENS = 64
"""How many tokens this is. The transformer does not read their hidden states."""

PROMPT_TOKENS = 1024
"""The most tokens after :data:`BEGINNING`, of which each picture is one: diffusers' ``tokenizer_max_length``.

diffusers cuts off nothing. It has frequencies for some 4000 tokens, and an error for a longer text.
"""

_PICTURE = f"<|vision_start|>{qwen25_model.PICTURE}<|vision_end|>"


@dataclass(frozen=True, slots=True)
class TextWithPictures:
    """A text with pictures. ``ids``: its token ids. ``grids``: of the pictures, in the order of their tokens."""

    ids: list[int]
    grids: tuple[Grid, ...]


class EditPrompts(ReferencePrompts):
    """The prompts of the variants that edit."""

    def text_inputs(
        self,
        variant: str,
        texts: Sequence[PromptText],
        references: Sequence[Reference],
        tokenizer: TokenizerContent | None,
    ) -> TextInputs:
        by = qwen25_model.tokenizer(tokenizer)
        grids = tuple(grid_of(one.picture.size) for one in references)
        shown = _pictures(len(references), numbered=variant != EDIT)
        digests = [one.digest for one in references]
        each: dict[PromptText, TextInput] = {}
        cut: dict[PromptText, str] = {}
        for pair in texts:
            if qwen25_model.PICTURE in pair.text:
                problem = f"has {qwen25_model.PICTURE}, which stands for a picture; leave it out and use references"
                raise RequestError(pair.field, pair.text[:80], problem)
            text, most = f"{BEGINNING}{shown}{pair.text}{ENDING}", BEGINNING_TOKENS + PROMPT_TOKENS
            read, left = tokens_of(text, most, by)
            ids = qwen25_model.with_pictures(read, grids)
            key = json.dumps([ids, digests, grids])
            each[pair] = TextInput(TextWithPictures(ids, grids), key, tokens=len(ids))
            # The template's ending comes after the prompt, so it is cut off first.
            if len(left) > len(ENDING):
                cut[pair] = left[: -len(ENDING)]
        return TextInputs(each, cut=cut)

    def see(self, module: nn.Module, references: Sequence[Reference], device: torch.device) -> Tensors:
        return {"hidden": qwen25_vision_model.see(module, [one.picture for one in references], device)}

    def encode_texts(
        self, module: nn.Module, inputs: Sequence[TextInput], seen: Tensors, device: torch.device
    ) -> list[Tensors]:
        texts: list[TextWithPictures] = [one.value for one in inputs]
        found = (
            qwen25_model.hidden_states_with_pictures(module, one.ids, one.grids, seen["hidden"], device)
            for one in texts
        )
        return [{"hidden": one[:, BEGINNING_TOKENS:]} for one in found]


def _pictures(count: int, numbered: bool) -> str:
    """Return the text of so many pictures. With ``numbered`` as in diffusers' ``QwenImageEditPlusPipeline``."""
    return "".join((f"Picture {number}: " if numbered else "") + _PICTURE for number in range(1, count + 1))
