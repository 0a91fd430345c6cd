"""All families that have tiny checkpoints in folders: a row for each. The tests of all families read this table.

A new family needs a module in this folder and a row. The module has

- ``configs() -> dict[str, Config]``: the settings of the tiny components, by role, with all layers that files have;
- ``write_folder(path, seed, ...) -> Path``: writes a diffusers folder with the libraries' ``save_pretrained``.
"""

from __future__ import annotations

import base64
import importlib
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from support import naming

from safelight.catalog.catalog import Catalog
from safelight.families import registry
from safelight.families.anima.text_conditioner import AnimaConditionerConfig
from safelight.families.anima.text_encoder import Qwen3SmallConfig
from safelight.families.anima.transformer import AnimaConfig
from safelight.families.chroma.transformer import ChromaConfig
from safelight.families.components import Component, Config
from safelight.families.ernie_image.transformer import ErnieImageConfig
from safelight.families.family import Family
from safelight.families.flux.transformer import FluxConfig
from safelight.families.flux2.transformer import Flux2Config
from safelight.families.krea2.transformer import Krea2Config
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.flux2_vae import FLUX2_VAE
from safelight.families.parts.flux_latents import FLUX_VAE
from safelight.families.parts.ministral3 import Ministral3Config
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.parts.qwen3_vl import Qwen3VLConfig
from safelight.families.parts.qwen25 import Qwen25Config
from safelight.families.parts.qwen25_vision import Qwen25VisionConfig
from safelight.families.parts.qwen_vae import QWEN_VAE
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.vae import VAEConfig
from safelight.families.qwen_image.transformer import QwenImageConfig
from safelight.families.sd.unet import UNetConfig
from safelight.families.zimage.transformer import ZImageConfig
from safelight.pipeline.conditioning import EmbeddingCache
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine

LDM = 1
"""Index of the names of the original among a tensor's names; 0 is the module's own name."""

OPEN_CLIP = 9
"""Index of OpenCLIP's names, which are the last of each tensor."""


@dataclass(frozen=True)
class Published:
    """The settings of a published checkpoint.

    ``components``: by role, with all layers that files have.
    ``original``: components whose original has other settings, or other names than those of the index ``LDM``.
    ``beside``: names of tensors that files have and the table lacks, by role.
    """

    name: str
    components: Mapping[str, Config]
    original: Mapping[str, tuple[Config, int]] = field(default_factory=dict[str, tuple[Config, int]])
    beside: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])

    @property
    def family(self) -> Family:
        return registry.family(self.name)

    def in_module_names(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors of each component, without bytes, under the names of its module. By role.

        Components within others are among these, under the names that files have.
        """
        whole: dict[str, dict[str, torch.Tensor]] = {}
        for role, config in self.components.items():
            within, state = self.family.component(role).within, naming.on_meta(config)
            named = naming.in_files(config, state, LDM) if within else state
            whole[within or role] = whole.get(within or role, {}) | named | self._beside(role)
        return whole

    def denoiser_file(self, original: bool) -> dict[str, torch.Tensor]:
        """Return the tensors of the denoiser's file, without bytes. ``original``: in the original's names."""
        if original:
            return self.in_original_names()[self.family.denoiser]
        named = self.in_module_names()
        inner = {role: self.family.prefix_within_denoiser(role) for role in named}
        beside = [naming.prefixed(prefix, named[role]) for role, prefix in inner.items() if prefix]
        return named[self.family.denoiser] | {name: one for some in beside for name, one in some.items()}

    def _beside(self, role: str) -> dict[str, torch.Tensor]:
        return {name: torch.empty(8, device="meta") for name in self.beside.get(role, ())}

    def in_original_names(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors of each component, without bytes, under the names of the original. By role."""
        whole: dict[str, dict[str, torch.Tensor]] = {}
        for role, own in self.components.items():
            config, which = self.original.get(role, (own, LDM))
            inner = self.family.prefix_within_denoiser(role)
            place = self.family.denoiser if inner else self.family.component(role).folder
            named = naming.prefixed(inner, naming.in_files(config, naming.on_meta(config), which) | self._beside(role))
            whole[place] = whole.get(place, {}) | named
        return whole


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny checkpoints.

    ``name``: of the family.
    ``module``: name of the tests' module that writes them.
    ``needs``: modules without which the installed libraries cannot compute it.
    ``variant``: of the folder that ``folder`` writes.
    ``settings``: of ``write_folder``, for that variant.
    ``config_settings``: of ``configs``, for that variant.
    ``label``: its name in tests; "" for the family's name. A family may have several rows.
    ``references``: how many reference images its requests have.
    ``request``: fields of a request that make the whole checkpoint count.
    ``without_effect``: patterns of tensors that change no pixel, each with the reason.
    ``input_layers``: pattern of matrices whose columns no other tensor of the denoiser has: only another component, or
    the variant, can contradict them.
    ``optional_layers``: pattern of tensors that a denoiser may lack: then another component does not fit.
    ``free_rows``: pattern of tensors that may have any number of rows.
    ``lone_text_encoder``: whether a text encoder in a file of its own is recognised without its tokenizer.
    ``leftovers``: buffers and cached tensors of its modules that are no weights, by role.
    ``cached_functions``: functions with an ``lru_cache`` that its modules call.
    ``picture_side``: pixels per side of its pictures in tests.
    """

    name: str
    module: str
    needs: tuple[str, ...]
    variant: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    config_settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    label: str = ""
    references: int = 0
    request: Mapping[str, Any] = field(default_factory=dict[str, Any])
    without_effect: Mapping[str, str] = field(default_factory=dict[str, str])
    input_layers: str = r"$"
    optional_layers: str = r"$"
    free_rows: str = r"$"
    lone_text_encoder: bool = True
    leftovers: Mapping[str, set[str]] = field(default_factory=dict[str, set[str]])
    cached_functions: tuple[str, ...] = ()
    picture_side: int = 64

    @property
    def family(self) -> Family:
        return registry.family(self.name)

    @property
    def roles(self) -> tuple[str, ...]:
        return self.family.roles_of(self.variant)

    def place_in_files(self, role: str) -> str:
        """The component in whose file a component is: the denoiser, the one that it is within, or itself."""
        return self.family.denoiser if self.family.prefix_within_denoiser(role) else self.family.component(role).folder

    def configs(self) -> dict[str, Config]:
        return importlib.import_module(self.module).configs(**self.config_settings)

    def write_folder(self, path: Path, seed: int) -> Path:
        """Write a diffusers folder, as published."""
        return importlib.import_module(self.module).write_folder(path, seed, **self.settings)

    def add_folder(self, root: Path, path: Path, seed: int) -> str:
        """Write a diffusers folder and add it to the library below ``root``. Returns its name there."""
        Catalog.under(root).library.add(self.write_folder(path, seed), self.name, variant=self.variant)
        return self.name

    def ask(self, model: str, **changes: Any) -> Request:
        """Return a small request for a checkpoint of this family."""
        size = {"width": self.picture_side, "height": self.picture_side}
        values: dict[str, Any] = {"prompt": "a red apple", "seed": 3, "steps": 2, **size, **self.request, **changes}
        if self.references:
            values = {"references": tuple(map(data_picture, range(self.references))), **values}
        return Request(model=model, **values)

    def make_references_small(self, patch: pytest.MonkeyPatch) -> None:
        """Let the family see reference images in small sizes, if it enlarges them."""
        make_small = getattr(importlib.import_module(self.module), "make_references_small", None)
        if make_small is not None:
            make_small(patch)

    def write_files(self, path: Path, seed: int) -> dict[str, Path]:
        """Write files as ComfyUI has them: the denoiser, each text encoder and the VAE in a file each. By role.

        A component that the original keeps with the denoiser is in its file.
        """
        folder = self.write_folder(path / f"{self.name}-folder", seed)
        tensors = read_components(folder)
        named: dict[str, dict[str, torch.Tensor]] = {}
        for role, config in self.configs().items():
            place, home = self.place_in_files(role), self.family.component(role).folder
            if place == home:
                named[place] = naming.in_files(config, named.get(place, tensors[place]), LDM)
                continue
            inside = naming.prefixed(
                self.family.prefix_within_denoiser(role), naming.in_files(config, tensors[home], LDM)
            )
            tensors[place] |= inside
        written: dict[str, Path] = {}
        for role, some in named.items():
            written[role] = path / self._place(role)
            written[role].parent.mkdir(parents=True, exist_ok=True)
            prefix = self.family.component(role).prefixes[0] if role == self.family.denoiser else ""
            save_file(naming.prefixed(prefix, some), written[role])
            copy_tokenizer(self.family.component(role), folder, written[role].parent)
        return written

    def _place(self, role: str) -> str:
        if role == self.family.denoiser:
            return f"diffusion_models/{self.name}.safetensors"
        folder = "vae" if role == self.family.vae else "text_encoders"
        return f"{folder}/{self.name}-{role}.safetensors"


@cache
def data_picture(number: int) -> str:
    """Return a picture as a request names it that brings it. ``number``: another picture for each."""
    colours = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(number))
    file = io.BytesIO()
    PILImage.fromarray((colours * 255).byte().numpy()).resize((80, 64)).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def copy_tokenizer(component: Component, folder: Path, place: Path) -> None:
    """Copy the tokenizer of a text encoder from a diffusers folder, if Safelight has none for it."""
    if component.tokenizer is not None and component.tokenizer.shipped is None:
        shutil.copy(folder / component.tokenizer.place, place / Path(component.tokenizer.place).name)


def drawn(engine: LocalEngine, request: Request) -> str:
    """Return the SHA-256 of an image's pixels. The text encoders compute, too: no output of theirs is in a cache."""
    engine.resources = replace(engine.resources, embedding_cache=EmbeddingCache())
    return next(engine.generate(request)).pixels_sha256


def read_components(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each component of a diffusers folder, by role."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        found.setdefault(file.parent.name, {}).update(load_file(file))
    return found


_CLIP_L = CLIPConfig(768, 3072, 12, 49408, 77, None, "quick_gelu")
_CLIP_H = CLIPConfig(1024, 4096, 23, 49408, 77, None, "gelu")
_CLIP_G = CLIPConfig(1280, 5120, 32, 49408, 77, 1280, "gelu")
_SD_VAE = VAEConfig(3, 3, 4, (128, 256, 512, 512), 2)
_T5 = T5Config(32128, 4096, 10240, 24, 64, 64)
_QWEN3_4B = Qwen3Config(151936, 2560, 9728, 36, 32, 8, 128)
_ROTARY_VL = Qwen3VLConfig(151936, 2560, 9728, 36, 32, 8, 128)
_QWEN3_8B = Qwen3Config(151936, 4096, 12288, 36, 32, 8, 128)


def _flux(guidance: bool) -> Published:
    net = FluxConfig(64, 16, 3072, 19, 38, 128, 4096, 768, guidance)
    return Published("flux", {"text_encoder": _CLIP_L, "text_encoder_2": _T5, "transformer": net, "vae": FLUX_VAE})


PUBLISHED: Mapping[str, Published] = {
    "SD 1.5": Published(
        "sd1",
        {
            "text_encoder": _CLIP_L,
            "unet": UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 768, False),
            "vae": _SD_VAE,
        },
    ),
    "SD 2.1": Published(
        "sd2",
        {
            "text_encoder": _CLIP_H,
            "unet": UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 1024, True),
            "vae": _SD_VAE,
        },
        {"text_encoder": (replace(_CLIP_H, layers=24), OPEN_CLIP)},
    ),
    "SDXL": Published(
        "sdxl",
        {
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
            "unet": UNetConfig(4, 4, (320, 640, 1280), 2, (0, 2, 10), 10, 2048, True, 2816),
            "vae": _SD_VAE,
        },
        {"text_encoder_2": (_CLIP_G, OPEN_CLIP)},
    ),
    "SDXL's refiner": Published(
        "sdxl-refiner",
        {
            "text_encoder_2": _CLIP_G,
            "unet": UNetConfig(4, 4, (384, 768, 1536, 1536), 2, (0, 4, 4, 0), 4, 1280, True, 2560),
            "vae": _SD_VAE,
        },
        {"text_encoder_2": (_CLIP_G, OPEN_CLIP)},
    ),
    "FLUX.1 dev": _flux(guidance=True),
    "FLUX.1 schnell": _flux(guidance=False),
    "Z-Image": Published(
        "z-image",
        {"text_encoder": _QWEN3_4B, "transformer": ZImageConfig(16, 3840, 30, 2, 128, 2560), "vae": FLUX_VAE},
    ),
    "Chroma": Published(
        "chroma",
        {
            "text_encoder": _T5,
            "transformer": ChromaConfig(64, 16, 3072, 19, 38, 128, 4096, 64, 5120, 5),
            "vae": FLUX_VAE,
        },
    ),
    "ERNIE-Image": Published(
        "ernie-image",
        {
            "text_encoder": Ministral3Config(131072, 3072, 9216, 26, 32, 8),
            "transformer": ErnieImageConfig(128, 4096, 12288, 36, 128, 3072),
            "vae": FLUX2_VAE,
        },
        beside={"text_encoder": ("vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight")},
    ),
    "FLUX.2 klein 4B": Published(
        "flux2-klein",
        {"text_encoder": _QWEN3_4B, "transformer": Flux2Config(128, 3072, 5, 20, 128, 7680), "vae": FLUX2_VAE},
    ),
    "FLUX.2 klein 9B": Published(
        "flux2-klein",
        {"text_encoder": _QWEN3_8B, "transformer": Flux2Config(128, 4096, 8, 24, 128, 12288), "vae": FLUX2_VAE},
    ),
    "Qwen-Image": Published(
        "qwen-image",
        {
            "text_encoder": Qwen25Config(152064, 3584, 18944, 28, 28, 4),
            "transformer": QwenImageConfig(64, 16, 3072, 60, 128, 3584),
            "vae": QWEN_VAE,
        },
    ),
    "Qwen-Image-Edit": Published(
        "qwen-image",
        {
            "vision_encoder": Qwen25VisionConfig(1280, 3420, 32, 3584),
            "text_encoder": Qwen25Config(152064, 3584, 18944, 28, 28, 4),
            "transformer": QwenImageConfig(64, 16, 3072, 60, 128, 3584),
            "vae": QWEN_VAE,
        },
    ),
    "Anima": Published(
        "anima",
        {
            "text_encoder": Qwen3SmallConfig(151936, 1024, 3072, 28, 16, 8, 128),
            "text_conditioner": AnimaConditionerConfig(32128, 1024, 1024, 1024, 4096, 6, 64),
            "transformer": AnimaConfig(16, 2048, 28, 8192, 128, 1024, 256),
            "vae": QWEN_VAE,
        },
    ),
    "Krea 2": Published(
        "krea-2",
        {
            "text_encoder": _ROTARY_VL,
            "transformer": Krea2Config(16, 6144, 28, 128, 12, 16384, 256, 2560, 12, 128, 20, 6912, 2, 2),
            "vae": QWEN_VAE,
        },
    ),
}
"""Published checkpoints, by name. Their tensors have these names and shapes."""

_VAE_BIASES = {
    r"vae\..*\.(conv|conv1|conv2|to_k|to_v|to_out\.0)\.bias": (
        "a constant for each channel, in front of a norm of each channel"
    )
}
"""The tiny VAEs have as many channels as norms have groups."""

_LAST_TEXT = {
    r"transformer\.transformer_blocks\.1\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)\..*": (
        "what the last block makes of the text is not read: only its keys and values are"
    )
}

_ROTARY = {"text_encoder": {"rotary_emb.inv_freq", "rotary_emb.original_inv_freq"}}

_ROWS = (
    TinyFamily(
        "z-image",
        "support.zimage",
        ("diffusers.models.transformers.transformer_z_image",),
        "turbo",
        request={"cfg": 2.5, "negative": "green"},
        without_effect=_VAE_BIASES,
        leftovers={**_ROTARY, "transformer": {".rope_embedder"}},
    ),
    TinyFamily(
        "flux",
        "support.flux",
        ("diffusers.models.attention_dispatch",),
        "dev",
        input_layers=r"(x|context)_embedder\.|(img|txt)_in\.|vector_in\.in_layer\.|time_text_embed\.text_embedder\.",
        without_effect=_VAE_BIASES,
        leftovers={"text_encoder": {"embeddings.position_ids"}},
    ),
    TinyFamily(
        "chroma",
        "support.chroma",
        ("diffusers.models.transformers.transformer_chroma",),
        "hd",
        request={"cfg": 2.5, "negative": "green"},
        without_effect=_VAE_BIASES,
        leftovers={"transformer": {"time_text_embed.mod_proj"}},
    ),
    TinyFamily(
        "ernie-image",
        "support.ernie_image",
        ("diffusers.models.transformers.transformer_ernie_image", "transformers.models.ministral3"),
        "base",
        request={"cfg": 2.5, "negative": "green"},
        without_effect=_VAE_BIASES,
        optional_layers=r"text_proj\.",
        free_rows=r"embed_tokens\.",
        lone_text_encoder=False,
        leftovers=_ROTARY,
    ),
    TinyFamily(
        "flux2-klein",
        "support.flux2",
        ("diffusers.models.transformers.transformer_flux2",),
        "base",
        {"distilled": False},
        request={"cfg": 2.5, "negative": "green"},
        input_layers=r"context_embedder\.|txt_in\.",
        without_effect={
            **_VAE_BIASES,
            r"text_encoder\.layers\.27\..*": "the transformer reads 27 layers; other families read more of Qwen3",
        },
        leftovers=_ROTARY,
    ),
    TinyFamily(
        "qwen-image",
        "support.qwen_image",
        ("diffusers.models.transformers.transformer_qwenimage", "transformers.models.qwen2_5_vl"),
        "text-to-image",
        request={"cfg": 2.5, "negative": "green"},
        without_effect=_LAST_TEXT,
        leftovers={**_ROTARY, "transformer": {"pos_embed.pos_freqs", "pos_embed.neg_freqs"}},
        cached_functions=("safelight.families.qwen_image.model:_without_cache",),
    ),
    TinyFamily(
        "qwen-image",
        "support.qwen_image",
        ("diffusers.models.transformers.transformer_qwenimage", "transformers.models.qwen2_5_vl"),
        "edit-2511",
        {"variant": "edit-2511"},
        {"variant": "edit-2511"},
        label="qwen-image-edit",
        references=2,
        request={"cfg": 2.5, "negative": "green"},
        without_effect=_LAST_TEXT,
        leftovers={
            "text_encoder": _ROTARY["text_encoder"],
            "vision_encoder": {"rotary_pos_emb.inv_freq", "rotary_pos_emb.original_inv_freq"},
            "transformer": {"pos_embed.pos_freqs", "pos_embed.neg_freqs"},
        },
        cached_functions=("safelight.families.qwen_image.model:_without_cache",),
    ),
    TinyFamily(
        "krea-2",
        "support.krea2",
        ("diffusers.models.transformers.transformer_krea2", "transformers.models.qwen3_vl"),
        "raw",
        {"distilled": False},
        request={"cfg": 2.5, "negative": "green"},
        leftovers=_ROTARY,
    ),
    TinyFamily(
        "anima",
        "support.anima",
        (
            "diffusers.models.condition_embedders",
            "diffusers.models.condition_embedders.condition_embedder_anima",
            "diffusers.modular_pipelines",
            "diffusers.modular_pipelines.anima",
        ),
        "text-to-image",
        request={"cfg": 2.5, "negative": "green"},
        leftovers={**_ROTARY, "text_conditioner": {"rotary_emb.inv_freq"}},
    ),
)


@cache
def tiny_families() -> dict[str, TinyFamily]:
    """Return the rows of the families that the installed libraries can compute, by label."""
    return {row.label or row.name: row for row in _ROWS if all(find_spec(name) for name in row.needs)}
