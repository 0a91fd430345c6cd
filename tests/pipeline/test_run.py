"""Batches, cancelling, CLIP skip, the process's own numeric state, and what an image says of itself."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints, oracle
from support.scale import thinned

import safelight
from safelight.errors import NotFiniteError
from safelight.pipeline.numerics.fp32 import fp32_in_force
from safelight.pipeline.numerics.table import flushes_denormals
from safelight.request.results import Progress
from safelight.request.samplers import SAMPLERS
from safelight.resolve.check import check
from safelight.workers.local_engine import LocalEngine


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


def test_image_k_of_a_batch_is_that_of_its_seed_alone(engine: LocalEngine, ask) -> None:
    for sampler in ("euler", "euler_a", "dpmpp_sde"):
        batch = list(engine.generate(ask(seed=5, count=3, sampler=sampler)))
        alone = [next(engine.generate(ask(seed=seed, sampler=sampler))) for seed in (7, 5, 6)]
        assert [image.seed for image in batch] == [5, 6, 7]
        assert [image.pixels for image in batch] == [alone[1].pixels, alone[2].pixels, alone[0].pixels]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", thinned([1, 2, 3]))
def test_every_sampler_runs_at_the_fewest_steps(sampler: str, steps: int, engine: LocalEngine, ask) -> None:
    image = next(engine.generate(ask(sampler=sampler, steps=steps)))
    assert len(image.pixels) == 64 * 64 * 3


def test_cancel_at_every_step_leaves_all_as_it_was(engine: LocalEngine, ask) -> None:
    right = next(engine.generate(ask(steps=3))).pixels_sha256
    events: list[Progress] = []
    next(engine.generate(ask(steps=3), events.append))
    assert [e.stage for e in events] == ["switch", "encode", "denoise", "denoise", "denoise", "decode", "decode"]
    for stop in range(len(events)):
        seen = 0

        def cancel(_: Progress, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop + 1:
                raise safelight.Cancelled

        with pytest.raises(safelight.Cancelled):
            next(engine.generate(ask(steps=3), cancel))
        assert next(engine.generate(ask(steps=3))).pixels_sha256 == right


def test_clip_skip_is_the_hidden_state_and_the_final_norm(engine: LocalEngine, ask) -> None:
    pipe = oracle.pipeline("sd1", 1)
    ids = pipe.tokenizer("red apple", padding="max_length", max_length=77, return_tensors="pt").input_ids
    none = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        skipped = [
            pipe.text_encoder.final_layer_norm(pipe.text_encoder(x, output_hidden_states=True).hidden_states[-2])
            for x in (ids, none)
        ]
    image = pipe(
        prompt_embeds=skipped[0],
        negative_prompt_embeds=skipped[1],
        num_inference_steps=2,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert next(engine.generate(ask(clip_skip=1))).pixels == image.tobytes()
    with pytest.raises(safelight.RequestError, match="has only 2 layers"):
        next(engine.generate(ask(clip_skip=2)))


def test_the_process_is_left_as_it_was_and_does_not_matter(engine: LocalEngine, ask) -> None:
    right = next(engine.generate(ask(sampler="euler_a"))).pixels_sha256
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.manual_seed(99)
    np.random.seed(5)
    random.seed(6)
    states = (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index]
    try:
        again = next(engine.generate(ask(sampler="euler_a"))).pixels_sha256
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
        assert random.getstate() == states[2]
        assert torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
    assert again == right


def test_attention_10_an_image_says_what_changed_while_it_was_made(engine: LocalEngine, ask) -> None:
    def change(_: Progress) -> None:
        torch.backends.nnpack.set_flags(False)

    changed = next(engine.generate(ask(), change))
    assert changed.metadata["numerics"]["differs"] == {"nnpack": "False"}
    assert [text for text in changed.warnings if "the numeric setting nnpack was False" in text]
    assert not next(engine.generate(ask())).warnings


def test_what_else_of_the_process_changes_pixels_does_not(engine: LocalEngine, ask) -> None:
    right = next(engine.generate(ask())).pixels_sha256
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert next(engine.generate(ask())).pixels_sha256 == right
    with torch.inference_mode():
        assert next(engine.generate(ask())).pixels_sha256 == right
    torch.backends.cuda.enable_flash_sdp(False)
    torch._C._set_mkldnn_enabled(False)
    torch.set_flush_denormal(True)
    torch.set_autocast_enabled("cuda", True)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("medium")
    inside: list[tuple[object, ...]] = []

    def look(_: object) -> None:
        inside.append((torch.is_autocast_enabled("cuda"), torch.backends.cudnn.benchmark, fp32_in_force()))

    try:
        assert next(engine.generate(ask(), look)).pixels_sha256 == right
        assert set(inside) == {(False, False, "ieee")}
        assert torch.is_autocast_enabled("cuda")
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "medium"
        assert next(engine.generate(ask())).pixels_sha256 == right
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch._C._get_mkldnn_enabled()
        assert flushes_denormals()
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_flash_sdp(True)
        torch._C._set_mkldnn_enabled(True)
        torch.set_flush_denormal(False)


def test_attention_06_nan_is_an_error_and_never_a_black_image(engine: LocalEngine, tmp_path: Path) -> None:
    tensors = load_file(checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1))
    for name in tensors:
        if name.startswith("first_stage_model.decoder") and name.endswith("conv1.weight"):
            tensors[name] *= 1e38
    save_file(tensors, tmp_path / "m.safetensors")
    request = safelight.Request("x", str(tmp_path / "m.safetensors"), steps=1, width=64, height=64)
    with pytest.raises(NotFiniteError, match="the VAE computed NaN"):
        next(engine.generate(request))


def test_generating_within_a_generation(engine: LocalEngine, ask) -> None:
    right = next(engine.generate(ask("b.safetensors"))).pixels_sha256
    inner: list[str] = []
    outer = next(
        engine.generate(ask(), lambda _: inner.append(next(engine.generate(ask("b.safetensors"))).pixels_sha256))
    )
    assert set(inner) == {right}
    assert outer.pixels_sha256 == next(engine.generate(ask())).pixels_sha256


def test_what_an_image_says_is_what_made_it(engine: LocalEngine, ask, tiny: Path) -> None:
    image = next(engine.generate(ask(seed=3)))
    assert image.pixels_sha256 == hashlib.sha256(image.pixels).hexdigest()
    assert image.metadata["request"]["seed"] == 3
    assert image.metadata["model"]["digest"] == image.model_digest
    assert image.metadata["run"]["threads"] == 1
    assert image.metadata["run"]["versions"]["torch"] == torch.__version__
    assert image.seconds.total > 0
    assert image.host_peak_bytes > 1e8


@pytest.mark.parametrize(
    ("name", "message"),
    [("inpaint.safetensors", "inpainting"), ("refiner.safetensors", "makes no images from text alone")],
)
def test_load_02_a_checkpoint_for_something_else_is_refused(name: str, message: str, engine: LocalEngine, ask) -> None:
    with pytest.raises(safelight.RequestError, match=message):
        next(engine.generate(ask(name)))


def test_two_engines_of_a_process_and_a_default_device_do_not_meet(root: Path, ask) -> None:
    engines = [safelight.open_engine(root) for _ in range(2)]
    right = next(engines[0].generate(ask())).pixels_sha256
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda engine: next(engine.generate(ask())).pixels_sha256, engines * 3))
    assert set(made) == {right}
    torch.set_default_device("meta")
    try:
        assert next(engines[0].generate(ask())).pixels_sha256 == right
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


def test_zero_terminal_snr_wants_a_sampler_that_begins_with_noise(engine: LocalEngine, ask) -> None:
    model = replace(engine.library.find(ask().model), zero_terminal_snr=True)
    check(ask(sampler="euler"), model)
    with pytest.raises(safelight.RequestError, match=r"zero terminal SNR\); these can: ddim"):
        check(ask(sampler="heun"), model)
