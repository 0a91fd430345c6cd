"""Requests: what is not allowed is refused by its field, and what is allowed comes back from JSON as it was."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import safelight
from safelight.request.adapters import CONTROL_MODES, PREPROCESSORS, RESIZES, Control, Embedding, Lora, Purpose
from safelight.request.bounds import MOST_SEED
from safelight.request.field import Field, FieldDeclaration, fields_of
from safelight.request.run_settings import PRECISIONS
from safelight.request.samplers import SAMPLERS, SCHEDULES
from safelight.request.schema import Request
from safelight.request.steps import computed_steps
from safelight.request.stored import read_request
from safelight.request.values import SEAMLESS, UPSCALERS
from safelight.server.apis.a1111_fields import ImageToImage
from safelight.server.apis.openai import ALIASES, ImageGeneration

WITH_IMAGE = {"image": "in.png"}


def ask(**changes: Any) -> Request:
    return Request(**{"prompt": "red apple", "model": "a", **changes})


def test_images_of_a_request_differ_by_one_of_their_seeds() -> None:
    plain, varied = ask(seed=5, count=3), ask(seed=5, count=3, variation_seed=9, variation_strength=0.2)
    assert [plain.for_image(k) for k in range(3)] == [ask(seed=5 + k) for k in range(3)]
    assert plain.for_images(1, 2) == ask(seed=6, count=2)
    assert varied.for_images(1, 2) == replace(varied, count=2, variation_seed=10)
    assert [varied.for_image(k) for k in range(3)] == [replace(varied, count=1, variation_seed=9 + k) for k in range(3)]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            plain.for_image(index)


@pytest.mark.parametrize(
    ("field", "value", "more"),
    [
        ("steps", 0, {}),
        ("steps", 2.5, {}),
        ("steps", True, {}),
        ("steps", 1000, {}),
        ("steps", 51, {"sampler": "lcm"}),
        ("hires_steps", 51, {"sampler": "tcd"}),
        ("mask_padding", 8, WITH_IMAGE),
        ("width", 63, {}),
        ("width", 1 << 20, {}),
        ("height", 0, {}),
        ("width", 8192, {"height": 4096}),
        ("seed", -1, {}),
        ("seed", 2**32, {}),
        ("cfg", -1.0, {}),
        ("cfg", float("nan"), {}),
        ("cfg", "high", {}),
        ("sampler", "eular", {}),
        ("schedule", "wide", {}),
        ("schedule", "karras", {"sampler": "ddim"}),
        ("precision", "fp8", {}),
        ("count", 0, {}),
        ("count", 2, {"seed": MOST_SEED}),
        ("clip_skip", -1, {}),
        ("prompt", "a\0b", {}),
        ("prompt", "\ud83c", {}),
        ("negative", None, {}),
        ("prompt_syntax", "comfy", {}),
        ("seamless", "yx", {}),
        ("strength", 0, WITH_IMAGE),
        ("strength", 0.04, {**WITH_IMAGE, "steps": 20}),
        ("mask", "mask.png", {}),
        ("image_cfg", 0.9, WITH_IMAGE),
        ("refiner_start", 0, {"refiner": "b"}),
        ("mask_blur", -1, WITH_IMAGE),
        ("mask_padding", 5000, {**WITH_IMAGE, "mask": "mask.png"}),
        ("outpaint", (8, 8, 8), WITH_IMAGE),
        ("outpaint", 8, WITH_IMAGE),
        ("outpaint", (8, 0, 0, 0), {}),
        ("outpaint", (8, 0, 0, 0), {**WITH_IMAGE, "mask": "mask.png"}),
        ("variation_strength", 1.5, {}),
        ("count", 2, {"variation_strength": 0.5, "variation_seed": MOST_SEED}),
        ("hires_scale", 0.5, {}),
        ("hires_scale", 2, WITH_IMAGE),
        ("hires_upscaler", "esrgan", {}),
        ("hires_strength", 0.01, {"hires_scale": 2.0, "steps": 20}),
        ("tile", 65, {}),
        ("tile", 512, {"seamless": "x"}),
        ("loras", "ink", {}),
        ("loras", [{"name": "ink"}] * 51, {}),
        ("loras", [{"name": "ink", "weight": 1}], {}),
        ("controls", [{"name": "edges"}], {}),
        ("embeddings", [{"name": "a", "word": "x"}, {"name": "b", "word": "x"}], {}),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(field: str, value: object, more: dict[str, Any]) -> None:
    with pytest.raises(safelight.RequestError, match=field):
        ask(**{field: value, **more})


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        (Lora, {"name": ""}, "loras"),
        (Lora, {"name": "ink", "strength": 101}, "a strength goes from"),
        (Lora, {"name": "ink", "unet": float("nan")}, "a strength goes from"),
        (Lora, {"name": "ink", "blocks": (1.0,) * 5}, "has 5 block weights; it must have 12, 17, 20 or 26"),
        (Control, {"name": "edges", "image": ""}, "has no picture"),
        (Control, {"name": "edges", "image": "a", "weight": "much"}, "its weight"),
        (Control, {"name": "edges", "image": "a", "start": 0.5, "end": 0.5}, "not before its end"),
        (Control, {"name": "edges", "image": "a", "mode": "loud"}, "must be one of"),
        (Control, {"name": "edges", "image": "a", "preprocessor": "depth"}, "must be one of"),
        (Control, {"name": "edges", "image": "a", "high": 0}, "from 1 to 10000"),
        (Embedding, {"name": "snow", "word": " "}, "must be a word"),
    ],
)
def test_what_a_part_cannot_be_is_refused(part: Any, values: dict[str, Any], says: str) -> None:
    with pytest.raises(safelight.RequestError, match=says):
        part(**values)


def names() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


def shares() -> st.SearchStrategy[float]:
    return st.floats(0.2, 1)


strengths = st.floats(-100, 100)
loras = st.builds(
    Lora,
    names(),
    strengths,
    st.none() | strengths,
    st.none() | strengths,
    st.sampled_from([0, 12, 17, 20, 26]).map(lambda count: (0.5,) * count),
)
controls = st.builds(
    Control,
    names(),
    names(),
    strengths,
    st.floats(0, 0.4),
    st.floats(0.5, 1),
    st.sampled_from(CONTROL_MODES),
    st.sampled_from(sorted(PREPROCESSORS)),
    st.integers(0, 255),
    st.integers(1, 10000),
    st.sampled_from(RESIZES),
)
requests = st.builds(
    Request,
    prompt=names(),
    model=names(),
    negative=names(),
    seed=st.integers(0, MOST_SEED - 8),
    steps=st.integers(5, 50),
    width=st.none() | st.integers(1, 512).map(lambda eighths: eighths * 8),
    cfg=st.floats(0, 100),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    count=st.integers(1, 8),
    precision=st.sampled_from(PRECISIONS),
    loras=st.lists(loras, max_size=3).map(tuple),
    controls=st.lists(controls, max_size=2).map(tuple),
    embeddings=st.none() | names().filter(str.strip).map(lambda word: (Embedding("snow", word),)),
    image=st.sampled_from(["", "in.png"]),
    strength=shares(),
    image_cfg=st.floats(1, 100),
    variation_seed=st.integers(0, MOST_SEED - 8),
    variation_strength=st.floats(0, 1),
    hires_upscaler=st.sampled_from(sorted(UPSCALERS)),
    hires_strength=shares(),
    seamless=st.sampled_from(SEAMLESS),
    refiner=names(),
    refiner_start=st.floats(0.01, 0.99),
)


@given(requests)
def test_from_json_it_is_what_it_was(request: Request) -> None:
    assert Request(**json.loads(json.dumps(asdict(request)))) == request


@given(requests, st.floats(1, 8))
def test_steps_that_are_computed_are_counted(request: Request, scale: float) -> None:
    assert 1 <= request.first_pass_steps <= request.steps
    if not request.image:
        assert request.first_pass_steps == request.steps
        twice = replace(request, hires_scale=scale)
        assert computed_steps(twice) == request.steps + (
            int(request.steps * request.hires_strength) if scale > 1 else 0
        )


def test_every_sampler_has_schedules_that_requests_may_name() -> None:
    for name, sampler in SAMPLERS.items():
        assert set(sampler.schedules) <= set(SCHEDULES)
        for schedule in sampler.schedules:
            assert ask(sampler=name, schedule=schedule).schedule == schedule


def test_a_component_has_its_own_strength_or_the_adapters() -> None:
    lora = Lora("ink", 0.8, text_encoder=0.0)
    assert [lora.strength_for(purpose) for purpose in (Purpose.DENOISER, Purpose.TEXT_ENCODER)] == [0.8, 0.0]


def test_a_missing_field_has_the_default_of_its_version_and_an_unknown_one_is_named() -> None:
    stored = asdict(ask(steps=30))
    assert read_request(stored) == ask(steps=30)
    assert read_request({"prompt": "red apple", "model": "a"}) == ask()
    assert read_request({"prompt": "red apple", "model": "a"}, 1).image_cfg == 1.5
    for wrong, name in (({**stored, "steppes": 3}, "steppes"), ({"prompt": "red apple"}, "model"), ([], "request")):
        with pytest.raises(safelight.RequestError, match=name):
            read_request(wrong)
    old = Field("steps", int, False, False, 20, FieldDeclaration(help="", old_defaults={1: 50, 3: 30}))
    assert [old.default_in(version) for version in (1, 2, 3, 4)] == [50, 30, 30, 20]


def test_a_number_has_bounds_and_every_field_a_declaration() -> None:
    @dataclass(frozen=True)
    class Bare:
        glow: int = 0

    @dataclass(frozen=True)
    class Boundless:
        glow: Annotated[int, FieldDeclaration(help="It glows.")] = 0

    for kind, says in ((Bare, "has no FieldDeclaration"), (Boundless, "without bounds")):
        with pytest.raises(TypeError, match=says):
            fields_of(kind)


def test_every_field_says_what_it_does_and_where_it_belongs() -> None:
    fields = fields_of(Request)
    for field in fields.values():
        assert field.declared.help.endswith((".", ")")), field.name
        assert field.declared.group, field.name
        assert set(field.declared.needs) <= fields.keys()


def test_the_other_apis_have_the_fields_that_the_schema_names() -> None:
    theirs = ImageToImage.model_fields.keys()
    for field in fields_of(Request).values():
        for name in re.findall(r"[a-z_0-9]+", field.declared.a1111.replace("times", "").partition(".")[0]):
            assert name in theirs | {"prompt", "lora"}, (field.name, name)
        if field.declared.openai:
            known = ImageGeneration.model_fields.keys() | ALIASES.keys() | {"image", "image[]", "mask"}
            assert field.declared.openai in known, field.name
