"""Random jobs with tiny checkpoints of the families with rectified flow; see :mod:`support.combinations`."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import controls, flow_controls, flux
from support.compact_files import write_compact
from support.families import TinyFamily, tiny_families
from support.pictures import soft_picture

from safelight.catalog.catalog import Catalog
from safelight.families.features import Feature
from safelight.request.adapters import Control, Lora, Purpose
from safelight.request.schema import Request

PROMPTS = ("red apple", "", "a house by a blue lake", "cow")
SEEDS = {"flux": (1, 2), "z-image": (1, 2)}
"""Of the checkpoints of a family; one of the others."""

RANK = 2
CHANGED = 6
"""How many matrices a LoRA changes."""

KONTEXT, EDIT = "kontext", "qwen-image-edit"
EDITORS_SHARE = 0.05
"""Of all jobs: the models that edit see reference images with a million pixels."""


def drawing_families() -> list[str]:
    """Return the labels of the families that draw from text alone."""
    return sorted(label for label, tiny in tiny_families().items() if not tiny.references)


COMPACT = {
    "z-image": "Q8_0",
    "flux": "scaled fp8, older names",
    "chroma": "nf4, nested",
    "flux2-klein": "mxfp8",
    "qwen-image": "int8, rotated",
    "krea-2": "nvfp4",
}
"""Families that also have a model with a quantised denoiser, and its form."""


@dataclass(frozen=True)
class FlowFiles:
    """The files that jobs use.

    ``models``: names in the library, by family.
    ``loras``, ``nets``: LoRAs and ControlNets, by family.
    ``editors``: names of models in the library that edit reference images.
    """

    models: dict[str, list[str]]
    loras: dict[str, list[Path]]
    nets: dict[str, Path]
    folder: Path
    editors: list[str]

    @classmethod
    def make(cls, folder: Path, root: Path, names: Iterable[str], editors: bool = False) -> FlowFiles:
        """Write the files of these families into ``folder``, and add the checkpoints to the library under ``root``.

        ``editors``: FLUX.1 Kontext and Qwen-Image-Edit, too.
        """
        folder.mkdir()
        library = Catalog.under(root).library
        models: dict[str, list[str]] = {}
        for name in names:
            tiny = tiny_families()[name]
            for seed in SEEDS.get(name, (1,)):
                models.setdefault(name, []).append(f"{name}-{seed}")
                library.add(tiny.write_folder(folder / f"{name}-{seed}", seed), f"{name}-{seed}", variant=tiny.variant)
        for name, form in COMPACT.items():
            if name in models:
                models[name].append(f"{name}-quantised")
                path = _write_compact(folder / f"{name}-files", tiny_families()[name], form)
                # Several families have VAEs that fit; their latents differ.
                parts = [(Purpose.VAE, f"{name}-1")]
                library.add(path, f"{name}-quantised", variant=tiny_families()[name].variant, parts=parts)
        editing: list[str] = []
        if editors and "flux" in tiny_families():
            library.add(flux.write_folder(folder / KONTEXT, 1, KONTEXT), KONTEXT)
            editing.append(KONTEXT)
        if editors and EDIT in tiny_families():
            tiny = tiny_families()[EDIT]
            library.add(tiny.write_folder(folder / EDIT, 1), EDIT, variant=tiny.variant)
            editing.append(EDIT)
        makers = {"flux": lambda: flow_controls.flux_net("latents"), "z-image": lambda: flow_controls.zimage_net("2.1")}
        nets = {
            name: flow_controls.write(folder / f"net-{name}.safetensors", make())
            for name, make in makers.items()
            if name in models
        }
        loras = {name: [write_lora(folder, tiny_families()[name], seed) for seed in (1, 2)] for name in models}
        controls.picture(folder / "edges.png", 10)
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (16, 16, 48, 48))
        mask.save(folder / "mask.png")
        for number, size in enumerate(((64, 64), (70, 65))):
            soft_picture(folder / f"picture{number}.png", size, number)
        return cls(models, loras, nets, folder, editing)


def _write_compact(folder: Path, tiny: TinyFamily, form: str) -> Path:
    """Write a quantised denoiser. Its other components are those of the first model of its family."""
    folder.mkdir()
    path = tiny.write_files(folder, 1)[tiny.family.denoiser]
    return write_compact(path, load_file(path), form)[0]


def write_lora(folder: Path, tiny: TinyFamily, seed: int) -> Path:
    """Write a LoRA for the first matrices of the denoiser, as diffusers names them."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = tiny.family.denoiser
    rows = tiny.configs()[denoiser].rows()
    matrices = [row for row in rows if len(row.shape) == 2 and re.search(r"(blocks|layers)\..*\.weight$", row.name)]
    tensors: dict[str, torch.Tensor] = {}
    for module, shape in ((row.name.removesuffix(".weight"), row.shape) for row in matrices[:CHANGED]):
        for slot, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
            tensors[f"{denoiser}.{module}.lora_{slot}.weight"] = 0.3 * torch.randn(size, generator=generator)
    path = folder / f"lora-{tiny.name}-{seed}.safetensors"
    save_file(tensors, path)
    return path


def job(chance: random.Random, files: FlowFiles) -> Request:
    """A random valid job."""
    if files.editors and chance.random() < EDITORS_SHARE:
        name = chance.choice(files.editors)
        return Request("red apple", name, seed=1, steps=2, width=64, height=64, references=(_picture(files, 1),))
    name = chance.choice(sorted(files.models))
    tiny, of = tiny_families()[name], files.models[name]
    features = tiny.family.features_of(tiny.variant)
    more: dict[str, Any] = {"width": 64, "height": 64}
    start = chance.random()
    if start < 0.3:
        more |= {"image": _picture(files, 0), "strength": 0.6}
        if start < 0.15:
            more["mask"] = str(files.folder / "mask.png")
    elif start < 0.4:
        more |= {"hires_scale": 1.5, "hires_upscaler": chance.choice(("latent", "lanczos")), "hires_strength": 0.5}
    if Feature.REFERENCES in features and chance.random() < 0.5:
        more["references"] = tuple(_picture(files, number) for number in range(chance.randint(1, 2)))
    elif name in files.nets and chance.random() < 0.4:
        weight = chance.choice((0.5, 1.0))
        more["controls"] = (Control(str(files.nets[name]), str(files.folder / "edges.png"), weight=weight),)
    if Feature.GUIDANCE in features:
        more |= {"cfg": chance.choice((1.0, 2.5)), "negative": chance.choice(("", "dark"))}
    if chance.random() < 0.2:
        same = [one for other, some in files.models.items() if _shares_latents(other, name) for one in some]
        more["vae"] = chance.choice(same)
    if chance.random() < 0.15:
        more |= {"variation_seed": 5, "variation_strength": 0.3}
    chosen = chance.sample(files.loras[name], chance.randint(0, 2))
    return Request(
        chance.choice(PROMPTS),
        chance.choice(of),
        **more,
        seed=chance.randint(0, 3),
        steps=chance.randint(2, 3),
        sampler=chance.choice(("euler", "heun", "dpmpp_2m", "unipc")),
        shift=chance.choice((None, None, 1.0, 3.0, 100.0)),
        loras=tuple(Lora(str(path), chance.choice((-0.5, 0.3, 1.0))) for path in chosen),
    )


def _picture(files: FlowFiles, number: int) -> str:
    return str(files.folder / f"picture{number}.png")


def _shares_latents(one: str, other: str) -> bool:
    """Return whether the VAE of one family's tiny checkpoints fits those of another family."""
    both = [tiny_families()[name] for name in (one, other)]
    spaces = {tiny.family.latent_space for tiny in both}
    mine, theirs = (tiny.configs()[tiny.family.vae] for tiny in both)
    return len(spaces) == 1 and both[1].family.same_latents(mine, theirs)
