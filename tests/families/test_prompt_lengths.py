"""What a family says of the length of prompts is what its text encoders read."""

from __future__ import annotations

import pytest

from safelight.families.components import Component
from safelight.families.family import Family
from safelight.families.family_model import PromptText, family_model
from safelight.families.registry import families
from safelight.request.schema import Request


def limited() -> list[tuple[Family, Component, str]]:
    """The text encoders that cut off prompts, with each variant that has a limit of its own."""
    return [
        (family, family.component(role), variant)
        for family in families().values()
        for role in family.text_encoders
        for variant in ("", *family.component(role).most_tokens_of)
        if family.component(role).most_tokens
    ]


@pytest.mark.parametrize(
    ("family", "component", "variant"),
    [pytest.param(*one, id=f"{one[0].name}-{one[1].role}-{one[2]}") for one in limited()],
)
def test_a_prompt_is_cut_off_where_the_family_says(family: Family, component: Component, variant: str) -> None:
    most = component.most_tokens_of.get(variant, component.most_tokens)
    # " apple" is one token of each tokenizer.
    fits, longer = (PromptText("prompt", "apple" + " apple" * (count - 1)) for count in (most, most + 1))
    guidance = None if variant == "schnell" else 3.5
    request = Request("", "model", guidance=guidance)
    other = PromptText("prompt", longer.text.removesuffix("apple") + "pear")
    found = family_model(family).text_inputs(family, component.role, request, [fits, longer, other], {})
    assert component.tokenizer is not None
    if component.tokenizer.shipped is not None and component.tokenizer.shipped.name == "CLIP":
        # What FLUX's CLIP leaves out is not said, because T5 reads it.
        assert found.each[longer] == found.each[other] == found.each[fits]
        return
    assert fits not in found.cut
    assert found.cut[longer].strip() == "apple"
    assert found.cut[other].strip() == "pear"


def test_every_family_that_cuts_off_prompts_is_here() -> None:
    names = {family.name for family, _, _ in limited()}
    assert names >= {"flux", "flux2-klein", "chroma", "qwen-image", "krea-2", "anima", "z-image"}
