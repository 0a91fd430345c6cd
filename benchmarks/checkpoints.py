"""Seeded random checkpoints of full size, fp16, for speed and memory: their images are noise.

``python benchmarks/checkpoints.py DIR`` writes A and B of SD 1.5's size, each as one file in LDM's names and as a
diffusers folder (8.5 GB in all); with ``--sdxl`` also one of SDXL's size, as one file in diffusers' names (6.9 GB).
Nothing is written again that is there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from safelight.families.components import Config
from safelight.families.family_model import construct
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.vae import VAEConfig
from safelight.families.registry import family
from safelight.families.sd.unet import UNetConfig

SD15: dict[str, Config] = {
    "text_encoder": CLIPConfig(768, 3072, 12, 49408, 77, None, "quick_gelu"),
    "unet": UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 768, False),
    "vae": VAEConfig(3, 3, 4, (128, 256, 512, 512), 2),
}
SDXL: dict[str, Config] = {
    "text_encoder": CLIPConfig(768, 3072, 12, 49408, 77, None, "quick_gelu"),
    "text_encoder_2": CLIPConfig(1280, 5120, 32, 49408, 77, 1280, "gelu"),
    "unet": UNetConfig(4, 4, (320, 640, 1280), 2, (0, 2, 10), 10, 2048, True, 2816),
    "vae": VAEConfig(3, 3, 4, (128, 256, 512, 512), 2),
}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def tensors(config: Config, seed: int) -> dict[str, torch.Tensor]:
    """Random weights that keep signals alive: He's deviation for matrices, one for norms, nothing for biases."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for row in config.rows():
        values = torch.randn(row.shape, generator=generator)
        if len(row.shape) >= 2:
            values *= 0.02 if "embedding" in row.name else min(0.02, values[0].numel() ** -0.5)
        else:
            values = values * 0.02 + (0.0 if row.name.endswith("bias") else 1.0)
        out[row.name] = values.half()
    return out


def write(folder: Path, name: str, seed: int) -> None:
    single, home = folder / f"{name}.safetensors", folder / name
    if single.exists() and (home / "model_index.json").exists():
        return
    whole: dict[str, torch.Tensor] = {}
    for number, (role, config) in enumerate(SD15.items()):
        made = tensors(config, seed * 10 + number)
        (home / role).mkdir(parents=True, exist_ok=True)
        save_file(made, home / role / f"{FILES[role]}.safetensors", {"format": "pt"})
        with torch.device("meta"):
            module = construct(family("sd1"), config)
        settings = module.config.to_dict() if role == "text_encoder" else dict(module.config)  # type: ignore[union-attr]
        settings |= {"_class_name": type(module).__name__}
        (home / role / "config.json").write_text(json.dumps(settings, default=str))
        for row in config.rows():
            ldm = row.name if role == "text_encoder" else row.sources[min(1, len(row.sources) - 1)].name
            square = ".mid.attn_1." in ldm and made[row.name].ndim == 2
            whole[PREFIXES[role] + ldm] = made[row.name][:, :, None, None] if square else made[row.name]
    save_file(whole, single, {"format": "pt"})
    _rest(home)


def write_sdxl(folder: Path) -> None:
    """One file of SDXL's size, in the names of diffusers' modules."""
    single = folder / "XL.safetensors"
    if single.exists():
        return
    whole: dict[str, torch.Tensor] = {}
    for number, (role, config) in enumerate(SDXL.items()):
        whole |= {f"{role}.{name}": tensor for name, tensor in tensors(config, 70 + number).items()}
    save_file(whole, single, {"format": "pt"})


def _rest(home: Path) -> None:
    """The scheduler's and tokenizer's files, without which diffusers does not load a folder."""
    from diffusers import EulerDiscreteScheduler
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    from safelight.request.prompts.tokens import VOCABULARY

    model = json.loads(VOCABULARY.read_text())["model"]
    merges: Any = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77)
    tokenizer.save_pretrained(home / "tokenizer")
    schedule: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    EulerDiscreteScheduler(**schedule).save_pretrained(home / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    (home / "model_index.json").write_text(json.dumps(index))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate("AB", 1):
        write(folder, name, seed)
    if "--sdxl" in sys.argv:
        write_sdxl(folder)


if __name__ == "__main__":
    main()
