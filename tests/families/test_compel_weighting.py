"""What text encoders make of compel's prompts equals what compel makes of them, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from compel import Compel
from support import checkpoints, oracle
from support.scale import thinned, times

from safelight.families.sd.compel_weighting import CompelEncoder
from safelight.request.prompts.tokens import END

PIECES = ("red apple", "blue, dark house", "a cat.", "word", "((small)1.2 dog)1.3", "(dark)0.6", "shiny++", "old--")
LONG = (*PIECES, *(f"number{n}, and a sentence of words." for n in range(12)))


def prompt(chance: random.Random) -> str:
    words = " ".join(chance.choice(PIECES) for _ in range(chance.randint(1, 5)))
    match chance.randrange(5):
        case 0:
            return (
                f'("{words}", "{chance.choice(PIECES)}").blend({chance.choice(("", "0.7, 0.3", "1, 2, no_normalize"))})'
            )
        case 1:
            return f'("{words}", "{chance.choice(PIECES)}").and({chance.choice(("", "1.0, 0.5"))})'
        case 2:
            return " ".join(chance.choice(LONG) for _ in range(chance.randint(14, 40)))
        case _:
            return words


@pytest.mark.full
@pytest.mark.parametrize("dtype", thinned([torch.bfloat16, torch.float32]), ids=str)
@pytest.mark.parametrize("pad", thinned(["<|endoftext|>", "!"]))
def test_hidden_states_are_those_of_compel(dtype: torch.dtype, pad: str) -> None:
    module: Any = checkpoints.modules("sd1", 1)["text_encoder"].to(dtype)
    pad_id = END if pad != "!" else 0

    def run_encoder(ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        return module(ids, attention_mask=mask).last_hidden_state, None

    ours = CompelEncoder(run_encoder, dtype, {}, pad_id, torch.device("cpu"), pooled=False)
    theirs = Compel(oracle.tokenizer(pad), oracle.EncoderForCompel(module), truncate_long_prompts=False)  # type: ignore[arg-type]
    chance, chunks = random.Random(pad_id), set[int]()
    with torch.no_grad():
        for _ in range(times(8, 200)):
            pair = [prompt(chance), prompt(chance)]
            right = theirs.pad_conditioning_tensors_to_same_length([theirs(text) for text in pair])
            made = ours.padded([ours.encoded(text)[0] for text in pair])
            assert all(torch.equal(one, other) for one, other in zip(made, right, strict=True)), pair
            chunks.add(made[0].shape[1] // 77)
    assert len(chunks) > 2
