"""Settings of other programs' pictures become requests, and what cannot be carried over is said."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from support import adapters
from support.foreign_pictures import PICTURES, PROMPT, png

import safelight
from safelight.catalog.catalog import Catalog
from safelight.catalog.defaults import set_defaults
from safelight.catalog.file_hashes import FileHashes
from safelight.errors import RequestError
from safelight.pictures.generation_data import GenerationData, UsedLora
from safelight.pictures.read_generation_data import read
from safelight.request.adapters import Lora
from safelight.request.foreign_samplers import COMFY, INVOKE, of_comfy, of_invoke, of_label
from safelight.request.samplers import SAMPLERS
from safelight.resolve.foreign import carry_over
from safelight.resolve.resolve import resolve


@pytest.fixture
def catalog(root: Path, tiny: Path, tmp_path: Path) -> Catalog:
    """A library with a model, a VAE and LoRAs under the names that the pictures have."""
    made = Catalog.under(root)
    made.library.add(tiny / "a.safetensors", "dream v8")
    made.library.add(tiny / "xl.safetensors", "Dreamshaper 8")
    for number, name in enumerate(("one", "two", "style one", "glow")):
        made.adapters.add(adapters.write(tmp_path / f"{name}.safetensors", seed=number), name)
    start = "first_stage_model."
    vae = {n.removeprefix(start): one for n, one in load_file(tiny / "b.safetensors").items() if n.startswith(start)}
    save_file(vae, tmp_path / "vae-ft-mse.safetensors")
    made.adapters.add(tmp_path / "vae-ft-mse.safetensors")
    return made


def data_of(label: str) -> GenerationData:
    with PILImage.open(io.BytesIO(PICTURES[label]())) as picture:
        found = read(picture)
    assert found is not None
    return found


def test_a_picture_of_a1111(catalog: Catalog) -> None:
    found = carry_over(data_of("A1111, PNG"), catalog, FileHashes(catalog.library.root))
    request = found.request()
    assert (request.model, request.prompt, request.vae) == ("dream v8", PROMPT, "vae-ft-mse")
    assert (request.sampler, request.schedule, request.clip_skip) == ("dpmpp_2m", "karras", 1)
    assert (request.width, request.height, request.seed, request.cfg) == (512, 768, 1234567890, 6.5)
    assert request.loras == (Lora("style one", 0.7),)
    assert (request.hires_scale, request.hires_strength) == (2.0, 0.55)
    hashes = [one for one in found.left_out if "was found by its name, and not by the hash" in one]
    assert [one.partition(" was")[0] for one in hashes] == ["dream v8", "style one"]
    assert {*found.left_out} - {*hashes} == {"A1111 draws its noise on the GPU, if it is not set otherwise"}


def test_a_picture_of_comfyui(catalog: Catalog) -> None:
    found = carry_over(data_of("ComfyUI"), catalog, FileHashes(catalog.library.root))
    request = found.request()
    assert (request.model, request.sampler, request.schedule) == ("dream v8", "dpmpp_2m", "karras")
    assert request.loras == (Lora("one", 0.8), Lora("two", -0.5))
    assert found.left_out == ("ComfyUI computes weights in prompts in another way than A1111 and Safelight do",)


def test_a_picture_of_invokeai(catalog: Catalog) -> None:
    """Its model has the name of an SDXL, which does not take everything that the picture says."""
    found = carry_over(data_of("InvokeAI"), catalog, FileHashes(catalog.library.root))
    request = found.request()
    assert (request.model, request.prompt_syntax, request.sampler) == ("Dreamshaper 8", "compel", "dpmpp_2m")
    assert "strength 0.6: the input image is not in the file" in found.left_out
    assert any("sd-vae-ft-mse is not in the library" in one for one in found.left_out)


def test_defaults_of_the_model_are_said_and_count_only_for_what_the_picture_leaves_out(catalog: Catalog) -> None:
    set_defaults(catalog.library, "dream v8", {"clip_skip": 1, "vae": "vae-ft-mse", "steps": 9, "sampler": "heun"})
    said = GenerationData("A1111", "x", model="dream v8", vae="None", steps=4)
    found = carry_over(said, catalog, FileHashes(catalog.library.root))
    job = resolve(found.request(), catalog)
    assert (job.request.clip_skip, job.request.vae, job.request.steps, job.parts) == (0, "", 4, ())
    assert job.request.sampler == "heun"
    assert "sampler is not in the file; the model's default heun counts" in found.left_out


def test_what_the_library_lacks_is_said(root: Path) -> None:
    found = carry_over(data_of("SwarmUI"), Catalog.under(root), FileHashes(root))
    assert found.left_out[0] == "the model dream is not in the library"
    assert "the LoRA one (0.5) is not in the library" in found.left_out
    with pytest.raises(RequestError, match="the model dream is not in the library; choose one with --model"):
        found.request()
    assert found.request("mine").model == "mine"


def test_a_hash_finds_a_model_of_any_name(catalog: Catalog, tiny: Path, tmp_path: Path) -> None:
    hashes = FileHashes(catalog.library.root)
    path = tiny / "xl.safetensors"
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:10]
    said = GenerationData("A1111", prompt="x", model="nobody", model_hash=digits)
    assert carry_over(said, catalog, hashes).model == ""
    hashes.of(path)
    assert carry_over(said, catalog, hashes).model == "Dreamshaper 8"
    lora = next(card for card in catalog.adapters.cards() if card.name == "glow").path
    data = lora.read_bytes()
    hashes.of(lora)
    autov3 = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    used = replace(said, loras=(UsedLora("renamed", 0.5, autov3),))
    assert carry_over(used, catalog, hashes).fields["loras"] == (Lora("glow", 0.5),)


def test_what_a_family_lacks_is_left_out(catalog: Catalog) -> None:
    said = GenerationData(
        "A1111", "x", model="dream v8", guidance=3.5, shift=3.0, width=513, seed=2**40, sampler="Restart", steps=0
    )
    found = carry_over(said, catalog, FileHashes(catalog.library.root))
    assert {"guidance", "shift", "seed", "sampler", "steps"}.isdisjoint(found.fields)
    assert found.fields["width"] == 512
    words = " ".join(found.left_out)
    for part in ("distilled guidance", "no shift", "width 513 becomes 512", "seed 1099511627776", "Restart", "steps 0"):
        assert part in words, words


def test_every_name_of_a_sampler_is_one() -> None:
    assert {*INVOKE.values(), *COMFY.values()} <= SAMPLERS.keys()
    assert of_invoke("dpmpp_2m_sde_k") == ("dpmpp_2m_sde", "karras")
    assert of_invoke("dpmpp_3m") is None
    assert of_comfy("euler_ancestral", "normal") == ("euler_a", "default")
    assert of_comfy("euler", "beta") is None
    assert of_label("DPM++ 2M Karras", "") == ("dpmpp_2m", "karras")
    assert of_label("Euler", "Simple") == ("euler", "default")
    assert of_label("Euler", "Beta") is None


def test_the_command_makes_the_picture(catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safelight.cli.remake import make_close
    from safelight.settings import Settings

    text = "a red apple\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 4, Size: 64x64, Model: dream.v8, Version: v1.9"
    (tmp_path / "theirs.png").write_bytes(png(parameters=text))
    make_close(Settings(root=catalog.library.root, threads=1), tmp_path / "theirs.png", "", tmp_path / "out", True)
    row: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["program"], len(row["not_carried_over"])) == ("A1111", 1)
    with PILImage.open(row["path"]) as made:
        request = json.loads(made.info["safelight"])["request"]
    assert (request["model"], request["seed"], request["steps"], request["cfg"]) == ("dream v8", 4, 2, 3.0)
    right = safelight.Request("a red apple", "dream v8", seed=4, steps=2, cfg=3.0, width=64, height=64, sampler="euler")
    again = next(safelight.open_engine(catalog.library.root, threads=1).generate(right))
    stored = json.loads(made.info["safelight"])
    assert again.metadata["request"] == stored["request"]
    assert again.pixels_sha256 == stored["pixels_sha256"]
