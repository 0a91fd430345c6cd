"""What a family computes: its modules, its text encoding, one call of its denoiser, its VAE.

The pipeline calls these; it knows no family. A family's ``model.py`` has an instance named ``MODEL``.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from safelight.boundary import pictures
from safelight.boundary.pictures import EncodedPicture
from safelight.families.components import Config
from safelight.families.family import Family, Latents
from safelight.families.tokenizer_file import TokenizerContent
from safelight.request.prompts.words import InversionTokens
from safelight.request.schema import Request

Tensors = Mapping[str, torch.Tensor]
"""Tensors by names that the family gives them."""


class PromptText(NamedTuple):
    """One text of a request. ``field``: the request's field that it comes from, ``prompt`` or ``negative``."""

    field: str
    text: str


class Reference(NamedTuple):
    """A reference image of a request.

    ``digest``: of its content.
    ``picture``: a PIL picture (RGB) in its own size. Text and vision encoders get it in the size of
    ``References.vision_size``.
    """

    digest: str
    picture: Any


@dataclass(frozen=True, slots=True)
class TextInput:
    """What a text encoder is given for one text.

    ``value``: opaque; only the family reads it.
    ``key``: cache key: two inputs have the same key only if they are equal.
    ``forward_passes``: how many forward passes it takes.
    ``tokens``: how many tokens it has; 0 if they are at most as many as the text encoder's settings assume.
    """

    value: Any
    key: str
    forward_passes: int = 1
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextInputs:
    """What a text encoder is given for a job.

    ``padded_together``: all inputs are padded to one length, so each output depends on all inputs.
    ``cut``: the end of each text that is longer than the text encoder takes.
    """

    each: Mapping[PromptText, TextInput]
    padded_together: bool = False
    cut: Mapping[PromptText, str] = field(default_factory=dict[PromptText, str])


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a denoiser. The first axis of all tensors has ``len(latents)`` rows.

    ``latents``: (n, channels, height, width), scaled as the scheduler wants it.
    ``timestep``: the scheduler's, a scalar tensor.
    ``condition``: the prompts' conditioning tensors.
    ``extra``: more input channels: a mask, and latents of pictures.
    ``control``: the sums of what ControlNets add, by the names that :meth:`FamilyModel.control` gives the places.
    ``guidance``: the scale, for denoisers that have it as an input.
    ``references``: the latents of the reference images, each (n, channels, h, w) with its own height and width.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    condition: Tensors
    extra: Sequence[torch.Tensor] = ()
    control: Tensors = field(default_factory=dict[str, torch.Tensor])
    guidance: float = 1.0
    references: Sequence[torch.Tensor] = ()


@dataclass(frozen=True, slots=True)
class ControlCall:
    """How a ControlNet is called besides the denoiser's own inputs.

    ``picture``: what :meth:`FamilyModel.control_input` returned.
    ``weight``: factor of the output.
    ``guess_mode``: diffusers' ``guess_mode``: weaker residuals for the shallow blocks.
    ``union_type``: the type of the picture, one of the ControlNet's ``Config.union_types``; "" if it has none.
    """

    picture: torch.Tensor
    weight: float = 1.0
    guess_mode: bool = False
    union_type: str = ""


def scale_latents(latents: Latents, values: torch.Tensor) -> torch.Tensor:
    """Return what a VAE's encoder returned as latents of the denoiser."""
    if latents.shift_factor:
        return (values - latents.shift_factor) * latents.scaling_factor
    return latents.scaling_factor * values


def change_each(tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """Return changed tensors. Names that share a tensor share the changed one, too."""
    changed = {key: change(one) for key, one in {id(one): one for one in tensors.values()}.items()}
    return {name: changed[id(one)] for name, one in tensors.items()}


class ReferencePrompts(ABC):
    """Prompts that a family's only text encoder reads together with the reference images."""

    @abstractmethod
    def text_inputs(
        self,
        variant: str,
        texts: Sequence[PromptText],
        references: Sequence[Reference],
        tokenizer: TokenizerContent | None,
    ) -> TextInputs:
        """Tokenize texts that follow the reference images. Their keys have the digests of these.

        ``tokenizer``: that of the checkpoint; None for Safelight's.
        Raises RequestError.
        """

    @abstractmethod
    def see(self, module: nn.Module, references: Sequence[Reference], device: torch.device) -> Tensors:
        """Run a bound vision encoder on the reference images."""

    @abstractmethod
    def encode_texts(
        self, module: nn.Module, inputs: Sequence[TextInput], seen: Tensors, device: torch.device
    ) -> list[Tensors]:
        """Run a bound text encoder on each input. Tensors have one row.

        ``seen``: what :meth:`see` returned for the same reference images.
        """


class FamilyModel(ABC):
    """The computing side of a family."""

    own_tokenizer: TokenizerContent | None = None
    """The tokenizer of the checkpoint's text encoder; None for Safelight's. :meth:`with_tokenizer` sets it."""

    reference_prompts: ReferencePrompts | None = None
    """None for a family whose text encoders do not see reference images."""

    @abstractmethod
    def build(self, family: Family, config: Config, attention: str) -> nn.Module:
        """Build a component's module under the current default device, which is meta.

        ``attention``: name of the attention kernel, for libraries that want to know it when a module is built.
        """

    def run_lazy_init(self, module: nn.Module) -> None:
        """Call a module once on meta if its library changes modules at their first call. By default, do nothing."""
        del module

    def make_caches(self, module: nn.Module, at: torch.device) -> None:
        """Compute what a module caches in plain attributes at its first call (frequencies). By default, do nothing.

        ``at``: the device that computes.
        """
        del module, at

    def make_buffer(self, module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor | None:
        """Return the content of a buffer that is not saved, on the CPU; None if the buffer is unknown."""
        if name == "position_ids" and name in module._non_persistent_buffers_set:
            return torch.arange(buffer.shape[-1], device="cpu").expand((1, -1))
        return None

    def save_tokenizer(self, family: Family, role: str, folder: Path) -> tuple[str, str] | None:
        """Save the tokenizer of a text encoder into an exported folder.

        Returns the name of its folder and its class, None if there is none.
        """
        del family, role, folder
        return None

    def with_tokenizer(self, tokenizer: TokenizerContent | None) -> FamilyModel:
        """Return the family with the tokenizer of a text encoder. ``tokenizer``: None for Safelight's."""
        if tokenizer is None:
            return self
        other = copy.copy(self)
        other.own_tokenizer = tokenizer
        return other

    @abstractmethod
    def text_inputs(
        self,
        family: Family,
        role: str,
        request: Request,
        texts: Sequence[PromptText],
        inversion_tokens: InversionTokens,
    ) -> TextInputs:
        """Tokenize texts for a text encoder. Raises RequestError.

        ``inversion_tokens``: token ids by word of a textual inversion.
        """

    @abstractmethod
    def encode_texts(
        self,
        family: Family,
        role: str,
        module: nn.Module,
        request: Request,
        inputs: Sequence[TextInput],
        inversion_tokens: InversionTokens,
        device: torch.device,
    ) -> list[Tensors]:
        """Run a bound text encoder on each input. Tensors have one row."""

    def encode_texts_after(
        self, role: str, module: nn.Module, inputs: Sequence[TextInput], read: Sequence[Tensors], device: torch.device
    ) -> list[Tensors]:
        """Run a bound text encoder that reads what another one returned. Tensors have one row.

        ``read``: what the other text encoder (``Component.reads``) returned for each text.
        """
        raise NotImplementedError(type(self).__name__)

    @abstractmethod
    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        """Join what the text encoders, by role, returned for a text."""

    def flow_levels(self, steps: int) -> Sequence[float] | None:
        """Return the noise levels of a rectified flow, before the shift. By default, None: the scheduler's own."""
        del steps

    def join_conditions(self, rows: Sequence[Tensors]) -> Tensors:
        """Join the conditions of the rows of one denoiser call. By default, concatenate them."""
        if len(rows) == 1:
            return rows[0]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @abstractmethod
    def predict(self, denoiser: nn.Module, call: Call) -> torch.Tensor:
        """Call a bound denoiser. Returns the prediction, shaped like the latents."""

    def control_input(self, latents: Latents, picture: Any, generator: torch.Generator) -> torch.Tensor:
        """Return what a ControlNet reads of its picture, with one row. By default, its pixels, 0 to 1.

        ``picture``: PIL, or an ``EncodedPicture`` for a ControlNet that reads latents.
        ``generator``: the image's; nothing has been drawn from it.
        """
        del generator
        return pictures.control_picture(picture, latents.vae_scale_factor)

    def control(self, net: nn.Module, denoiser: nn.Module, call: Call, how: ControlCall) -> Tensors:
        """Call a bound ControlNet. Returns what is added within the denoiser, by names of the places.

        ``denoiser``: bound too; some ControlNets share modules with it.
        """
        raise NotImplementedError(type(self).__name__)

    def prepare_reference(self, picture: Any, size: tuple[int, int]) -> Any:
        """Return a reference image, a PIL picture, in the size in which the VAE encodes it. By default, resize it."""
        return pictures.resize(picture, size)

    def encode_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int
    ) -> list[EncodedPicture]:
        """Encode a PIL picture; with a mask also the masked picture, as in diffusers' inpainting.

        ``tile``: pixels per side of a tile, 0 for no tiling.
        """
        return pictures.encode_picture(vae, picture, mask, device, latents.vae_scale_factor, tile)

    def encode_reference(
        self, latents: Latents, vae: nn.Module, picture: Any, device: torch.device, tile: int
    ) -> EncodedPicture:
        """Encode a reference image. ``picture``: from :meth:`prepare_reference`. ``tile``: as above."""
        return self.encode_picture(latents, vae, picture, None, device, tile)[0]

    def encode_control_picture(
        self, latents: Latents, vae: nn.Module, picture: Any, device: torch.device, tile: int
    ) -> EncodedPicture:
        """Encode a PIL picture for a ControlNet that reads latents. ``tile``: as in :meth:`encode_picture`."""
        return pictures.encode_control_picture(vae, picture, device, latents.vae_scale_factor, tile)

    def decode(self, latents: Latents, vae: nn.Module, values: torch.Tensor, tile: int) -> torch.Tensor:
        """Decode latents to (n, 3, height, width), about -1 to 1. ``tile``: as in :meth:`encode_picture`."""
        plain = values / latents.scaling_factor
        return pictures.decode(
            vae, plain + latents.shift_factor if latents.shift_factor else plain, latents.vae_scale_factor, tile
        )


@cache
def _model(module: str) -> FamilyModel:
    return importlib.import_module(module).MODEL


def family_model(family: Family) -> FamilyModel:
    """Return the computing side of a family."""
    return _model(family.model_module)


def construct(family: Family, config: Config, attention: str = "torch-sdp") -> nn.Module:
    """Build a component's module on the current default device, with its library's random weights."""
    return family_model(family).build(family, config, attention)
