"""How long a prompt is for the text encoders of a model that read it as it is written. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safelight.families.family import Family
from safelight.families.parts.tokenizer import load
from safelight.families.tokenizer_file import TokenizerContent


@dataclass(frozen=True, slots=True)
class PromptLength:
    """The length of a prompt for a text encoder.

    ``role``: of the text encoder. ``name``: of its tokenizer.
    ``tokens``: how many the prompt has; tokens that the family adds do not count.
    ``most``: how many the family reads; the rest is cut off. 0 if it reads all.
    """

    role: str
    name: str
    tokens: int
    most: int


def prompt_lengths(
    family: Family, variant: str, own: Mapping[str, TokenizerContent | None], text: str
) -> list[PromptLength]:
    """Return the length of a prompt for each text encoder.

    ``own``: the checkpoint's own tokenizers, by role. Text encoders without any tokenizer are left out.
    """
    found: list[PromptLength] = []
    for role in family.text_encoders:
        component = family.component(role)
        shipped = None if component.tokenizer is None else component.tokenizer.shipped
        if shipped is None and own.get(role) is None:
            continue
        ids = load(shipped, own.get(role)).encode(text, add_special_tokens=False).ids
        most = component.most_tokens_of.get(variant, component.most_tokens)
        found.append(PromptLength(role, role if shipped is None else shipped.name, len(ids), most))
    return found
