"""A hundred jobs with LoRAs, in one order, through one process: how many images differ from those of fresh processes?

``python benchmarks/adapter_jobs.py`` runs the same jobs through plain diffusers (``load_lora_weights``,
``set_adapters``, ``unload_lora_weights``; and with ``fuse_lora``), through InvokeAI's own loader, model cache and LoRA
patcher (in the environment that ``make bench-peers`` makes), and through Safelight: two random checkpoints of SD 1.5's
size (``benchmarks/checkpoints.py build/bench``), none to two of three LoRAs at several strengths, 64×64, 2 steps. Every
different job is also made by a fork of a process that has only imported. Each system is compared with itself only.

InvokeAI computes in fp32 on a CPU; *one fits* gives its cache 6 GiB. *Drift*: how far the last image of a job is from
the fresh one at most, of 255.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from peers import FOLDER, VENVS, install  # noqa: E402

ROWS = {
    "diffusers, load, set, unload; bf16": ("", "plain", "bf16"),
    "InvokeAI, one fits": ("invokeai", "invokeai", "6"),
    "InvokeAI, both fit": ("invokeai", "invokeai", "14"),
    "Safelight, bf16": ("", "safelight", "bf16"),
    "Safelight, fp32": ("", "safelight", "fp32"),
    "diffusers, load, fuse, unfuse, unload; bf16": ("", "fused", "bf16"),
}
JOBS, KINDS, STEPS, SIDE = 100, 16, 2, 64
LORAS = ("lora1", "lora2")
STRENGTHS = (0.6, 1.0)

Job = tuple[str, tuple[tuple[str, float], ...], int]
"""A checkpoint, adapters with their strengths, a seed."""

Make = Callable[[Job], bytes]


def jobs() -> list[Job]:
    chance = random.Random(0)
    kinds: list[Job] = []
    while len(kinds) < KINDS:
        chosen = chance.sample(LORAS, chance.randint(0, 2))
        kind = chance.choice("AB"), tuple((name, chance.choice(STRENGTHS)) for name in chosen), chance.randint(0, 1)
        if kind not in kinds:
            kinds.append(kind)
    return [chance.choice(kinds) for _ in range(JOBS)]


def seeded(pipe: Any, seed: int) -> bytes:
    import torch

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    call = {"num_inference_steps": STEPS, "width": SIDE, "height": SIDE, "generator": generator}
    return pipe("red apple", **call).images[0].tobytes()


def diffusers_way(dtype: str, fuse: bool) -> Make:
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    pipes: dict[str, Any] = {}

    def made(job: Job) -> bytes:
        name, loras, seed = job
        if name not in pipes:
            kind: Any = diffusers.StableDiffusionPipeline
            dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
            pipes[name] = kind.from_pretrained(FOLDER / name, torch_dtype=dtypes[dtype], safety_checker=None)
            pipes[name].scheduler = diffusers.EulerDiscreteScheduler.from_config(pipes[name].scheduler.config)
        pipe = pipes[name]
        for lora, _ in loras:
            pipe.load_lora_weights(str(FOLDER / f"{lora}.safetensors"), adapter_name=lora)
        if loras:
            pipe.set_adapters([lora for lora, _ in loras], [strength for _, strength in loras])
        if loras and fuse:
            pipe.fuse_lora(adapter_names=[lora for lora, _ in loras])
        image = seeded(pipe, seed)
        if loras and fuse:
            pipe.unfuse_lora()
        if loras:
            pipe.unload_lora_weights()
        return image

    return made


def plain(dtype: str) -> Make:
    return diffusers_way(dtype, fuse=False)


def fused(dtype: str) -> Make:
    return diffusers_way(dtype, fuse=True)


def with_prefix() -> Path:
    """The checkpoints with ``text_model.`` in the names of their text encoders' tensors: without it (transformers 5
    saves them so) InvokeAI's transformers draws those weights at random, with a warning."""
    from safetensors.torch import load_file, save_file

    home = FOLDER / "with-prefix"
    for name in "AB":
        target = home / name
        if target.exists():
            continue
        (target / "text_encoder").mkdir(parents=True)
        for path in (FOLDER / name).iterdir():
            if path.name != "text_encoder":
                (target / path.name).symlink_to(path.resolve())
        for path in (FOLDER / name / "text_encoder").iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, target / "text_encoder")
        source = FOLDER / name / "text_encoder" / "model.safetensors"
        tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(source).items()}
        save_file(tensors, target / "text_encoder" / "model.safetensors", {"format": "pt"})
    return home


def invokeai(limit: str) -> Make:
    import logging

    import diffusers
    import torch
    from invokeai.backend.model_manager.load import ModelLoaderRegistry  # type: ignore[import-not-found]
    from invokeai.backend.model_manager.taxonomy import SubModelType  # type: ignore[import-not-found]
    from invokeai.backend.patches.layer_patcher import LayerPatcher  # type: ignore[import-not-found]
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import (  # type: ignore[import-not-found]
        lora_model_from_sd_state_dict,
    )
    from peers import invokeai_cache
    from safetensors.torch import load_file

    settings, cache, configs = invokeai_cache(limit, with_prefix())
    log = logging.getLogger("peers")
    patches: dict[str, Any] = {}
    tokenizers: dict[str, Any] = {}

    def part(name: str, sub: Any) -> Any:
        kind, config, which = ModelLoaderRegistry.get_implementation(configs[name], sub)
        return kind(app_config=settings, logger=log, ram_cache=cache).load_model(config, which)

    def made(job: Job) -> bytes:
        name, loras, seed = job
        for lora, _ in loras:
            if lora not in patches:
                state = load_file(FOLDER / f"{lora}.safetensors")
                patches[lora] = lora_model_from_sd_state_dict(state_dict=state)
        if name not in tokenizers:
            with part(name, SubModelType.Tokenizer).model_on_device() as (_, tokenizer):
                tokenizers[name] = tokenizer
        wanted = [(patches[lora], strength) for lora, strength in loras]

        def patched(module: Any, cached: Any, prefix: str) -> Any:
            return LayerPatcher.apply_smart_model_patches(
                model=module, patches=wanted, prefix=prefix, dtype=module.dtype, cached_weights=cached
            )

        with (
            part(name, SubModelType.TextEncoder).model_on_device() as (cached, encoder),
            patched(encoder, cached, "lora_te_"),
            torch.no_grad(),
        ):
            tokens = tokenizers[name](
                ["red apple", ""], padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids
            prompt, negative = encoder(tokens)[0].chunk(2)
        scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        with (
            part(name, SubModelType.UNet).model_on_device() as (cached, unet),
            patched(unet, cached, "lora_unet_"),
            part(name, SubModelType.VAE).model_on_device() as (_, vae),
        ):
            built: Any = diffusers.StableDiffusionPipeline
            pipe = built(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator("cpu").manual_seed(seed)
            made = pipe(
                prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=STEPS, width=SIDE,
                height=SIDE, generator=generator,
            )  # fmt: skip
            return made.images[0].tobytes()

    return made


def safelight(dtype: str) -> Make:
    import safelight as ours
    from safelight.request.adapters import Lora

    opened: list[Any] = []

    def made(job: Job) -> bytes:
        if not opened:
            opened.append(ours.open_engine(FOLDER / "root", threads=2))
        name, loras, seed = job
        request = ours.Request(
            "red apple",
            str(FOLDER / f"{name}.safetensors"),
            seed=seed,
            steps=STEPS,
            width=SIDE,
            height=SIDE,
            precision=dtype,  # type: ignore[arg-type]
            loras=tuple(Lora(str(FOLDER / f"{lora}.safetensors"), strength) for lora, strength in loras),
        )
        return next(opened[0].generate(request)).pixels

    return made


def forked(make: Make, job: Job) -> bytes:
    """By a fork of this process, which has only imported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "wb") as told:
            told.write(make(job))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        made = told.read()
    os.waitpid(child, 0)
    assert len(made) == SIDE * SIDE * 3, job
    return made


def row(function: str, argument: str) -> dict[str, int]:
    """How many images differ, of how many; the largest distance, of 255."""
    import numpy as np

    warnings.simplefilter("ignore")
    make: Make = globals()[function](argument)
    order = jobs()
    right = {job: forked(make, job) for job in dict.fromkeys(order)}
    differ, most = 0, 0
    for job in order:
        made = make(job)
        if hashlib.sha256(made).digest() != hashlib.sha256(right[job]).digest():
            differ += 1
            one, other = (np.frombuffer(pixels, np.uint8).astype(int) for pixels in (made, right[job]))
            most = max(most, int(np.abs(one - other).max()))
    return {"differ": differ, "jobs": len(order), "kinds": len(right), "most": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS)
    arguments = parser.parse_args()
    if arguments.row:
        _, function, argument = ROWS[arguments.row]
        print(json.dumps(row(function, argument)))
        return
    from adapters import prepared

    prepared()
    print("| | images that differ from a fresh process's | by at most, of 255 |\n|---|---|---|")
    for name, (venv, _, _) in ROWS.items():
        python = install(venv) if venv else Path(sys.executable)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "INVOKEAI_ROOT": str(VENVS / "invokeai-root")}
        done = subprocess.run(
            [python, __file__, "--row", name], capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            print(f"| {name} | {' '.join(done.stderr.strip().splitlines()[-1:])[:200]} | |", flush=True)
            continue
        got = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {got['differ']} of {got['jobs']} | {got['most']} |", flush=True)


if __name__ == "__main__":
    main()
