"""A checkpoint's own tokenizer counts. If it gives the same tokens as Safelight's, it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import TinyFamily, drawn, tiny_families
from support.scale import thinned
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import safelight
from safelight.assembly import export
from safelight.catalog.model import Model
from safelight.errors import InputError, UnsupportedModelError
from safelight.families.parts import clip, qwen3, qwen25, t5
from safelight.families.tokenizer_file import ShippedTokenizer, TokenizerFile
from safelight.request.prompts import tokens
from safelight.workers.local_engine import LocalEngine

if not {"flux"} <= set(tiny_families()):
    pytest.skip("the installed libraries lack some of these models", allow_module_level=True)

SEED = 5

CLIP = clip.tokenizer().shipped
assert CLIP is not None

SHIPPED = {"clip": CLIP, "t5": t5.SHIPPED, "qwen3": qwen3.SHIPPED, "qwen2.5": qwen25.SHIPPED}

PADS = {"t5": "<pad>", "clip": "!"}
"""The token that pads prompts."""


def place_of(tiny_family: TinyFamily) -> tuple[str, TokenizerFile]:
    """Return the role of the family's text encoder whose tokenizer may be another one, and the tokenizer's place."""
    return next(
        (one.role, one.tokenizer)
        for one in tiny_family.family.components
        if one.tokenizer is not None and one.tokenizer.shipped is not None and one.tokenizer.shipped.replaceable
    )


FAMILIES = sorted((label for label, row in tiny_families().items() if row.name != "ernie-image"), key="flux".__ne__)


def swapped(shipped: ShippedTokenizer) -> tuple[str, tuple[int, int]]:
    """Return a tokenizer.json in which two words have each other's id, and the two ids."""
    values = json.loads(shipped.read())
    vocabulary: Any = values["model"]["vocab"]
    if isinstance(vocabulary, list):
        pieces: list[str] = [piece for piece, _ in vocabulary]
        first, second = pieces.index("▁red"), pieces.index("▁blue")
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    else:
        first, second = vocabulary["Ġred"], vocabulary["Ġblue"]
        vocabulary["Ġred"], vocabulary["Ġblue"] = second, first
    return json.dumps(values), (first, second)


def swap_rows(path: Path, rows: int, first: int, second: int) -> None:
    """Swap two rows of the table of embeddings in a file. ``rows``: the fewest rows of the table."""
    tensors = load_file(path)
    names = [name for name, one in tensors.items() if one.ndim == 2 and len(one) >= rows and "lm_head" not in name]
    assert names
    for name in names:
        order = torch.arange(len(tensors[name]))
        order[[first, second]] = order[[second, first]]
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, path, {"format": "pt"})


def put(folder: Path, place: str, text: str) -> Path:
    """Write a tokenizer to its place in a folder."""
    path = folder / place
    path.parent.mkdir()
    path.write_text(text)
    return path


@pytest.fixture
def library(shared_engine: LocalEngine) -> Callable[[Path, str], Model]:
    """Return a function that adds a folder to the library."""
    return lambda path, variant: shared_engine.library.add(path, variant=variant)


@pytest.mark.full
@pytest.mark.parametrize("label", thinned(FAMILIES))
def test_a_checkpoint_s_own_tokenizer_counts(
    label: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer in which two words have each other's id is the same as a table in which they have the other's row."""
    tiny_family = tiny_families()[label]
    tiny_family.make_references_small(monkeypatch)
    role, place = place_of(tiny_family)
    assert place.shipped is not None
    text, (first, second) = swapped(place.shipped)
    own, rows, plain = (tiny_family.write_folder(tmp_path / name, SEED) for name in ("own", "rows", "plain"))
    put(own, place.place, text)
    for path in (rows / tiny_family.family.component(role).folder).glob("*.safetensors"):
        swap_rows(path, max(first, second) + 1, first, second)
    engine = safelight.open_engine(root)
    models = {path.name: engine.library.add(path, variant=tiny_family.variant) for path in (own, rows, plain)}
    pixels = {name: drawn(engine, tiny_family.ask(name)) for name in models}
    assert pixels["own"] == pixels["rows"] != pixels["plain"]
    assert len({model.manifest.component(role).digest for model in models.values()}) == 3
    if tiny_family.family.export_problem or tiny_family.family.variants[tiny_family.variant].export_problem:
        return
    export.to_diffusers(models["own"], tmp_path / "exported")
    again = engine.library.add(tmp_path / "exported", variant=tiny_family.variant)
    assert again.digest == models["own"].digest


@pytest.mark.parametrize("name", thinned(SHIPPED, 2))
def test_the_same_tokenizer_in_another_form(name: str, tmp_path: Path) -> None:
    """transformers writes a tokenizer.json in its own form. Padding, truncation and chat templates change no token."""
    shipped, pad = SHIPPED[name], PADS.get(name, "<|endoftext|>")
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(shipped.read()), pad_token=pad)
    made("a red apple", padding="max_length", truncation=True, max_length=7)
    made.save_pretrained(tmp_path / "tokenizer")
    place = TokenizerFile("tokenizer/tokenizer.json", shipped=shipped)
    assert (tmp_path / place.place).read_text() != shipped.read()
    assert place.own(tmp_path) is None


@pytest.mark.full
def test_qwen_s_tokenizer_from_a_vocabulary_and_merges(tmp_path: Path) -> None:
    # Not above: older libraries lack what it imports.
    from support import qwen_image

    qwen_image.qwen2_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()
    assert qwen25.TOKENIZER.own(tmp_path) is None


@pytest.mark.parametrize("name", thinned(["clip", "qwen3"]))
def test_the_older_form(name: str, tmp_path: Path) -> None:
    """Published folders of Stable Diffusion and Qwen-Image have vocab.json and merges.txt, and no tokenizer.json."""
    place = TokenizerFile("tokenizer/tokenizer.json", shipped=SHIPPED[name])
    vocabulary = json.loads(SHIPPED[name].read())["model"]["vocab"]
    path = put(tmp_path, "tokenizer/vocab.json", json.dumps(vocabulary))
    assert place.own(tmp_path) is None
    first, second = list(vocabulary)[:2]
    path.write_text(json.dumps({**vocabulary, first: vocabulary[second], second: vocabulary[first]}))
    with pytest.raises(UnsupportedModelError, match=r"vocab\.json: differs from the vocabulary of"):
        place.own(tmp_path)
    path.write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"vocab\.json: is no vocabulary that can be read"):
        place.own(tmp_path)


def test_another_vocabulary_of_clip_is_refused(library: Callable[[Path, str], Model], tmp_path: Path) -> None:
    tiny_family = tiny_families()["flux"]
    folder = tiny_family.write_folder(tmp_path / "folder", SEED)
    values = json.loads(tokens.VOCABULARY.read_text())
    values["model"]["vocab"]["red</w>"] = values["model"]["vocab"]["blue</w>"]
    put(folder, "tokenizer/tokenizer.json", json.dumps(values))
    with pytest.raises(UnsupportedModelError, match="differs from the vocabulary of CLIP; no other one is supported"):
        library(folder, tiny_family.variant)


def test_tokens_that_a_checkpoint_added_to_clip_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(tokens.VOCABULARY.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    values["added_tokens"].append({"id": 49408, "content": "<sks>", **flags})
    path = put(tmp_path, "tokenizer/tokenizer.json", json.dumps(values))
    assert clip.tokenizer().own(tmp_path) is None
    assert "<sks>" in "".join(capsys.readouterr())
    path.unlink()
    (tmp_path / "tokenizer/vocab.json").write_text(json.dumps(values["model"]["vocab"]))
    (tmp_path / "tokenizer/added_tokens.json").write_text('{"<cat-toy>": 49408}')
    assert clip.tokenizer().own(tmp_path) is None
    assert "<cat-toy>" in "".join(capsys.readouterr())


def test_a_token_that_the_family_needs(tmp_path: Path) -> None:
    values = json.loads(t5.SHIPPED.read())
    vocabulary = values["model"]["vocab"]
    vocabulary[0], vocabulary[5] = vocabulary[5], vocabulary[0]
    values["added_tokens"] = []
    put(tmp_path, "tokenizer/tokenizer.json", json.dumps(values))
    with pytest.raises(UnsupportedModelError, match=r"gives <pad> the id 5; a tokenizer for T5 1\.1 must give it 0"):
        TokenizerFile("tokenizer/tokenizer.json", shipped=t5.SHIPPED).own(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"model": {}}', "\udcff"])
def test_a_file_that_is_no_tokenizer(text: str, tmp_path: Path) -> None:
    put(tmp_path, "tokenizer/tokenizer.json", "").write_bytes(text.encode(errors="surrogateescape"))
    for place in (TokenizerFile("tokenizer/tokenizer.json", shipped=t5.SHIPPED), clip.tokenizer()):
        with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: is no "):
            place.own(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_named(root: Path, tmp_path: Path) -> None:
    tiny_family = tiny_families()["flux"]
    folder = tiny_family.write_folder(tmp_path / "folder", SEED)
    values = json.loads(t5.SHIPPED.read())
    count, any_other = len(values["model"]["vocab"]), values["added_tokens"][-1]
    values["added_tokens"] += [{**any_other, "id": count + n, "content": f"<{n}>"} for n in range(200)]
    put(folder, "tokenizer_2/tokenizer.json", json.dumps(values))
    engine = safelight.open_engine(root)
    model = engine.library.add(folder, "tiny", variant=tiny_family.variant)
    with pytest.raises(InputError, match=r"the token 32299, and encoder.embed_tokens.weight of its text encoder has"):
        drawn(engine, tiny_family.ask(model.name, prompt="a red apple <199>"))


def test_beside_a_file(tmp_path: Path) -> None:
    """Only a tokenizer that is named after the file is its own: a folder may have several text encoders."""
    weights, (text, _) = tmp_path / "t5xxl_fp16.safetensors", swapped(t5.SHIPPED)
    place = TokenizerFile("tokenizer_2/tokenizer.json", shipped=t5.SHIPPED)
    weights.touch()
    (tmp_path / "tokenizer.json").write_text(text)
    assert place.own(weights) is None
    named = weights.with_suffix(".tokenizer.json")
    named.write_text(text)
    assert place.own(weights) == named
    named.unlink()
    (tmp_path / "vocab.json").write_text("{}")
    assert place.own(weights) is None


def test_beside_a_file_with_two_text_encoders(tmp_path: Path) -> None:
    """The tokenizer beside FLUX.1 in one file is T5's. CLIP's cannot be replaced."""
    weights = tmp_path / "flux1-dev.safetensors"
    weights.touch()
    weights.with_suffix(".tokenizer.json").write_text(swapped(t5.SHIPPED)[0])
    assert clip.tokenizer().own(weights) is None
