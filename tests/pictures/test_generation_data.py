"""What pictures of other programs say is read field by field; sd-parsers reads the same pictures and agrees."""

from __future__ import annotations

import io
import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from PIL import features
from sd_parsers import ParserManager
from support import foreign_pictures
from support.foreign_pictures import NEGATIVE, PICTURES, PROMPT, node, png
from support.scale import times

import safelight
from safelight.pictures.generation_data import GenerationData, UsedLora
from safelight.pictures.read_generation_data import read
from safelight.queue.image_files import save

CLASSIC = GenerationData(
    "A1111",
    f"{PROMPT} <lora:style one:0.7>",
    NEGATIVE,
    1234567890,
    20,
    6.5,
    sampler="DPM++ 2M",
    schedule="Karras",
    width=512,
    height=768,
    model="dream.v8",
    model_hash="6ce0161689",
    vae="vae-ft-mse.safetensors",
    clip_skip=2,
    strength=0.55,
    loras=(UsedLora("style one", 0.7, "0123456789ab"),),
    others={"VAE hash": "c6a580b13a", "Hires upscale": "2", "Version": "v1.10.1"},
)

RIGHT: dict[str, GenerationData] = {
    **{f"A1111, {form}": CLASSIC for form in ("PNG", "JPEG", "WebP", "AVIF")},
    "Forge": GenerationData(
        "A1111",
        PROMPT,
        "",
        7,
        20,
        1.0,
        3.5,
        3.1,
        "Euler",
        "Simple",
        896,
        1152,
        "flux1-dev",
        "0123456789",
        others={"Version": "f2.0.1v1.10.1"},
    ),
    "ComfyUI": GenerationData(
        "ComfyUI",
        PROMPT,
        NEGATIVE,
        42,
        25,
        7.5,
        sampler="dpmpp_2m",
        schedule="karras",
        width=512,
        height=640,
        model="dream v8",
        vae="vae-ft-mse",
        clip_skip=2,
        loras=(UsedLora("one", 0.8), UsedLora("two", -0.5)),
    ),
    "ComfyUI, FLUX": GenerationData(
        "ComfyUI",
        PROMPT,
        "",
        99,
        20,
        None,
        3.5,
        None,
        "euler",
        "simple",
        1024,
        832,
        "flux1-dev-Q4_K_S",
        vae="ae",
        strength=0.7,
        loras=(UsedLora("realism", 0.9),),
    ),
    "InvokeAI": GenerationData(
        "InvokeAI",
        PROMPT,
        NEGATIVE,
        5,
        30,
        7.0,
        sampler="dpmpp_2m_k",
        width=768,
        height=512,
        model="Dreamshaper 8",
        model_hash="blake3:0123",
        vae="sd-vae-ft-mse",
        clip_skip=1,
        strength=0.6,
        loras=(UsedLora("glow", 0.75, "blake3:89ab"),),
        others={"app_version": "6.14.2", "generation_mode": "txt2img", "rand_device": "cpu"},
    ),
    "InvokeAI 2": GenerationData(
        "InvokeAI",
        "a red apple",
        NEGATIVE,
        3,
        50,
        7.5,
        sampler="k_lms",
        width=512,
        height=512,
        model="stable-diffusion-1.5",
        model_hash="cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
        others={"type": "txt2img"},
    ),
    "NovelAI": GenerationData(
        "NovelAI",
        PROMPT,
        NEGATIVE,
        8,
        28,
        5.0,
        sampler="k_euler_ancestral",
        schedule="karras",
        width=832,
        height=1216,
        model="Stable Diffusion XL C1E1DE52",
        others={"uncond_scale": "0.0"},
    ),
    "Fooocus": GenerationData(
        "Fooocus",
        PROMPT,
        NEGATIVE,
        11,
        30,
        4.0,
        sampler="dpmpp_2m_sde_gpu",
        schedule="karras",
        width=896,
        height=1152,
        model="juggernautXL_v8Rundiffusion",
        model_hash="aeb7e9e689",
        vae="Default (model)",
        clip_skip=2,
        loras=(UsedLora("sd_xl_offset_example-lora_1.0", 0.1, "4852686128"),),
        others={"version": "Fooocus v2.5.5", "metadata_scheme": "fooocus"},
    ),
    "SwarmUI": GenerationData(
        "SwarmUI",
        PROMPT,
        NEGATIVE,
        21,
        20,
        7.0,
        shift=3.0,
        sampler="dpmpp_2m",
        schedule="karras",
        width=1024,
        height=768,
        model="dream",
        loras=(UsedLora("one", 0.5),),
        others={"swarm_version": "0.9.6"},
    ),
    "Draw Things": GenerationData(
        "Draw Things",
        PROMPT,
        NEGATIVE,
        31,
        8,
        1.5,
        sampler="DPM++ 2M Karras",
        width=512,
        height=704,
        model="z_image_turbo_q8p",
        strength=1.0,
        loras=(UsedLora("glow_lora_f16", 0.6),),
    ),
}


def read_bytes(data: bytes) -> GenerationData | None:
    with PILImage.open(io.BytesIO(data)) as image:
        return read(image)


def test_each_program_has_its_row() -> None:
    assert RIGHT.keys() == PICTURES.keys()


@pytest.mark.parametrize("label", PICTURES)
def test_every_field_is_read(label: str) -> None:
    if "AVIF" in label and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert read_bytes(PICTURES[label]()) == RIGHT[label]


THEIRS = {"A1111, PNG": "AUTOMATIC1111", "ComfyUI": "ComfyUI", "NovelAI": "NovelAI", "Fooocus": "Fooocus"}


@pytest.mark.parametrize("label", THEIRS)
def test_sd_parsers_reads_the_same(label: str) -> None:
    """sd-parsers 0.6 fails on two LoRAs, one after the other. So ComfyUI's graph has none here."""
    data, right = PICTURES[label](), RIGHT[label]
    if label == "ComfyUI":
        graph = json.dumps({**foreign_pictures.CLASSIC_GRAPH, "11": node("CheckpointLoaderSimple", ckpt_name="x.ckpt")})
        data = png(prompt=graph, workflow=json.dumps({"nodes": [], "links": []}))
        right = replace(right, model="x", loras=())
        assert read_bytes(data) == right
    found = ParserManager().parse(PILImage.open(io.BytesIO(data)))
    assert found is not None
    assert found.generator.value == THEIRS[label]
    assert found.full_prompt == right.prompt
    assert found.full_negative_prompt == right.negative
    [sampler] = found.samplers
    told: dict[str, Any] = {**found.metadata, **sampler.parameters}
    assert int(told["steps"]) == right.steps
    assert float(told["cfg_scale"]) == right.cfg
    assert int(told.get("seed", told.get("noise_seed"))) == right.seed
    if label != "NovelAI":
        # sd-parsers keeps a model's ending.
        assert {str(model).removesuffix(".ckpt") for model in found.models} == {right.model}


def test_a_picture_of_safelight_says_what_made_it(tiny: Path, tmp_path: Path) -> None:
    engine = safelight.open_engine()
    asked = safelight.Request("an apple", str(tiny / "a.safetensors"), "bad", seed=3, steps=1, width=64, height=64)
    image = next(engine.generate(asked))
    data = save(image, tmp_path).read_bytes()
    found = read_bytes(data)
    assert found is not None
    assert (found.program, found.prompt, found.negative, found.seed) == ("Safelight", "an apple", "bad", 3)
    assert (found.width, found.height, found.model_hash) == (64, 64, image.model_digest)
    # Another program's reader finds the same in A1111's text.
    theirs = ParserManager().parse(PILImage.open(io.BytesIO(data)))
    assert theirs is not None
    assert (theirs.full_prompt, theirs.full_negative_prompt) == ("an apple", "bad")
    [sampler] = theirs.samplers
    assert (sampler.parameters["steps"], sampler.parameters["seed"]) == ("1", "3")


@pytest.mark.parametrize(
    ("change", "right"),
    [
        # Two samplers, one after the other: the last one made the picture.
        (
            {
                "20": node(
                    "KSampler",
                    seed=43,
                    steps=9,
                    cfg=2.0,
                    sampler_name="euler",
                    scheduler="normal",
                    denoise=0.5,
                    model=["4", 0],
                    positive=["6", 0],
                    negative=["7", 0],
                    latent_image=["3", 0],
                ),
                "8": node("VAEDecode", samples=["20", 0], vae=["13", 0]),
            },
            {
                "seed": 43,
                "steps": 9,
                "cfg": 2.0,
                "sampler": "euler",
                "schedule": "normal",
                "strength": 0.5,
                "loras": (),
            },
        ),
        # A zeroed negative prompt is none.
        (
            {
                "7": node("ConditioningZeroOut", conditioning=["6", 0]),
            },
            {"negative": ""},
        ),
        # A ControlNet takes and gives both sides.
        (
            {
                "21": node(
                    "ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=0.8, image=["22", 0]
                ),
                "22": node("LoadImage", image="pose.png"),
                "3": {
                    **foreign_pictures.CLASSIC_GRAPH["3"],
                    "inputs": {
                        **foreign_pictures.CLASSIC_GRAPH["3"]["inputs"],
                        "positive": ["21", 0],
                        "negative": ["21", 1],
                    },
                },
            },
            {},
        ),
        # Half of the positive prompt is zeroed; the other half counts.
        (
            {
                "21": node("ConditioningCombine", conditioning_1=["23", 0], conditioning_2=["22", 0]),
                "22": node("CLIPTextEncode", text="kept", clip=["12", 0]),
                "23": node("ConditioningZeroOut", conditioning=["6", 0]),
                "3": {
                    **foreign_pictures.CLASSIC_GRAPH["3"],
                    "inputs": {**foreign_pictures.CLASSIC_GRAPH["3"]["inputs"], "positive": ["21", 0]},
                },
            },
            {"prompt": "kept"},
        ),
        # A loader has both texts as values.
        (
            {
                "3": {
                    **foreign_pictures.CLASSIC_GRAPH["3"],
                    "inputs": {
                        **foreign_pictures.CLASSIC_GRAPH["3"]["inputs"],
                        "positive": ["21", 1],
                        "negative": ["21", 2],
                    },
                },
                "21": node("Efficient Loader", positive="good", negative="bad"),
            },
            {"prompt": "good", "negative": "bad", "clip_skip": None},
        ),
        # A preview of another sampler's result is not the saved picture.
        (
            {
                "1": node("PreviewImage", images=["2", 0]),
                "2": node("VAEDecode", samples=["20", 0], vae=["13", 0]),
                "20": node("KSampler", seed=1, positive=["6", 0], latent_image=["5", 0]),
            },
            {},
        ),
        # Two texts that are joined.
        (
            {
                "21": node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["22", 0]),
                "22": node("CLIPTextEncode", text="more", clip=["12", 0]),
                "3": {
                    **foreign_pictures.CLASSIC_GRAPH["3"],
                    "inputs": {**foreign_pictures.CLASSIC_GRAPH["3"]["inputs"], "positive": ["21", 0]},
                },
            },
            {"prompt": f"{PROMPT}\nmore"},
        ),
        # rgthree's loader of several LoRAs.
        (
            {
                "11": node(
                    "Power Lora Loader (rgthree)",
                    lora_1={"on": True, "lora": "a.safetensors", "strength": 0.4},
                    lora_2={"on": False, "lora": "b.safetensors", "strength": 1.0},
                    model=["4", 0],
                    clip=["4", 1],
                ),
            },
            {"loras": (UsedLora("a", 0.4),)},
        ),
        # Links in a circle end.
        (
            {
                "6": node("CLIPTextEncode", text=["6", 0], clip=["12", 0]),
            },
            {"prompt": ""},
        ),
    ],
)
def test_graphs(change: dict[str, Any], right: dict[str, Any]) -> None:
    graph = {**foreign_pictures.CLASSIC_GRAPH, **change}
    assert read_bytes(png(prompt=json.dumps(graph))) == replace(RIGHT["ComfyUI"], **right)


@pytest.mark.parametrize(
    "texts", [{}, {"prompt": "[]"}, {"prompt": "{}"}, {"parameters": "words"}, {"comment": "hello"}]
)
def test_a_picture_that_says_nothing(texts: dict[str, str]) -> None:
    assert read_bytes(png(**texts)) is None


HOSTILE = [
    {"safelight": json.dumps({"request": {"seed": "x" * 9, "loras": [3]}, "model": {}})},
    {"safelight": json.dumps({"request": {"seed": [1], "prompt": {}}, "model": {"name": 4}})},
    {"safelight": "[" * 100_000},
    {"prompt": "[" * 100_000},
    {"parameters": json.dumps({**foreign_pictures.FOOOCUS, "resolution": "9" * 6000 + "x1"})},
    {"parameters": json.dumps({**foreign_pictures.FOOOCUS, "seed": "9" * 6000, "loras": {"a": 1}})},
    {"parameters": '{"sui_image_params": {"seed": ' + "9" * 6000 + "}}"},
    {"exif comment": json.dumps({**foreign_pictures.DRAW_THINGS, "size": "9" * 6000 + "x1", "scale": "nan"})},
    {"invokeai_metadata": json.dumps({**foreign_pictures.INVOKEAI, "loras": [[1]], "model": 3, "seed": 1e400})},
]


HOSTILE += [
    {"prompt": json.dumps({"1": node("KSampler", seed=1, positive=["2", 0], latent_image=0), "2": {"inputs": 3}})},
    {"invokeai_metadata": json.dumps({"positive_prompt": "half \ud800 a sign", "odd \udfff": "\ud83d"})},
]

LONG = {
    "a line of words without a field": {"parameters": "word " * 60_000 + "\nSteps: 1, Seed: 2, Sampler: x"},
    "a last line of words": {"parameters": "x\nSteps: 1, Seed: 2, Sampler: " + "word " * 60_000},
    "spaces": {"parameters": "x\nSteps: 1, Seed: 2, Sampler: Euler" + " " * 100_000 + "x"},
    "tags that do not end": {"parameters": "<lora:a" * 40_000 + "\nSteps: 1, Seed: 2, Sampler: x"},
    "brackets": {"sd-metadata": json.dumps({"image": {"prompt": "[" * 100_000, "seed": 1}})},
    "spaces and a bracket": {"sd-metadata": json.dumps({"image": {"prompt": " " * 100_000 + "[", "seed": 1}})},
    "comments that do not end": {"XML:com.adobe.xmp": "<exif:UserComment>" * 20_000},
    "samplers in a row": {
        "prompt": json.dumps({str(n): node("Saver", images=[str((n + 1) % 9000), 0]) for n in range(9000)})
    },
}


@pytest.mark.parametrize("label", LONG)
def test_long_texts_take_no_square_of_their_length(label: str) -> None:
    image = PILImage.new("RGB", (8, 8))
    image.info.update(LONG[label])
    start = time.perf_counter()
    read(image)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("texts", HOSTILE)
def test_hostile_values_end_in_no_error(texts: dict[str, str]) -> None:
    image = PILImage.new("RGB", (8, 8))
    image.info.update(texts)
    found = read(image)
    for value in (found.seed, found.width, found.cfg) if found is not None else ():
        assert value is None or isinstance(value, int | float)
    json.dumps(None if found is None else asdict(found), ensure_ascii=False).encode()


def test_fooocus_writes_a_comment_beside_its_block() -> None:
    exif, out = PILImage.Exif(), io.BytesIO()
    exif[0x9286] = json.dumps(foreign_pictures.FOOOCUS)
    PILImage.new("RGB", (8, 8)).save(out, "JPEG", exif=exif)
    found = read_bytes(out.getvalue())
    assert found is not None
    assert (found.program, found.prompt) == ("Fooocus", PROMPT)


def test_damaged_values_end_in_no_error() -> None:
    """Characters of the texts are changed."""
    chance = random.Random(2)
    sources: list[dict[str, str]] = []
    for label in PICTURES:
        if "PNG" in label or "," not in label:
            with PILImage.open(io.BytesIO(PICTURES[label]())) as image:
                image.load()
                sources.append({str(name): value for name, value in image.info.items() if isinstance(value, str)})
    for _ in range(times(300, 10_000)):
        texts = dict(chance.choice(sources))
        name = chance.choice(sorted(texts))
        value = list(texts[name])
        for _ in range(chance.randint(1, 5)):
            value[chance.randrange(len(value))] = chance.choice('[]{}",:0-e9x \\n')
        image = PILImage.new("RGB", (8, 8))
        image.info.update({**texts, name: "".join(value)})
        read(image)
