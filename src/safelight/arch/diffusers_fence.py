"""The one place that imports diffusers and transformers.

Both are pinned exactly; what is relied on here has a contract test in ``tests/arch/test_diffusers_fence.py``:
skeletons built on meta have no real parameter and no persistent buffer; the attention processor that is set is the one
that is called; pipelines take embeddings and give latents without a text encoder or VAE.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch
from torch import nn

from safelight.errors import BindingError
from safelight.formats.keys.adapters import AdapterConfig
from safelight.formats.keys.clip import CLIPConfig
from safelight.formats.keys.unet import UNetConfig
from safelight.formats.keys.vae import VAEConfig
from safelight.formats.layout import BASES, END_TOKEN, LATENT_LEVELS, ComponentConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
"""Nothing is ever fetched to build or read a model. Set before the libraries look."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.models.attention_processor import (
        Attention,
        AttnProcessor,
        AttnProcessor2_0,
        SlicedAttnProcessor,
        XFormersAttnProcessor,
    )
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging as transformers_logging

diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
"""transformers says that torchvision is missing when pipelines are imported; nothing here needs it."""

CHANNELS_PER_HEAD = 64
"""Of SD 2's and SDXL's UNets, and of every CLIP text encoder."""

TIME_IDS_WIDTH = 256
"""Width of each of SDXL's size and crop numbers in its added conditioning."""

SAMPLE_SIZES = {"sd1": 64, "sd2": 96, "sdxl": 128, "sdxl-refiner": 128}
"""Latents a side at which a base was trained, as published settings have it."""

START_TOKEN = 49406


VERSION: str = diffusers.__version__

KERNELS = ("torch-sdp", "flash", "xformers", "sage", "normal", "sliced")
"""Attention kernels by name; those before are preferred where two are as fast."""

_PACKAGES = {"flash": "flash_attn", "xformers": "xformers", "sage": "sageattention"}
"""Kernels that are packages of their own, all for CUDA."""


def build(
    base: str,
    config: ComponentConfig,
    dtype: torch.dtype,
    attention: str,
    at: torch.device,
    slice_size: str = "auto",
) -> nn.Module:
    """A module on meta, in eval mode, in ``dtype``, with its non-persistent buffers made for real on ``at``.

    The attention processors are set by object: ``set_attention_backend`` silently skips Stable Diffusion UNets.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("meta"):
            module = _construct(base, config, attention)
    finally:
        torch.set_default_dtype(previous)
    module = module.to(dtype).eval().requires_grad_(False)
    set_attention(module, attention, slice_size)
    _run_once(module)
    _real_buffers(module, at)
    return module


def set_attention(module: nn.Module, name: str, slice_size: str = "auto") -> None:
    """Give every attention of diffusers in ``module`` a processor of its own. ``slice_size``: heads that are computed
    at once by ``sliced``: a number; ``balanced`` and ``auto`` half of them, ``max`` one, as diffusers has it."""
    for child in module.modules():
        if isinstance(child, Attention):
            child.set_processor(_processor(name, slice_size, child.heads))


def _processor(name: str, slice_size: str, heads: int) -> Any:
    match name:
        case "torch-sdp":
            return AttnProcessor2_0()
        case "normal":
            return AttnProcessor()
        case "sliced":
            at_once = {"auto": heads // 2, "balanced": heads // 2, "max": 1}
            return SlicedAttnProcessor(max(1, at_once[slice_size] if slice_size in at_once else int(slice_size)))
        case "xformers":
            return XFormersAttnProcessor()
        case "flash":
            return FunctionProcessor(_flash(importlib.import_module("flash_attn").flash_attn_func))
        case "sage":
            return FunctionProcessor(importlib.import_module("sageattention").sageattn)
        case _:
            raise ValueError(name)


def _flash(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """flash_attn's function, which has tokens before heads, with the layout of torch's."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attend


class FunctionProcessor:
    """A processor around ``function``: q, k, v (n, heads, tokens, head size) to the same shape as q.

    The rest is as in diffusers' ``AttnProcessor2_0``.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None or attn.spatial_norm is not None:
            raise NotImplementedError(f"attention with a mask or a spatial norm, and {temb is not None=}")
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            keys = attn.norm_encoder_hidden_states(keys)
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys))
        )
        out = self.function(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def missing_kernel(name: str, at: torch.device) -> str | None:
    """Why a kernel cannot be had on a device, None when it can."""
    package = _PACKAGES.get(name)
    if package is None:
        return None
    if at.type != "cuda":
        return f"{package} computes on CUDA only"
    return None if find_spec(package) is not None else f"{package} is not installed: pip install {package}"


def attention_module(heads: int, head_size: int) -> nn.Module:
    """An attention of diffusers, as a UNet has them, with random weights from the global generator."""
    return cast("Any", Attention)(query_dim=heads * head_size, heads=heads, dim_head=head_size)


def _construct(base: str, config: ComponentConfig, attention: str = "torch-sdp") -> nn.Module:
    match config:
        case CLIPConfig():
            return _text_encoder(config, attention)
        case VAEConfig():
            return _vae(base, config)
        case UNetConfig():
            return _unet(base, config)
        case AdapterConfig():
            raise ValueError(config)


def _text_encoder(config: CLIPConfig, attention: str) -> nn.Module:
    settings = cast("Any", CLIPTextConfig)(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        projection_dim=config.projection or config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.width // CHANNELS_PER_HEAD),
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        bos_token_id=START_TOKEN,
        eos_token_id=END_TOKEN,
        pad_token_id=END_TOKEN,
        # transformers has two of these kernels; with 77 tokens there is nothing to slice.
        attn_implementation="eager" if attention in ("normal", "sliced") else "sdpa",
    )
    return CLIPTextModel(settings) if config.projection is None else CLIPTextModelWithProjection(settings)


def _vae(base: str, config: VAEConfig) -> nn.Module:
    levels = len(config.block_out_channels)
    return cast("Any", AutoencoderKL)(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=32,
        scaling_factor=BASES[base].scaling_factor,
    )


def _unet(base: str, config: UNetConfig) -> nn.Module:
    heads = BASES[base].heads
    crossed = [depth > 0 for depth in config.depths]
    added: dict[str, Any] = {}
    if config.time_features is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_IDS_WIDTH,
            "projection_class_embeddings_input_dim": config.time_features,
        }
    return cast("Any", UNet2DConditionModel)(
        # Pipelines compare it; they are always told the size.
        sample_size=SAMPLE_SIZES[base],
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed),
        up_block_types=tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossed)),
        transformer_layers_per_block=(*(depth or 1 for depth in config.depths[:-1]), config.mid_depth),
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=heads or tuple(max(1, width // CHANNELS_PER_HEAD) for width in config.block_out_channels),
        use_linear_projection=config.linear_projection,
        norm_num_groups=32,
        **added,
    )


def settings_of(base: str, config: ComponentConfig) -> dict[str, Any]:
    """What the ``config.json`` of a component's folder says."""
    with torch.device("meta"):
        module = cast("Any", _construct(base, config))
    settings = module.config.to_dict() if isinstance(config, CLIPConfig) else dict(module.config)
    name = {"architectures": [type(module).__name__]} if isinstance(config, CLIPConfig) else {}
    return json.loads(json.dumps({**settings, **name, "_class_name": type(module).__name__}, default=str))


def class_name(base: str, config: ComponentConfig) -> str:
    """The class of a component, as a folder's index names it."""
    with torch.device("meta"):
        return type(_construct(base, config)).__name__


def pipeline_name(base: str) -> str:
    """The class of a base's pipeline."""
    return _pipeline_class(base).__name__


def save_tokenizer(folder: Path, vocabulary: Path, pad: str) -> None:
    """CLIP's tokenizer as transformers keeps it, from a ``tokenizer.json``."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    model = json.loads(vocabulary.read_text())["model"]
    merges: Any = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    made = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77, pad_token=pad)
    made.save_pretrained(folder)
    # Older versions of transformers read these two.
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def _run_once(module: nn.Module) -> None:
    """Let transformers install the hooks that it installs at first use, so that they count as built."""
    if isinstance(module, (CLIPTextModel, CLIPTextModelWithProjection)):
        with torch.device("meta"), torch.no_grad():
            module(torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)


def _real_buffers(module: nn.Module, at: torch.device) -> None:
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is None:
                continue
            if name == "position_ids" and name in child._non_persistent_buffers_set:
                child._buffers[name] = torch.arange(buffer.shape[-1], device="cpu").expand((1, -1)).to(at)
            else:
                raise NotImplementedError(f"{type(module).__name__} has a buffer that is not known: {path}.{name}")


def encode(module: nn.Module, ids: torch.Tensor, skip: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden states, pooled output) of a text encoder for token ``ids``, int64 (1, positions).

    ``skip`` None: the output after the last layer and its norm. An encoder with a projection (SDXL's second) gives the
    hidden states ``skip + 2`` from the end, without a norm, as SDXL was trained; pooled output is None without one.
    """
    encoder = cast("Any", module)
    out = encoder(ids, output_hidden_states=True)
    if isinstance(module, CLIPTextModelWithProjection):
        return out.hidden_states[-((skip or 0) + 2)], out.text_embeds
    if skip is None:
        return out.last_hidden_state, None
    return out.hidden_states[-(skip + 1)], None


def final_norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The norm behind a text encoder's last layer, for CLIP skip."""
    return cast("Any", module).final_layer_norm(hidden)


@dataclass(frozen=True)
class Encoded:
    """``shown`` (1, 3, h, w), -1 to 1, and diffusers' ``distribution`` over its latents."""

    shown: torch.Tensor
    distribution: Any

    @property
    def numbers(self) -> torch.Tensor:
        return self.distribution.parameters


@dataclass(frozen=True)
class Start:
    """What a generation starts from: a picture, perhaps a mask (PIL, of the size that is drawn), and what the VAE made
    of the picture and, with a mask, of the picture where the mask is black."""

    picture: Any
    mask: Any | None
    encoded: Sequence[Encoded]
    strength: float


class _Encoder:
    """Stands for the VAE in a pipeline that only encodes: gives what was encoded before of what it is shown."""

    def __init__(self, base: str, encoded: Sequence[Encoded]) -> None:
        self.config = SimpleNamespace(
            latent_channels=4,
            scaling_factor=BASES[base].scaling_factor,
            block_out_channels=(0,) * LATENT_LEVELS,
            force_upcast=False,
        )
        self._known = encoded

    def encode(self, shown: torch.Tensor) -> SimpleNamespace:
        for known in self._known:
            if torch.equal(known.shown.to(shown.dtype), shown):
                return SimpleNamespace(latent_dist=known.distribution)
        raise BindingError("a pipeline asked for the latents of a picture that was not encoded")


def encode_picture(module: nn.Module, picture: Any, mask: Any | None, device: torch.device) -> list[Encoded]:
    """What a bound VAE makes of a picture, and of it where the mask is black, as the pipelines ask for them."""
    vae = cast("Any", module)
    image = VaeImageProcessor(vae_scale_factor=8).preprocess(picture).to(device)
    pictures = [image]
    if mask is not None:
        masks = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
        pictures.append(image * (masks.preprocess(mask).to(device) < 0.5))
    return [Encoded(shown, vae.encode(shown.to(vae.dtype)).latent_dist) for shown in pictures]


def crop_region(mask: Any, width: int, height: int, padding: int) -> tuple[int, int, int, int]:
    """The part of a mask's image (left, top, right, bottom) in which something is white, with ``padding`` pixels around
    it, grown to the shape of ``width`` by ``height``."""
    return VaeImageProcessor.get_crop_region(mask, width, height, pad=padding)


def denoise(
    base: str,
    unet: nn.Module,
    scheduler: Any,
    device: torch.device,
    conditioning: Mapping[str, torch.Tensor],
    on_step: Callable[[int, torch.Tensor], None],
    start: Start | None = None,
    **call: Any,
) -> torch.Tensor:
    """Latents from the base's own diffusers pipeline, made for this call around a bound UNet.

    ``conditioning``: the embeddings by the pipeline's argument names. ``on_step`` is told of each step's number (from
    0) and latents, and may raise to stop. ``start``: what it starts from, None for ``latents`` among ``call``, which
    are further arguments of the pipeline.
    """

    def callback(_: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        on_step(step, values["latents"])
        return {}

    parts: dict[str, Any] = dict(_empty_parts(base))
    if start is not None:
        parts["vae"] = _Encoder(base, start.encoded)
        call |= {"image": start.picture, "strength": start.strength}
    if start is not None and start.mask is not None:
        call["mask_image"] = start.mask
    task = "text" if start is None else "image" if start.mask is None else "mask"
    pipeline = _pipeline_class(base, task)(**parts, unet=unet, scheduler=scheduler, **_no_extras(base))
    pipeline.told_device = device
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        **conditioning,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents"],
        **call,
    )
    return result.images


def _empty_parts(base: str) -> dict[str, None]:
    parts = ["vae", "text_encoder", "tokenizer"]
    return dict.fromkeys([*parts, "text_encoder_2", "tokenizer_2"] if base == "sdxl" else parts)


def _no_extras(base: str) -> dict[str, Any]:
    if base == "sdxl":
        return {"add_watermarker": False}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


_PIPELINES = {"text": "", "image": "Img2Img", "mask": "Inpaint"}


def _pipeline_class(base: str, task: str = "text") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pipelines import most of diffusers: a second that only a generation should pay.
        family = "stable_diffusion_xl" if base == "sdxl" else "stable_diffusion"
        kind = _PIPELINES[task]
        module = f"pipeline_{family}_{kind.lower()}" if kind else f"pipeline_{family}"
        found = importlib.import_module(f"diffusers.pipelines.{family}.{module}")
        Pipeline = getattr(found, f"StableDiffusion{'XL' if base == 'sdxl' else ''}{kind}Pipeline")  # noqa: N806

    class Told(Pipeline):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        """A pipeline whose device is told; diffusers infers it from wherever the first parameter happens to be."""

        told_device: torch.device

        @property
        def _execution_device(self) -> torch.device:
            return self.told_device

    Told.__name__ = Pipeline.__name__
    return Told


def sigma(scheduler: Any) -> float:
    """The noise level of the latents after the last step, in the sampler's own scale; 1 where it keeps the variance."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    return 1.0 if sigmas is None or index is None else float(sigmas[min(index, len(sigmas) - 1)])


def decode(module: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, 4, h, w) to what the VAE gives for them: about -1 to 1, (n, 3, 8h, 8w)."""
    vae = cast("Any", module)
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def to_pixels(raw: torch.Tensor) -> torch.Tensor:
    """A VAE's output to images, uint8 (n, h, w, 3), rounded as diffusers' image processor rounds."""
    values = cast("torch.Tensor", VaeImageProcessor.denormalize(raw))
    values = values.cpu().permute(0, 2, 3, 1).float()
    return (values * 255).round().to(torch.uint8)


def scheduler(name: str, settings: Mapping[str, Any], seed: int) -> Any:
    """A fresh scheduler of diffusers' class ``name``; settings that the class does not have are left out.

    ``dpmpp_sde`` ignores the generator it is given: its noise tree is seeded with ``seed`` instead.
    """
    from diffusers import schedulers

    kind = getattr(schedulers, name)
    known = inspect.signature(kind.__init__).parameters
    chosen = {key: value for key, value in settings.items() if key in known}
    if "noise_sampler_seed" in known:
        chosen["noise_sampler_seed"] = seed
    return kind(**chosen)
