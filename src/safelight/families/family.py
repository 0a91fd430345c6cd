"""What the rest of the program may ask about a family of models.

A family is data: its components with their tables of tensors, its latents, its noise, its features, and how its files
are recognised. :mod:`safelight.families.registry` finds all families. What computes is in the module that
:attr:`Family.model_module` names, and is imported only where something is computed. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.features import Feature
from safelight.families.references import References
from safelight.families.rules import KindRule
from safelight.files.folder import Folder
from safelight.files.header import Header
from safelight.request.adapters import CONTROL_MODES, ControlMode, Purpose
from safelight.request.assumed import USUAL_CFG, USUAL_STEPS
from safelight.request.samplers import NoiseKind

PredictionType = Literal["epsilon", "v_prediction", "flow"]
"""What a denoiser predicts: the noise, its velocity (Salimans and Ho 2022), or the velocity of a rectified flow."""

GuidanceKind = Literal[
    "classifier_free",
    "classifier_free_from_prompt",
    "classifier_free_same_norm",
    "image_and_text",
    "distilled",
    "none",
]
"""How a denoiser is made to follow the prompt.

``classifier_free``: by two predictions, with the prompt and with the negative prompt.
``classifier_free_from_prompt``: the same, with the rounding of diffusers' ``ZImagePipeline``.
``classifier_free_same_norm``: by two, and each token keeps the norm of the prediction with the prompt.
``image_and_text``: by three, of which one lacks the prompt, and one lacks the prompt and the input image.
``distilled``: the scale is an input of the denoiser.
``none``: there is no guidance.
"""

_LEFT_OUT: Mapping[GuidanceKind, frozenset[Feature]] = {
    "distilled": frozenset({Feature.NEGATIVE_PROMPT}),
    "none": frozenset({Feature.NEGATIVE_PROMPT, Feature.GUIDANCE}),
}
"""Features that a kind of guidance leaves out."""

ExtraInputChannels = Literal["", "mask", "pixel_mask", "image"]
"""What a denoiser has as input channels besides the latents.

``mask``: a mask with one value for each latent, and masked-image latents, as in diffusers' inpainting.
``pixel_mask``: the same, but the mask has a channel for each pixel of a latent, as in diffusers' ``FluxFillPipeline``.
``image``: the latents of the input image, not multiplied by ``scaling_factor``. Denoising then starts from noise alone.
"""

MASK_CHANNELS: frozenset[ExtraInputChannels] = frozenset({"mask", "pixel_mask"})
"""The values with a mask: these checkpoints are for inpainting."""

SUSPICIOUS_ABOVE_IF_NORMALISED = 50.0
"""``Latents.suspicious_above`` where a picture's latents have deviation 1: four times that, and twelve deviations."""

CONTROLNET = "controlnet"
"""The role of ControlNets. A job may have several."""


@dataclass(frozen=True, slots=True)
class Latents:
    """The format of latents.

    ``vae_scale_factor``: pixels per latent in each direction.
    ``multiple``: an image's width and height must be divisible by this.
    ``patch``: the channels are those of this many latents of the VAE in each direction, ordered as torch's
    ``pixel_unshuffle`` orders them.
    ``scaling_factor``, ``shift_factor``: latents = (the VAE encoder's output - shift_factor) * scaling_factor.
    ``cast_first``: encoded pictures are cast to the denoiser's dtype before they are scaled, not afterwards.
    ``latent_rgb_factors``: linear latent-to-RGB map for previews: one (r, g, b) row of factors per channel of the VAE,
    then a row with the bias.
    ``suspicious_above``: latents without noise are marked as suspicious if an absolute value exceeds this.
    ``fp32``: they stay in fp32 between the steps, whatever the denoiser's dtype is.
    """

    channels: int
    vae_scale_factor: int
    multiple: int
    scaling_factor: float
    shift_factor: float = 0.0
    cast_first: bool = False
    latent_rgb_factors: tuple[tuple[float, float, float], ...] = ()
    suspicious_above: float = 150.0
    """Stable Diffusion's stay below 30, and below 80 at extreme guidance. Families with other VAEs have their own."""
    fp32: bool = False
    patch: int = 1

    @property
    def token_patch(self) -> int:
        """Latents per token of the denoiser in each direction: one token has ``multiple`` pixels."""
        return self.multiple // self.vae_scale_factor


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise that a family was trained with.

    ``kind``: ``discrete`` (DDPM's steps, Ho et al. 2020) or ``flow`` (rectified flow, Liu et al. 2022).
    ``settings``: arguments of diffusers' scheduler classes. A flow's ``shift`` is a constant shift of its noise levels.
    ``mu``: for a flow whose shift depends on the image's size: from the number of the image's tokens (one for
    ``Latents.multiple`` pixels in each direction) and the number of steps.
    ``spacing``: how the noise levels of a flow are spread over the steps before the shift, if the sampler takes levels
    and the request asks for the default schedule. ``beta``: diffusers' ``use_beta_sigmas``.
    """

    kind: NoiseKind
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    mu: Callable[[int, int], float] | None = None
    spacing: Literal["uniform", "beta"] = "uniform"

    def with_shift(self, shift: float | None) -> Noise:
        """Return a flow with this constant shift. None: with its own.

        If the shift depends on the image's size, ``mu`` becomes log(shift) for every size, and the levels are no longer
        stretched to ``shift_terminal``. Published schedulers for distilled adapters do so, for example that of
        Qwen-Image-Lightning with a shift of 3.
        """
        if shift is None:
            return self
        if self.mu is None:
            return replace(self, settings={**self.settings, "shift": shift})
        settings = {name: value for name, value in self.settings.items() if name != "shift_terminal"}
        mu = math.log(shift)

        def constant(tokens: int, steps: int) -> float:
            del tokens, steps
            return mu

        return replace(self, settings=settings, mu=constant)


@dataclass(frozen=True, slots=True)
class Training:
    """What a checkpoint was trained to predict, and the reason for knowing it."""

    prediction_type: PredictionType
    zero_terminal_snr: bool
    why: str


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request that names no steps and no guidance scale gets.

    ``guidance``: the scale of distilled guidance; None for variants without it.
    """

    steps: int = USUAL_STEPS
    cfg: float = USUAL_CFG
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """How the checkpoints of a variant are used.

    ``guidance``, ``noise``: None for those of the family.
    ``references``: None for checkpoints that take no reference images.
    ``draws_latents``: a picture's latents are drawn from the VAE's distribution. If False, they are the most likely.
    ``index``: what an exported folder's ``model_index.json`` says of this variant alone.
    ``settings``: settings of components that shapes do not tell, by role and name.
    ``export_problem``: says why its checkpoints cannot be exported; "" if they can.
    """

    extra_input_channels: ExtraInputChannels = ""
    guidance: GuidanceKind | None = None
    noise: Noise | None = None
    defaults: Defaults | None = None
    references: References | None = None
    draws_latents: bool = True
    index: Mapping[str, object] = field(default_factory=dict[str, object])
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict[str, Mapping[str, object]])
    export_problem: str = ""


VARIANTS: Mapping[str, Variant] = {"text-to-image": Variant(), "inpainting": Variant("mask")}
"""The variants that most families have."""


@dataclass(frozen=True, slots=True)
class AdapterSigns:
    """By what an adapter for this family is recognised, from the most to the least certain.

    ``cross_attention_dim``: width of the embeddings that the denoiser's cross-attention reads.
    ``names``: a pattern of names that only this family has.
    ``shapes``: whether the shapes are this family's. Families with the same blocks have the same answer; then the
    metadata decides, and without it the adapter may be used with each of them.
    ``declared``: values of ``ss_base_model_version`` and ``modelspec.architecture``, in lower case.
    """

    cross_attention_dim: int = 0
    names: re.Pattern[str] | None = None
    shapes: Callable[[Header], bool] | None = None
    declared: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of diffusion models.

    ``name``: in records, requests and messages.
    ``components``: in the order of use.
    ``architectures``: the classes of all settings that records of this family may have.
    ``resolution``: pixels per side of its training images.
    ``guidance``: how its denoisers are made to follow the prompt.
    ``features``: what it can do. A request for another feature is refused by name.
    ``model_module``: name of the module that computes; its ``MODEL`` is a ``FamilyModel`` (``family_model.py``).
    ``rules``: recognise its single files; they are tried in the order of the families.
    ``adapter_rules``: recognise adapters that only this family has; tried before those of all families.
    ``recognise_folder``: returns the reason if a diffusers folder is of this family, else None.
    ``folder_settings``: expected values in each component's ``config.json``, as (role, key, value). The roles ``""``
    and ``scheduler`` stand for the settings of the pipeline and of the scheduler. A key may be absent; another value is
    an error. A dot in a key separates nested keys.
    ``detect_training``: says what a single file was trained to predict. Raises UnsupportedModelError.
    ``detect_folder_training``: the same from a folder's scheduler settings; None for a family without folders.
    ``detect_variant``: names a checkpoint's variant from its configurations; None for an unknown one.
    ``detect_folder_variant``: names the variant from a folder's settings; None if they do not decide it.
    ``variants``: how the checkpoints of each variant are used. Checkpoints of other variants are refused.
    ``separate_parts``: whether a file may lack text encoders and VAE. Other files then give them.
    ``declared_variants``: the variants of single files by the value of ``modelspec.architecture`` in their metadata, in
    lower case.
    ``asks_variant``: whether the configurations of a checkpoint do not decide its variant. The settings of a folder may
    (``detect_folder_variant``); otherwise the user must say it.
    ``find_mismatch``: says why components do not fit together, None if they do. With ``separate_parts``, some may be
    absent.
    ``left_over``: says why a checkpoint may have a tensor that no module needs; None if it may not.
    ``keep``: left-over tensors that a conversion keeps, because the number of layers is inferred from them.
    ``native_size``: pixels per side for checkpoints of a prediction type; None for ``resolution``.
    ``block_names_by_count``: the names of the blocks in a LoRA's list of block weights, by the list's length.
    ``rows_together``: a call of the denoiser computes all rows of the guidance. If False, a row has its own call.
    ``latent_space``: a name; families with the same one have the same latents.
    ``same_latents``: whether two VAEs of families with the same ``latent_space`` have latents of the same form.
    ``control_modes``: the modes in which its ControlNets can be used.
    ``control_reads_prompt_only``: its ControlNets compute with the prompt, and the prediction for the negative prompt
    gets the same from them.
    ``find_controlnet_mismatch``: says why a ControlNet does not fit a denoiser, with ``{model}`` for the model's name;
    None if it does.
    ``embedding_names``: maps tensor names of a multi-encoder inversion (``clip_l``, ``clip_g``) to text-encoder roles.
    ``clip_skip_in_a1111``: whether A1111's option for CLIP skip changes anything.
    ``single_file_components``: components that also exist as files of their own: VAEs, ControlNets.
    ``part_rules``: rules for files that contain one component of this family; tried after the checkpoint rules of all
    families.
    ``pipeline_class``: class of diffusers' pipeline in an exported folder.
    ``export_problem``: says why its models cannot be exported; "" if they can.
    ``gguf_architecture``: the name by which ComfyUI-GGUF knows it (``IMG_ARCH_LIST`` in its ``loader.py``); "" if it
    does not.
    ``pipeline_settings``: settings of a variant's pipeline in an exported ``model_index.json``.
    ``empty_pipeline_components``: optional pipeline components (``safety_checker``, …) that ``model_index.json`` lists
    as ``[null, null]``.
    ``published``: the published sizes by their names, each with the settings that differ from ``Component.standard``,
    by role. By default there is one size with the family's name.
    """

    name: str
    components: tuple[Component, ...]
    architectures: tuple[type[Config], ...]
    latents: Latents
    noise: Noise
    resolution: int
    guidance: GuidanceKind
    features: frozenset[Feature]
    model_module: str
    rules: tuple[KindRule, ...]
    detect_training: Callable[[Header], Training]
    detect_variant: Callable[[Mapping[str, Config]], str | None]
    adapter_rules: tuple[KindRule, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    recognise_folder: Callable[[Folder], str | None] = lambda _: None
    detect_folder_variant: Callable[[Folder], str | None] | None = None
    detect_folder_training: Callable[[Folder], Training] | None = None
    separate_parts: bool = False
    declared_variants: Mapping[str, str] = field(default_factory=dict[str, str])
    asks_variant: Callable[[Mapping[str, Config]], bool] = lambda _: False
    find_mismatch: Callable[[Mapping[str, Config]], str | None] = lambda _: None
    folder_settings: Callable[[Mapping[str, Config]], Iterable[tuple[str, str, object]]] = lambda _: ()
    left_over: Callable[[str], str | None] = lambda _: None
    keep: Callable[[str], bool] = lambda _: False
    native_size: Callable[[PredictionType], int | None] = lambda _: None
    block_names_by_count: Mapping[int, tuple[str, ...]] = field(default_factory=dict[int, tuple[str, ...]])
    rows_together: bool = True
    latent_space: str = ""
    same_latents: Callable[[Config, Config], bool] = lambda one, other: one == other
    control_modes: frozenset[ControlMode] = frozenset(CONTROL_MODES)
    control_reads_prompt_only: bool = False
    find_controlnet_mismatch: Callable[[Config, Config], str | None] = lambda _, __: (
        "is a ControlNet, but {model} does not support ControlNets"
    )
    adapter_signs: AdapterSigns = AdapterSigns()
    embedding_names: Mapping[str, str] = field(default_factory=dict[str, str])
    clip_skip_in_a1111: bool = True
    single_file_components: tuple[SingleFileComponent, ...] = ()
    part_rules: tuple[KindRule, ...] = ()
    pipeline_class: str = ""
    pipeline_settings: Callable[[str], Mapping[str, object]] = lambda _: {}
    empty_pipeline_components: tuple[str, ...] = ()
    export_problem: str = ""
    gguf_architecture: str = ""
    published: Mapping[str, Mapping[str, Config]] = field(default_factory=dict[str, Mapping[str, Config]])

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of all components. A checkpoint has those of its variant (:meth:`roles_of`)."""
        return tuple(component.role for component in self.components)

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of all components in a diffusers folder."""
        return tuple(dict.fromkeys(component.folder for component in self.components))

    def components_of(self, variant: str) -> tuple[Component, ...]:
        """Return the components that a variant's checkpoints have."""
        return tuple(one for one in self.components if not one.variants or variant in one.variants)

    def roles_of(self, variant: str) -> tuple[str, ...]:
        """Return the roles of the components that a variant's checkpoints have, in the order of use."""
        return tuple(component.role for component in self.components_of(variant))

    @property
    def denoiser(self) -> str:
        """The role of the denoiser."""
        return self.of(Purpose.DENOISER)[0].role

    @property
    def vae(self) -> str:
        """The role of the VAE."""
        return self.of(Purpose.VAE)[0].role

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The roles of the text encoders."""
        return tuple(component.role for component in self.of(Purpose.TEXT_ENCODER))

    def guidance_of(self, variant: str) -> GuidanceKind:
        """Return the guidance of a variant's checkpoints."""
        return self.variants[variant].guidance or self.guidance

    def features_of(self, variant: str) -> frozenset[Feature]:
        """Return what a variant's checkpoints can do: what the family can, less what their guidance leaves out.

        :attr:`Variant.references` alone decides about reference images. An unknown variant has the family's features.
        """
        own = self.variants.get(variant, Variant())
        found = self.features - {Feature.REFERENCES} - _LEFT_OUT.get(own.guidance or self.guidance, frozenset())
        return found if own.references is None else found | {Feature.REFERENCES}

    def references_of(self, variant: str) -> References | None:
        """Return how a variant's checkpoints take reference images; None if they take none."""
        return self.variants[variant].references if variant in self.variants else None

    def noise_of(self, variant: str) -> Noise:
        """Return the noise that a variant's checkpoints were trained with."""
        return self.variants[variant].noise or self.noise

    def defaults_of(self, variant: str) -> Defaults:
        """Return the number of steps and the guidance scales of a variant's checkpoints."""
        own = self.variants[variant].defaults if variant in self.variants else None
        if own is not None:
            return own
        return Defaults() if Feature.GUIDANCE in self.features else Defaults(cfg=1.0)

    def published_sizes(self) -> dict[str, dict[str, Config]]:
        """Return the settings of all components of each published size, by the size's name and by role.

        The components are those of the first variant.
        The result lacks sizes with a component whose settings no one declares.
        """
        components = self.components_of(next(iter(self.variants)))
        sizes = {
            name: {one.role: own.get(one.role, one.standard) for one in components}
            for name, own in (self.published or {self.name: {}}).items()
        }
        known: dict[str, dict[str, Config]] = {}
        for name, configs in sizes.items():
            complete = {role: config for role, config in configs.items() if config is not None}
            if len(complete) == len(configs):
                known[name] = complete
        return known

    def of(self, purpose: Purpose) -> tuple[Component, ...]:
        return tuple(component for component in self.components if component.purpose == purpose)

    def component(self, role: str) -> Component:
        return next(component for component in self.components if component.role == role)

    def component_in(self, part: SingleFileComponent) -> Component | None:
        """Return the component that files of a kind have; None for ControlNets, which are no component of a family."""
        return next((one for one in self.components if one.role == (part.role or part.kind)), None)

    def prefix_within_denoiser(self, role: str) -> str:
        """Return what names of a component begin with in the denoiser's file; "" if it is in a file of its own."""
        outer, own = self.component(self.denoiser).prefixes[0], self.component(role).prefixes[0]
        return own.removeprefix(outer) if role != self.denoiser and own.startswith(outer) else ""

    def purpose(self, role: str) -> Purpose:
        """Return the purpose of a role; ControlNets are no component of a family."""
        return next((one.purpose for one in self.components if one.role == role), Purpose.CONTROL)

    def strength_purpose(self, role: str) -> Purpose:
        """Return the purpose whose strength a LoRA has on a component.

        What reads a text encoder's output belongs to the denoiser: ComfyUI has both in one module.
        """
        reads = any(one.role == role and one.reads for one in self.components)
        return Purpose.DENOISER if reads else self.purpose(role)

    def unread(self, role: str, names: Iterable[str]) -> frozenset[str]:
        """Return those names of a component's tensors that the family never reads."""
        is_unread = next((one.is_unread for one in self.components if one.role == role), None)
        return frozenset(filter(is_unread, names)) if is_unread is not None else frozenset()
