"""Textual inversions: pixels equal those of diffusers' ``load_textual_inversion``; tokens exist in their job only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import adapters, controls, oracle

import safelight
from safelight.errors import InputError, IntegrityError, ModelNotFoundError, RequestError
from safelight.request.adapters import Embedding, Lora
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine

Ask = Callable[..., Request]


@pytest.fixture
def thing(engine: LocalEngine, tmp_path: Path) -> str:
    engine.catalog.adapters.add(controls.inversion(tmp_path / "thing.safetensors"))
    return "thing"


def sha(engine: LocalEngine, request: Request) -> str:
    return next(engine.generate(request)).pixels_sha256


@pytest.mark.parametrize("count", [1, 2], ids=["one vector", "two vectors"])
def test_pixels_are_those_of_diffusers(engine: LocalEngine, ask: Ask, tmp_path: Path, count: int) -> None:
    path = controls.inversion(tmp_path / "thing.safetensors", count)
    engine.catalog.adapters.add(path)
    pipe = oracle.pipeline("sd1", 1)
    oracle.own_tokenizers(pipe)
    save_file({"<thing>": controls.vectors(count)}, tmp_path / "theirs.safetensors")
    pipe.load_textual_inversion(str(tmp_path / "theirs.safetensors"), token="<thing>")
    oracle.aligned(pipe.text_encoder)
    right = oracle.pixels(pipe, "a <thing> apple", "", 3, 5, 7.0)
    assert next(engine.generate(ask(prompt="a <thing> apple", steps=3, seed=5))).pixels == right


def test_one_that_another_engine_of_the_process_did_not_have(root: Path, ask: Ask, tmp_path: Path) -> None:
    """What fits a model is no knowledge of the process: an engine that is opened later has what is there then."""
    shas: list[str] = []
    for count, name in ((1, "thing"), (2, "other")):
        engine = safelight.open_engine(root)
        engine.catalog.adapters.add(controls.inversion(tmp_path / f"{name}.safetensors", count))
        shas.append(sha(engine, ask(prompt="an other apple")))
        engine.close()
    assert shas[0] != shas[1]


def test_both_encoders_of_sdxl(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    engine.catalog.adapters.add(controls.inversion(tmp_path / "thing.safetensors", 2, "sdxl"))
    pipe = oracle.pipeline("sdxl", 4)
    oracle.own_tokenizers(pipe)
    for number, (tokenizer, encoder) in enumerate(
        ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    ):
        pipe.load_textual_inversion(
            controls.vectors(2, seed=5 + number), token="<thing>", text_encoder=encoder, tokenizer=tokenizer
        )
        oracle.aligned(encoder)
    right = oracle.pixels(pipe, "a <thing> apple", None, 2, 0, 7.0)
    assert next(engine.generate(ask("xl.safetensors", prompt="a <thing> apple"))).pixels == right


def test_every_way_to_name_it_is_the_same(engine: LocalEngine, ask: Ask, thing: str, tmp_path: Path) -> None:
    right = sha(engine, ask(prompt="a <thing> apple"))
    assert right != sha(engine, ask(prompt="a <thing> apple", embeddings=()))
    assert sha(engine, ask(prompt="a thing apple")) == right
    assert sha(engine, ask(prompt="a embedding:thing apple")) == right
    given = (Embedding(str(tmp_path / "thing.safetensors"), "<thing>"),)
    assert sha(engine, ask(prompt="a <thing> apple", embeddings=given)) == right
    assert sha(engine, ask(prompt="a anything apple")) == sha(engine, ask(prompt="a anything apple", embeddings=()))
    assert sha(engine, ask(prompt="a (thing:1.3) apple")) != right


def test_state_21_tokens_exist_in_their_job_only(engine: LocalEngine, ask: Ask, thing: str) -> None:
    """A prompt whose own tokens are those that an embedding would have taken is drawn as ever, before and after."""
    from safelight.request.prompts.tokens import vocabulary
    from safelight.request.prompts.words import HIGHEST_TEXT_TOKEN

    rare = "".join(vocabulary()[HIGHEST_TEXT_TOKEN - n] for n in range(2)).replace("</w>", " ")
    before = {text: sha(engine, ask(prompt=text)) for text in ("red apple", f"red {rare} apple")}
    inside = sha(engine, ask(prompt="red <thing> apple"))
    negative = sha(engine, ask(prompt="red apple", negative="<thing>"))
    assert len({inside, negative, *before.values()}) == 4
    for text, right in before.items():
        assert sha(engine, ask(prompt=text)) == right
    both = sha(engine, ask(prompt=f"red {rare} <thing> apple"))
    alone = safelight.open_engine(engine.library.root)
    assert sha(alone, ask(prompt=f"red {rare} <thing> apple")) == both
    assert sha(alone, ask(prompt="red apple")) == before["red apple"]


def test_it_goes_with_lora_and_streams(root: Path, engine: LocalEngine, ask: Ask, thing: str, tmp_path: Path) -> None:
    lora = Lora(str(adapters.write(tmp_path / "one.safetensors")), 0.7)
    right = sha(engine, ask(prompt="a thing", loras=(lora,)))
    assert right not in (sha(engine, ask(prompt="a thing")), sha(engine, ask(prompt="a", loras=(lora,))))
    small = safelight.open_engine(root, max_cache_ram_gb=0.03)
    assert sha(small, ask(prompt="a thing", loras=(lora,))) == right


@pytest.mark.parametrize("form", ["pt", "diffusers", "emb_params"])
def test_every_form_is_read(engine: LocalEngine, ask: Ask, tmp_path: Path, form: str) -> None:
    path = tmp_path / ("thing.pt" if form == "pt" else "thing.safetensors")
    engine.catalog.adapters.add(controls.inversion(path, form=form))
    engine.catalog.adapters.add(controls.inversion(tmp_path / "right.safetensors"), "right")
    assert sha(engine, ask(prompt="a thing apple")) == sha(engine, ask(prompt="a right apple"))


def test_a_pickle_is_converted_once_and_watched(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    path = controls.inversion(tmp_path / "thing.pt")
    added = engine.catalog.adapters.add(path)
    right = sha(engine, ask(prompt="a thing"))
    [converted] = (engine.library.root / "adapters" / "converted").iterdir()
    assert converted.stem == added.digest
    controls.inversion(path, seed=6)
    with pytest.raises(IntegrityError):
        sha(engine, ask(prompt="a thing"))
    controls.inversion(path)
    engine.catalog.adapters.add(path)
    assert sha(engine, ask(prompt="a thing")) == right
    engine.catalog.adapters.remove("thing")
    assert not list(converted.parent.iterdir())


def test_what_the_image_says_makes_it_again(engine: LocalEngine, ask: Ask, thing: str) -> None:
    image = next(engine.generate(ask(prompt="a thing apple")))
    [recorded] = image.metadata["request"]["embeddings"]
    assert (recorded["name"], recorded["word"]) == (thing, "thing")
    again = Request(**{**image.metadata["request"], "model": ask().model})
    assert sha(engine, again) == image.pixels_sha256
    # A word that becomes a name later means nothing to an image that was made before.
    plain = next(engine.generate(ask(prompt="apple")))
    engine.catalog.adapters.add(engine.catalog.adapters.get(thing).path, "apple")
    assert sha(engine, ask(prompt="apple")) != plain.pixels_sha256
    assert sha(engine, Request(**{**plain.metadata["request"], "model": ask().model})) == plain.pixels_sha256


def test_what_does_not_fit_is_refused(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    wide = tmp_path / "wide.safetensors"
    save_file({"emb_params": torch.randn(2, 768)}, wide)
    many = tmp_path / "many.safetensors"
    save_file({"emb_params": torch.randn(76, 64)}, many)
    for path in (wide, many, controls.inversion(tmp_path / "xl.safetensors", 2, "sdxl")):
        engine.catalog.adapters.add(path)
    for word, says in (("wide", "768"), ("many", "76 vectors"), ("xl", "has the tensors clip_")):
        with pytest.raises(RequestError, match=says):
            sha(engine, ask(prompt=f"a <{word}>"))
    # A plain word means one that fits, as in A1111; else it is a word.
    for word in ("wide", "xl"):
        assert sha(engine, ask(prompt=f"a {word}")) == sha(engine, ask(prompt=f"a {word}", embeddings=()))
    with pytest.raises(ModelNotFoundError, match="nobody"):
        sha(engine, ask(prompt="a <nobody>"))
    spoiled = tmp_path / "nan.safetensors"
    save_file({"emb_params": torch.full((1, 64), float("nan"))}, spoiled)
    with pytest.raises(InputError, match="NaN"):
        engine.catalog.adapters.add(spoiled)


def test_large_ones_have_chunks_of_their_own(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    engine.catalog.adapters.add(controls.inversion(tmp_path / "whole.safetensors", 75))
    engine.catalog.adapters.add(controls.inversion(tmp_path / "large.safetensors", 60))
    for prompt in ("cat whole", "red, " + "a " * 17 + "large dog", "whole whole large"):
        assert sha(engine, ask(prompt=prompt)) != sha(engine, ask(prompt=prompt, embeddings=()))


def test_names_are_found_in_any_case_and_words_are_of_one(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    engine.catalog.adapters.add(controls.inversion(tmp_path / "EasyThing.safetensors"))
    right = sha(engine, ask(prompt="a EasyThing"))
    assert sha(engine, ask(prompt="a easything")) == right != sha(engine, ask(prompt="a EasyThing", embeddings=()))
    with pytest.raises(RequestError, match="two embeddings"):
        ask(embeddings=(Embedding("a", "x"), Embedding("b", "x")))
