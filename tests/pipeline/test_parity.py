"""Pixels equal those of diffusers' own pipelines, bit for bit, on a CPU in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support import checkpoints, oracle
from support.scale import thinned

import safelight
from safelight.workers.local_engine import LocalEngine

SD1_SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm2_a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": (diffusers.DPMSolverSDEScheduler, {"noise_sampler_seed": 11}),
    "dpmpp_3m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
FIVE = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")


def scheduler(name: str, **changes: Any) -> Any:
    kind, settings = SD1_SAMPLERS[name]
    return kind.from_config({**oracle.SCHEDULE, **settings, **changes})


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {base: oracle.pipeline(base, seed) for base, seed in (("sd1", 1), ("sd2", 3), ("sdxl", 4))}


def ours(engine: LocalEngine, path: Path, sampler: str, **changes: Any) -> bytes:
    values = {"prompt": "red apple", "negative": "blue", "steps": 4, "width": 64, "height": 64, "seed": 11, "cfg": 5.0}
    request = safelight.Request(model=str(path), sampler=sampler, **{**values, **changes})
    return next(engine.generate(request)).pixels


@pytest.mark.parametrize("sampler", thinned(SD1_SAMPLERS, 10))
def test_every_sampler_on_sd1(sampler: str, engine: LocalEngine, tiny: Path, pipes: dict[str, Any]) -> None:
    pipes["sd1"].scheduler = scheduler(sampler)
    theirs = oracle.pixels(pipes["sd1"], "red apple", "blue", 4, 11, 5.0)
    assert ours(engine, tiny / "a.safetensors", sampler) == theirs


@pytest.mark.parametrize(
    ("schedule", "setting"),
    [
        ("karras", {"use_karras_sigmas": True}),
        ("exponential", {"use_exponential_sigmas": True}),
        ("sgm_uniform", {"timestep_spacing": "trailing"}),
    ],
    ids=["karras", "exponential", "sgm_uniform"],
)
@pytest.mark.parametrize("sampler", thinned(["euler", "dpmpp_2m", "heun"]))
def test_schedules(
    sampler: str, schedule: str, setting: dict[str, Any], engine: LocalEngine, tiny: Path, pipes: dict[str, Any]
) -> None:
    pipes["sd1"].scheduler = scheduler(sampler, **setting)
    theirs = oracle.pixels(pipes["sd1"], "red apple", "blue", 4, 11, 5.0)
    assert ours(engine, tiny / "a.safetensors", sampler, schedule=schedule) == theirs


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", thinned(FIVE, 2))
def test_five_samplers_on_sd2(
    sampler: str, prediction: str, engine: LocalEngine, tiny: Path, pipes: dict[str, Any]
) -> None:
    pipes["sd2"].scheduler = scheduler(sampler, prediction_type=prediction)
    theirs = oracle.pixels(pipes["sd2"], "red apple", "blue", 4, 11, 5.0)
    name = f"v2-{prediction}"
    if engine.library.find_by_name(name) is None:
        engine.library.add(tiny / "v2.safetensors", name, prediction)  # type: ignore[arg-type]
    values = safelight.Request("red apple", name, "blue", 11, 4, 64, 64, 5.0, sampler)
    assert next(engine.generate(values)).pixels == theirs


@pytest.mark.parametrize("negative", ["blue", ""], ids=["negative prompt", "none"])
@pytest.mark.parametrize("sampler", thinned(FIVE, 2))
def test_five_samplers_on_sdxl(
    sampler: str, negative: str, engine: LocalEngine, tiny: Path, pipes: dict[str, Any]
) -> None:
    pipes["sdxl"].scheduler = scheduler(sampler)
    theirs = oracle.pixels(pipes["sdxl"], "red apple", negative or None, 4, 11, 5.0)
    assert ours(engine, tiny / "xl.safetensors", sampler, negative=negative) == theirs


FORMS = {
    "ldm": "one file with LDM's names",
    "folder": "diffusers folder",
    "diffusers": "one file with diffusers' names",
    "bin": "diffusers folder of .bin",
    "ckpt": ".ckpt",
}


@pytest.mark.parametrize("form", thinned(FORMS, 2), ids=FORMS.values())
@pytest.mark.parametrize("base", thinned(["sdxl", "sd1", "sd2"], 2))
def test_every_form_of_every_base(
    base: str, form: str, engine: LocalEngine, tmp_path: Path, pipes: dict[str, Any]
) -> None:
    seed = {"sd1": 1, "sd2": 3, "sdxl": 4}[base]
    prediction = "v_prediction" if base == "sd2" else "epsilon"
    if form in ("folder", "bin"):
        path = checkpoints.write_folder(tmp_path / "m", base, seed, prediction)
        if form == "bin":
            checkpoints.as_pickles(path)
    else:
        path = tmp_path / ("m.ckpt" if form == "ckpt" else "m.safetensors")
        checkpoints.write_single(path, base, seed, "ldm" if form == "ckpt" else form)
    pipes[base].scheduler = scheduler("euler", prediction_type=prediction)
    theirs = oracle.pixels(pipes[base], "red apple", "blue", 4, 11, 5.0)
    assert ours(engine, path, "euler") == theirs


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 72, "height": 48},
        {"cfg": 1.0},
        {"cfg": 0.0},
        {"prompt": ""},
        {"prompt": "Crème brûlée 🍎 ＡＢＣ <|endoftext|> x"},
    ],
    ids=["72 by 48", "guidance 1", "guidance 0", "empty prompt", "prompt beyond ASCII"],
)
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_requests(base: str, changes: dict[str, Any], engine: LocalEngine, tiny: Path, pipes: dict[str, Any]) -> None:
    pipes[base].scheduler = scheduler("euler")
    prompt, cfg = changes.get("prompt", "red apple"), changes.get("cfg", 5.0)
    size = {key: changes[key] for key in ("width", "height") if key in changes}
    theirs = oracle.pixels(pipes[base], prompt, "blue", 4, 11, cfg, **size)
    name = {"sd1": "a.safetensors", "sdxl": "xl.safetensors"}[base]
    assert ours(engine, tiny / name, "euler", **changes) == theirs


def test_prompts_with_weights_and_of_several_chunks_equal_diffusers_with_the_same_embeddings(
    engine: LocalEngine, tiny: Path, pipes: dict[str, Any]
) -> None:
    """``red (apple:1.3) BREAK blue [house]``, by hand: each chunk encoded alone, weighted, its mean as it was."""
    pipe = pipes["sd1"]
    pipe.scheduler = scheduler("euler")
    torch.set_num_threads(1)

    def hidden(text: str, weights: dict[int, float]) -> torch.Tensor:
        ids = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            plain = pipe.text_encoder(ids).last_hidden_state
        factors = torch.tensor([weights.get(at, 1.0) for at in range(77)]).view(1, -1, 1)
        scaled = plain * factors
        return scaled * (plain.mean() / scaled.mean()) if weights else plain

    prompt = torch.cat([hidden("red apple", {2: 1.3}), hidden("blue house", {2: 1 / 1.1})], dim=1)
    negative = torch.cat([hidden("blue", {}), hidden("", {})], dim=1)
    call = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    theirs = oracle.pixels(pipe, None, None, 4, 11, 5.0, **call)  # type: ignore[arg-type]
    assert ours(engine, tiny / "a.safetensors", "euler", prompt="red (apple:1.3) BREAK blue [house]") == theirs
    assert ours(engine, tiny / "a.safetensors", "euler", prompt="a very long prompt, " * 40)


def test_bf16_within_its_rounding(engine: LocalEngine, tiny: Path) -> None:
    """bf16 draws its noise from the same numbers, so the picture is the same one, less exact."""
    full = ours(engine, tiny / "a.safetensors", "euler")
    half = ours(engine, tiny / "a.safetensors", "euler", precision="bf16")
    assert full != half
    assert sum(abs(a - b) for a, b in zip(full, half, strict=True)) / len(full) < 12
