"""A user's folder as ComfyUI lays it out, with files of all families: one command adds all of it, one command draws a
sheet with all models, and with little memory and in any order the pixels are the same.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import tiny_families
from support.scale import times
from typer.testing import CliRunner

import safelight
from safelight.cli.main import app
from safelight.errors import InputError
from safelight.families.registry import families

SEED = 5
PROMPT = "a red apple"

PLACES = {
    "z-image": {"transformer": "z_image_bf16", "vae": "ae"},
    "flux": {"transformer": "flux1-dev", "text_encoder": "clip_l", "text_encoder_2": "t5xxl_fp16"},
    "flux2-klein": {"transformer": "flux-2-klein-base-4b", "text_encoder": "qwen_3_4b", "vae": "flux2-vae"},
    "chroma": {"transformer": "Chroma1-HD"},
    "qwen-image": {
        "transformer": "qwen_image_bf16",
        "text_encoder": "qwen_2.5_vl_7b",
        "vae": "qwen_image_vae",
    },
    "krea-2": {"transformer": "krea2_raw_bf16", "text_encoder": "qwen3vl_4b_bf16"},
    "ernie-image": {"transformer": "ernie-image", "text_encoder": "ministral-3-3b"},
    "anima": {"transformer": "anima-base-v1.0", "text_encoder": "qwen_3_06b_base"},
}
"""The files of each family, by role, with the names that people have."""

SHARED: dict[str, dict[str, str]] = {
    "z-image": {"text_encoder": "qwen_3_4b"},
    "flux": {"vae": "ae"},
    "flux2-klein": {},
    "chroma": {"text_encoder": "t5xxl_fp16", "vae": "ae"},
    "qwen-image": {},
    "krea-2": {"vae": "qwen_image_vae"},
    "ernie-image": {"vae": "flux2-vae"},
    "anima": {"vae": "qwen_image_vae"},
}
"""The components that come with another family's files, by role."""

VARIANTS = ("z-image=base", "dev", "flux2-klein=base", "hd", "text-to-image", "raw", "ernie-image=base")
"""What no file says. ``base`` alone would be a variant of several families."""

LORA = "apple style"

if not set(PLACES) <= set(tiny_families()):
    pytest.skip("the installed libraries lack some of these models", allow_module_level=True)


def subfolder(base: str, role: str) -> str:
    family = families()[base]
    return {family.denoiser: "diffusion_models", family.vae: "vae"}.get(role, "text_encoders")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder ``models``, also with what Safelight cannot use."""
    place = tmp_path_factory.mktemp("comfy")
    folder = place / "models"
    for name in ("diffusion_models", "text_encoders", "vae", "loras", "upscale_models"):
        (folder / name).mkdir(parents=True)
    for base, names in PLACES.items():
        written = tiny_families()[base].write_files(place / base, SEED)
        for role, name in names.items():
            shutil.move(written[role], folder / subfolder(base, role) / f"{name}.safetensors")
        for tokenizer in (place / base / "text_encoders").glob("tokenizer.json"):
            shutil.move(tokenizer, folder / "text_encoders/ministral-3-3b.tokenizer.json")
        shutil.rmtree(place / base)
    generator = torch.Generator().manual_seed(1)
    module, pair = "transformer.transformer_blocks.0.img_mlp.net.2", {"lora_A": (4, 256), "lora_B": (64, 4)}
    lora = {f"{module}.{kind}.weight": torch.randn(shape, generator=generator) for kind, shape in pair.items()}
    save_file(lora, folder / f"loras/{LORA}.safetensors")
    save_file({"body.0.rdb1.conv1.weight": torch.zeros(4)}, folder / "upscale_models/4x.safetensors")
    (folder / "loras/half a download.safetensors").write_bytes(b"\x10")
    (folder / "vae/put_vae_here").write_text("")
    return folder


def run(root: Path, *arguments: str, code: int = 0) -> Any:
    found = CliRunner().invoke(app, [*arguments, "--root", str(root)])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def rows(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def variant_options(variants: tuple[str, ...]) -> list[str]:
    return [word for variant in variants for word in ("--variant", variant)]


@pytest.mark.full
def test_it_is_added_by_one_command_and_drawn_by_one_in_any_order_with_little_memory(
    root: Path, folder: Path, tmp_path: Path
) -> None:
    said = run(root, "models", "add", str(folder), *variant_options(VARIANTS))
    assert f"added {LORA}: lora for qwen-image, fp32" in said.output
    assert "4x.safetensors: is a upscaler" in said.output
    assert "half a download.safetensors: " in said.output
    listed = rows(run(root, "models", "list", "--json").output)
    models = {row["base"]: row for row in listed if row["origin"] == "added"}
    names = {base: places["transformer"] for base, places in PLACES.items()}
    mine = {base: models[base] for base in names}
    assert {base: row["name"] for base, row in mine.items()} == names
    chosen = {
        **dict.fromkeys(names, "base"),
        "flux": "dev",
        "chroma": "hd",
        "qwen-image": "text-to-image",
        "anima": "text-to-image",
    }
    assert {base: row["variant"] for base, row in mine.items()} == {**chosen, "krea-2": "raw"}
    for base, row in mine.items():
        own = {role: name for role, name in PLACES[base].items() if role != "transformer"}
        assert json.loads(run(root, "models", "show", row["name"], "--json").output)["sources"] == own | SHARED[base]

    quick = ("--steps", "2", "--width", "64", "--height", "64", "--seed", "3", "--json")
    sheet = run(root, "grid", PROMPT, "--x", f"model={','.join(names.values())}", *quick, "--out", str(tmp_path / "o"))
    right = dict(zip(names.values(), (row["pixels_sha256"] for row in rows(sheet.output)), strict=True))
    assert len(set(right.values())) == len(names)
    assert (tmp_path / "o/sheet.png").exists()
    styled = f"{PROMPT} <lora:{LORA}:0.8>"
    [made] = rows(
        run(root, "generate", styled, "-m", names["qwen-image"], *quick, "--out", str(tmp_path / "one")).output
    )
    assert made["pixels_sha256"] not in right.values()

    asked = [(PROMPT, name, digest) for name, digest in right.items()]
    asked += [(styled, names["qwen-image"], made["pixels_sha256"])] * 2
    asked = asked * times(1, 3)
    random.Random(SEED).shuffle(asked)
    engine = with_little_memory(root, list(names.values()))
    for prompt, name, digest in asked:
        request = safelight.Request(prompt, name, seed=3, steps=2, width=64, height=64)
        assert next(engine.generate(request)).pixels_sha256 == digest, name


def with_little_memory(root: Path, names: list[str]) -> Any:
    """An engine with a tenth of the memory of all models together, but at least what Safelight says that it needs."""
    engine: Any = safelight.open_engine(root)
    components = {part.digest: part for name in names for part in engine.library.get(name).manifest.components}.values()
    planner = engine.resources.residency.planner
    whole = sum(tensor.nbytes for part in components for tensor in part.tensors)
    least = max(planner.min_weight_bytes(part, torch.float32) for part in components)
    engine.close()
    limit = max(whole / 10, least)
    assert limit < whole / 4
    return safelight.open_engine(root, max_cache_ram_gb=limit / 2**30)


def test_variants_are_read_and_refused_by_name(root: Path, folder: Path) -> None:
    said = run(root, "models", "add", str(folder), "--variant", "base", "--variant", "turbo").output
    ways = "write --variant z-image=base or --variant z-image=turbo"
    assert f"z_image_bf16.safetensors: is z-image, for which several variants were given; {ways}" in said
    assert "flux1-dev.safetensors: is flux, and nothing in it says which variant" in said
    assert "added flux-2-klein-base-4b: flux2-klein" in said
    file = str(folder / "diffusion_models/z_image_bf16.safetensors")
    for given, problem in (
        ("zimage=base", "no family 'zimage'; there are anima"),
        ("z-image=hd", "the variants of z-image are turbo, base"),
    ):
        with pytest.raises(InputError, match=f"--variant {given}: {problem}"):
            CliRunner().invoke(app, ["models", "add", file, "--variant", given], catch_exceptions=False)
    run(root, "models", "add", file, *variant_options(("flux=dev", "z-image=turbo")))
    run(root, "models", "set", "z_image_bf16", "--variant", "base")
    [row] = [row for row in rows(run(root, "models", "list", "--json").output) if row["name"] == "z_image_bf16"]
    assert row["variant"] == "base"
