"""Makes tiny random checkpoints of every base, in every published form."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from support.scale import ALL
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from safelight.families.components import Config
from safelight.families.family_model import construct
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.vae import VAEConfig
from safelight.families.registry import family
from safelight.families.sd.unet import UNetConfig

VOCABULARY = 49408


def configs(base: str, in_channels: int = 4) -> dict[str, Config]:
    """The narrowest settings that each base's rules allow; in `make test-all`, with as many levels as published."""
    vae = VAEConfig(3, 3, 4, (32, 32, 32, 32), 1)
    first = CLIPConfig(64, 64, 2, VOCABULARY, 77, None, "quick_gelu")
    second = CLIPConfig(64, 64, 2, VOCABULARY, 77, 64, "gelu")
    if base == "sd1":
        widths, depths = ((32, 64, 64, 64), (1, 1, 1, 0)) if ALL else ((32, 64), (1, 0))
        unet = UNetConfig(in_channels, 4, widths, 1, depths, 1, 64, False)
        return {"text_encoder": first, "unet": unet, "vae": vae}
    if base == "sd2":
        widths, depths = ((64, 128, 128, 128), (1, 1, 1, 0)) if ALL else ((64, 128), (1, 0))
        unet = UNetConfig(in_channels, 4, widths, 1, depths, 1, 64, True)
        return {"text_encoder": CLIPConfig(64, 64, 2, VOCABULARY, 77, None, "gelu"), "unet": unet, "vae": vae}
    if base == "sdxl":
        widths, depths = ((64, 64, 128), (0, 1, 2)) if ALL else ((64, 128), (0, 2))
        unet = UNetConfig(in_channels, 4, widths, 1, depths, 2, 128, True, 6 * 256 + 64)
        return {"text_encoder": first, "text_encoder_2": second, "unet": unet, "vae": vae}
    widths, depths = ((64, 64, 128, 128), (0, 1, 2, 0)) if ALL else ((64, 128, 128), (0, 2, 0))
    unet = UNetConfig(in_channels, 4, widths, 1, depths, 2, 64, True, 5 * 256 + 64)
    return {"text_encoder_2": second, "unet": unet, "vae": vae}


def modules(base: str, seed: int = 0, in_channels: int = 4) -> dict[str, nn.Module]:
    """Build modules of diffusers and transformers in fp32, with seeded random weights that let signals pass."""
    built: dict[str, nn.Module] = {}
    generator = torch.Generator().manual_seed(seed)
    for role, config in configs(base, in_channels).items():
        built[role] = random_module(base, config, generator)
    return built


def random_module(base: str, config: Config, generator: torch.Generator) -> nn.Module:
    """Build a module of diffusers or transformers in fp32, with random weights that let signals pass."""
    with _without_initialization():
        module = construct(family(base), config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            std = 0.3 if "embedding" in name or "embed_tokens" in name else parameter[0].numel() ** -0.5
            parameter.normal_(0, std, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.normal_(1, 0.05, generator=generator)
    return module


def _without_initialization() -> AbstractContextManager[object]:
    """Within the context, modules keep arbitrary values: :func:`modules` sets all of them afterwards."""
    names = ("kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "ones_", "zeros_")
    context = ExitStack()
    context.enter_context(mock.patch.multiple(nn.init, **dict.fromkeys(names, _unchanged)))
    context.enter_context(mock.patch.object(PreTrainedModel, "_initialize_weights", _unchanged))
    return context


def _unchanged(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


def ldm_tensors(base: str, built: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors under their original names, as in a single file from a model site."""
    prefixes = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": {
            "sd1": "cond_stage_model.transformer.",
            "sd2": "cond_stage_model.model.",
            "sdxl": "conditioner.embedders.0.transformer.",
        }.get(base, ""),
        "text_encoder_2": f"conditioner.embedders.{1 if base == 'sdxl' else 0}.model.",
    }
    open_clip = {"text_encoder": base == "sd2", "text_encoder_2": True}
    out: dict[str, torch.Tensor] = {}
    for role, config in configs(base, _channels(built)).items():
        state = built[role].state_dict()
        fused: dict[str, list[torch.Tensor]] = {}
        for row in config.rows():
            tensor = state[row.name].clone()
            if role.startswith("text_encoder") and not open_clip[role]:
                name = row.name if row.name.startswith("text_model.") else f"text_model.{row.name}"
                out[prefixes[role] + name] = tensor
                continue
            source = row.sources[min(1, len(row.sources) - 1)] if role in ("unet", "vae") else row.sources[-1]
            if source.chunk is not None:
                fused.setdefault(prefixes[role] + source.name, []).append(tensor)
            elif source.transpose:
                out[prefixes[role] + source.name] = tensor.t().contiguous()
            else:
                square = role == "vae" and ".mid.attn_1." in source.name and tensor.ndim == 2
                out[prefixes[role] + source.name] = tensor[:, :, None, None] if square else tensor
        out |= {name: torch.cat(parts) for name, parts in fused.items()}
    if base == "sd2":
        last = "cond_stage_model.model.transformer.resblocks."
        out |= {k.replace(f"{last}1.", f"{last}2."): v.clone() for k, v in out.items() if k.startswith(f"{last}1.")}
        out["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
        out["cond_stage_model.model.text_projection"] = torch.eye(64)
    out["betas"] = torch.linspace(0, 1, 1000)
    out["model_ema.decay"] = torch.tensor(0.9999)
    return out


def _channels(built: dict[str, nn.Module]) -> int:
    return built["unet"].config.in_channels  # type: ignore[union-attr, return-value]


def diffusers_tensors(built: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors under diffusers' names with its folder names as prefixes, for a single file."""
    return {f"{role}.{name}": t.clone() for role, module in built.items() for name, t in module.state_dict().items()}


def write_single(
    path: Path,
    base: str,
    seed: int = 0,
    layout: str = "ldm",
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    in_channels: int = 4,
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a file with LDM's or diffusers' names. The suffix chooses ``.safetensors`` or ``.ckpt``."""
    built = modules(base, seed, in_channels)
    tensors = ldm_tensors(base, built) if layout == "ldm" else diffusers_tensors(built)
    tensors = {name: tensor.to(dtype) for name, tensor in {**tensors, **(extra or {})}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    return path


def write_folder(path: Path, base: str, seed: int = 0, prediction_type: str = "epsilon", **save: Any) -> Path:
    """Write a diffusers folder; diffusers' ``save_pretrained`` writes each component."""
    pipelines = {"sdxl": "StableDiffusionXLPipeline", "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline"}
    index: dict[str, Any] = {"_class_name": pipelines.get(base, "StableDiffusionPipeline")}
    for role, module in modules(base, seed).items():
        module.save_pretrained(path / role, **save)  # type: ignore[operator]
        index[role] = ["diffusers" if role in ("unet", "vae") else "transformers", type(module).__name__]
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": prediction_type}))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def as_pickles(folder: Path) -> None:
    """Replace a folder's safetensors files by old ``.bin`` files, in which some tensors are not contiguous."""
    for file in list(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        odd = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors.items()}
        stem = "pytorch_model" if file.parent.name.startswith("text") else "diffusion_pytorch_model"
        torch.save(odd, file.parent / f"{stem}.bin")
        file.unlink()
