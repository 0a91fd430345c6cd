"""From prompts to images: edits between steps, compel's syntax, and what is kept of what text encoders made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from support import adapters, controls, oracle
from support.scale import thinned, times

import safelight
from safelight.errors import RequestError
from safelight.families.sd import encoding
from safelight.pipeline.conditioning import EmbeddingCache
from safelight.request.adapters import Lora
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine

Ask = Callable[..., Request]


def sha(engine: LocalEngine, request: Request) -> str:
    return next(engine.generate(request)).pixels_sha256


def array(image: Image) -> np.ndarray:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


# Prompts that change between steps


@pytest.mark.parametrize(
    ("base", "name", "seed"),
    thinned([("sdxl", "xl.safetensors", 4), ("sd1", "a.safetensors", 1)], unpack=True),
    ids=["sdxl", "sd1"],
)
def test_a_changing_prompt_equals_diffusers_with_embeddings_that_change_between_steps(
    engine: LocalEngine, ask: Ask, base: str, name: str, seed: int
) -> None:
    pipe = oracle.pipeline(base, seed)
    texts = ["red apple", "red apple", "blue house", "blue house"]
    told = {
        text: pipe.encode_prompt(
            text,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt="dark",
        )
        for text in dict.fromkeys(texts)
    }

    def change(_: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step + 1 == len(texts):
            return {}
        found = told[texts[step + 1]]
        if base == "sd1":
            return {"prompt_embeds": torch.cat([found[1], found[0]])}
        return {"prompt_embeds": torch.cat([found[1], found[0]]), "add_text_embeds": torch.cat([found[3], found[2]])}

    names = ["latents", "prompt_embeds", *(["add_text_embeds"] if base == "sdxl" else [])]
    right = oracle.pixels(
        pipe, "red apple", "dark", 4, 7, 6.0, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names
    )
    asked = ask(name, prompt="[red apple:blue house:0.5]", negative="dark", steps=4, seed=7, cfg=6.0)
    assert next(engine.generate(asked)).pixels == right


@pytest.mark.parametrize("sampler", thinned(["dpm2", "euler", "heun", "pndm"]))
def test_edits_count_steps_whatever_the_sampler_calls(engine: LocalEngine, ask: Ask, sampler: str) -> None:
    """Where both texts are the same an edit changes nothing; at the ends it is one of them."""
    first, then = (sha(engine, ask(prompt=text, steps=4, sampler=sampler)) for text in ("red", "blue"))
    assert sha(engine, ask(prompt="[red:blue:0]", steps=4, sampler=sampler)) == then
    assert sha(engine, ask(prompt="[red:blue:1.0]", steps=4, sampler=sampler)) == first
    assert sha(engine, ask(prompt="[red|red]", steps=4, sampler=sampler)) == first
    assert sha(engine, ask(prompt="[red:blue:0.5]", steps=4, sampler=sampler)) not in (first, then)


def test_what_is_edited_may_be_longer_than_a_chunk(engine: LocalEngine, ask: Ask) -> None:
    long = ", ".join(f"word{n}" for n in range(60))
    made = {sha(engine, ask(prompt=f"[red:{long}:{when}]", steps=2)) for when in ("1", "2")}
    assert len(made) == 2


def test_an_edit_that_is_none_is_an_error_before_the_job(engine: LocalEngine, ask: Ask) -> None:
    with pytest.raises(RequestError, match="at character 0"):
        engine.generate(ask(prompt="[a:b:c:0.5]"))


# compel


PROMPTS = (
    "a red++ apple",
    "a red-- apple",
    "a (red shiny)1.4 apple, (dark)0.6",
    '("red apple", "blue house").blend(0.7, 0.3)',
    '("red apple", "blue house").and()',
    '("red apple", "blue house").and(1.0, 0.5)',
    "((nested)1.2 words)1.3",
    "plain words",
    ", ".join(f"word{n}" for n in range(60)),
)


@pytest.mark.parametrize("prompt", thinned(PROMPTS, 3), ids=[*PROMPTS[:-1], "60 words"])
def test_prompts_in_compels_syntax_equal_those_of_compel(engine: LocalEngine, ask: Ask, prompt: str) -> None:
    pipe = oracle.pipeline("sd1", 1)
    theirs = Compel(
        tokenizer=pipe.tokenizer, text_encoder=oracle.EncoderForCompel(pipe.text_encoder), truncate_long_prompts=False
    )
    torch.set_num_threads(1)
    told = theirs.pad_conditioning_tensors_to_same_length([theirs(prompt), theirs("dark")])
    right = oracle.pixels(pipe, None, None, 2, 3, 7.0, prompt_embeds=told[0], negative_prompt_embeds=told[1])  # type: ignore[arg-type]
    asked = ask(prompt=prompt, negative="dark", seed=3, prompt_syntax="compel")
    assert next(engine.generate(asked)).pixels == right


def test_compels_syntax_for_both_encoders_of_sdxl(engine: LocalEngine, ask: Ask) -> None:
    pipe = oracle.pipeline("sdxl", 4)
    torch.set_num_threads(1)
    told: dict[str, list[torch.Tensor]] = {}
    kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    prompts = ("a red++ apple", "dark--")
    for tokenizer, encoder, pooled in (
        (pipe.tokenizer, pipe.text_encoder, False),
        (pipe.tokenizer_2, pipe.text_encoder_2, True),
    ):
        theirs = Compel(
            tokenizer=tokenizer, text_encoder=oracle.EncoderForCompel(encoder), truncate_long_prompts=False,
            returned_embeddings_type=kind,
        )  # fmt: skip
        for prompt in prompts:
            told.setdefault(prompt, []).append(theirs(prompt))
            if pooled:
                ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
                told[prompt].append(encoder(ids).text_embeds)
    (a, b, pool), (c, d, other) = told[prompts[0]], told[prompts[1]]
    right = oracle.pixels(
        pipe, None, None, 2, 3, 7.0,  # type: ignore[arg-type]
        prompt_embeds=torch.cat([a, b], -1), negative_prompt_embeds=torch.cat([c, d], -1),
        pooled_prompt_embeds=pool, negative_pooled_prompt_embeds=other,
    )  # fmt: skip
    asked = ask("xl.safetensors", prompt=prompts[0], negative=prompts[1], seed=3, prompt_syntax="compel")
    assert next(engine.generate(asked)).pixels == right


def test_compel_with_clip_skip_and_an_embedding(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    engine.catalog.adapters.add(controls.inversion(tmp_path / "thing.safetensors"))
    made = [
        sha(engine, ask(prompt=prompt, prompt_syntax="compel", clip_skip=skip))
        for prompt, skip in (("a thing++", 0), ("a thing++", 1), ("a thing", 0))
    ]
    assert len(set(made)) == 3
    assert made[2] == sha(engine, ask(prompt="a thing"))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ('("a", "b").blend(0.7)', r"\.blend\(\) has 2 prompts, but 1 weights"),
        ("a cat.swap(dog) sat", "swap"),
        ("a withLora(style, 0.5)", "withLora"),
    ],
)
def test_what_compel_cannot_do_is_an_error(engine: LocalEngine, ask: Ask, prompt: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        engine.generate(ask(prompt=prompt, prompt_syntax="compel"))


# What is kept


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a text encoder was called."""
    calls: list[int] = []
    original = encoding.normed_layer

    def read(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(encoding, "normed_layer", read)
    return calls


def test_what_was_encoded_is_not_encoded_again(root: Path, ask: Ask, reads: list[int]) -> None:
    engine = safelight.open_engine(root)
    right = sha(engine, ask(prompt="red", negative="dark"))
    assert len(reads) == 2
    assert sha(engine, ask(prompt="red", negative="dark")) == right
    assert len(reads) == 2
    sha(engine, ask(prompt="red", negative="light"))
    assert len(reads) == 3


def test_state_13_what_is_kept_is_known_by_everything_that_went_in(
    root: Path, ask: Ask, reads: list[int], tmp_path: Path
) -> None:
    """Checkpoint, CLIP skip, adapters and their strengths, words: each makes another."""
    engine = safelight.open_engine(root)
    lora = str(adapters.write(tmp_path / "one.safetensors"))
    engine.catalog.adapters.add(controls.inversion(tmp_path / "thing.safetensors"))
    kinds: list[dict[str, Any]] = [
        {},
        {"name": "b.safetensors"},
        {"clip_skip": 1},
        {"loras": (Lora(lora, 0.5),)},
        {"loras": (Lora(lora, 0.6),)},
        {"prompt_syntax": "compel"},
        {"precision": "bf16"},
    ]
    asked = [ask(prompt="a (thing:1.2)", **kind) for kind in kinds]
    asked += [ask(prompt="a (thing:1.2)", embeddings=())]
    right = [sha(safelight.open_engine(engine.library.root), one) for one in asked]
    reads.clear()
    for _ in range(times(1, 2)):
        assert [sha(engine, one) for one in asked] == right
    for at in (3, 0, 7, 1, 6, 2, 5, 4)[: times(4, 8)]:
        assert sha(engine, asked[at]) == right[at]
    assert len(set(right)) == len(right)


def test_state_14_the_empty_prompt_is_encoded_by_the_jobs_own_weights(
    engine: LocalEngine, ask: Ask, tmp_path: Path
) -> None:
    lora = Lora(str(adapters.write(tmp_path / "one.safetensors")), 1.0)
    right = {with_it: sha(safelight.open_engine(engine.library.root), ask(loras=loras)) for with_it, loras in
             ((False, ()), (True, (lora,)))}  # fmt: skip
    for with_it in (True, False, True, False):
        assert sha(engine, ask(loras=(lora,) if with_it else ())) == right[with_it]


def test_what_was_spoiled_is_encoded_again(root: Path, ask: Ask, reads: list[int]) -> None:
    engine = safelight.open_engine(root)
    right = sha(engine, ask())
    for encoded, _ in engine.resources.embedding_cache._cached.values():
        encoded["hidden"].add_(1)
    assert sha(engine, ask()) == right
    assert len(reads) == 4


def test_little_is_kept() -> None:
    kept = EmbeddingCache(max_bytes=1000)
    for number in range(10):
        kept.put(str(number), {"hidden": torch.full((1, 50), float(number))})
        assert kept.nbytes <= 1000
    assert kept.get("0") is None
    assert kept.get("9") is not None
    kept.clear()
    assert kept.nbytes == 0


def test_what_spoiled_weights_encoded_goes_with_them(root: Path, ask: Ask) -> None:
    """Weights are proven now and then: what was encoded before they were found to be spoiled is not kept."""
    engine = safelight.open_engine(root, verify_transfers="off")
    right = {text: sha(engine, ask(prompt=text)) for text in ("blue house", "red apple")}
    engine.resources.embedding_cache.clear()
    for piece, held in engine.resources.residency.table.residents.items():
        if piece.component_key.startswith("text_encoder"):
            next(iter(held.buffer.tensors.values())).data.mul_(1.5)
    assert sha(engine, ask(prompt="blue house")) != right["blue house"]
    assert engine.image_repairer.check()
    assert sha(engine, ask(prompt="blue house")) == right["blue house"]


def test_a_compel_prompt_whose_other_half_was_let_go(engine: LocalEngine, ask: Ask) -> None:
    long = ", ".join(f"word{n}" for n in range(60))
    asked = ask(prompt="red apple", negative=long, prompt_syntax="compel")
    right = sha(engine, asked)
    engine.resources.embedding_cache._cached.popitem(last=False)
    assert sha(engine, asked) == right


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("((((((((a))))))))", "more than 4 nested brackets"),
        ("a" + "+" * 900, "is over 100|is not a prompt in compel's syntax"),
        ('("a", "b").blend(0, 0)', "add up to 0"),
        ("word " * 3000, "longer than 32 chunks"),
    ],
)
def test_what_compel_would_choke_on_is_an_error(engine: LocalEngine, ask: Ask, prompt: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        engine.generate(ask(prompt=prompt, prompt_syntax="compel"))


def test_texts_between_steps_are_bounded(engine: LocalEngine, ask: Ask) -> None:
    many = "[" + "|".join(f"a{n}" for n in range(150)) + "]" + " word" * 400
    with pytest.raises(RequestError, match="texts of"):
        engine.generate(ask(prompt=many, steps=150))


def test_edits_count_the_steps_that_are_computed(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    """From a picture half of them; in a second pass all edits are over."""
    path = str(controls.picture(tmp_path / "in.png"))
    half = {"image": path, "strength": 0.5, "steps": 4}
    assert sha(engine, ask(prompt="[red:blue:2]", **half)) == sha(engine, ask(prompt="red", **half))
    assert sha(engine, ask(prompt="[red:blue:1]", **half)) != sha(engine, ask(prompt="red", **half))
    twice = {"hires_scale": 1.5, "hires_strength": 0.5, "steps": 4}
    made = {prompt: sha(engine, ask(prompt=prompt, **twice)) for prompt in ("red", "blue", "[red:blue:4]")}
    assert len(set(made.values())) == 3
