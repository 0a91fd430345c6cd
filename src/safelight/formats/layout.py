"""A checkpoint's layout: for every tensor that its modules need, the place in a file where its bytes are.

Widths and depths come from the shapes; what shapes do not tell comes from the base (:data:`BASES`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.formats.header import Header, TensorInfo
from safelight.formats.keys import clip, controlnet, leftover, unet, vae
from safelight.formats.keys.adapters import AdapterConfig
from safelight.formats.keys.rows import NotThisArchitecture, Row, Source, squeezed

ComponentConfig = clip.CLIPConfig | unet.UNetConfig | vae.VAEConfig | controlnet.ControlNetConfig | AdapterConfig

FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Base:
    """What the shapes of a base's tensors do not tell.

    ``roles``: its components in the order of use. ``heads``: attention heads of the UNet, None for 64 channels a head.
    ``scaling_factor``: of the latents. ``activations``: of each text encoder. ``drop_last``: an OpenCLIP encoder's last
    layer is left out. ``pad_ids``: the token that fills a prompt up, for each text encoder.
    """

    name: str
    roles: tuple[str, ...]
    heads: int | None
    scaling_factor: float
    activations: Mapping[str, str]
    pad_ids: Mapping[str, int]
    drop_last: bool = False


CONTROLNET = "controlnet"
"""The role of ControlNets, of which a job may have several."""

END_TOKEN = 49407
VOCABULARY = 49408
POSITIONS = 77

BASES: Mapping[str, Base] = {
    base.name: base
    for base in (
        Base(
            "sd1",
            ("text_encoder", "unet", "vae"),
            heads=8,
            scaling_factor=0.18215,
            activations={"text_encoder": "quick_gelu"},
            pad_ids={"text_encoder": END_TOKEN},
        ),
        Base(
            "sd2",
            ("text_encoder", "unet", "vae"),
            heads=None,
            scaling_factor=0.18215,
            activations={"text_encoder": "gelu"},
            pad_ids={"text_encoder": 0},
            drop_last=True,
        ),
        Base(
            "sdxl",
            ("text_encoder", "text_encoder_2", "unet", "vae"),
            heads=None,
            scaling_factor=0.13025,
            activations={"text_encoder": "quick_gelu", "text_encoder_2": "gelu"},
            pad_ids={"text_encoder": END_TOKEN, "text_encoder_2": 0},
        ),
        Base(
            "sdxl-refiner",
            ("text_encoder_2", "unet", "vae"),
            heads=None,
            scaling_factor=0.13025,
            activations={"text_encoder_2": "gelu"},
            pad_ids={"text_encoder_2": 0},
        ),
    )
}

SINGLE_FILE_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.", "unet."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoder.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "text_encoder_2."),
}
"""Where a single file keeps a component: LDM's prefixes, and the folder names of diffusers."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor as its module names it, and the bytes that hold it.

    ``shape`` is the module's. ``offset`` and ``nbytes`` are bytes of ``path``. With ``transpose`` the bytes hold the
    matrix the other way round. ``source``: the tensor's name in the file. The places of a pickle only say that it is
    complete: pickles are converted, tensor by tensor as their own header says, before their bytes are read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    transpose: bool = False
    source: str = ""

    @property
    def label(self) -> str:
        """Its name in the file, and the module's in brackets where that is another."""
        return labelled(self.source or self.name, self.name)


def labelled(theirs: str, ours: str) -> str:
    """A tensor's name in the user's file, and the module's in brackets where that is another."""
    return theirs if theirs == ours or theirs.endswith(f".{ours}") else f"{theirs} ({ours})"


@dataclass(frozen=True, slots=True)
class ComponentLayout:
    """``role`` is diffusers' folder name. ``tensors`` are in the order in which a forward pass uses them."""

    role: str
    config: ComponentConfig
    tensors: tuple[TensorPlace, ...]

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.tensors)


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """``left_over``: names that nothing needs, with the reason why each may be there."""

    path: Path
    base: Base
    components: tuple[ComponentLayout, ...]
    left_over: Mapping[str, str]

    def component(self, role: str) -> ComponentLayout:
        return next(component for component in self.components if component.role == role)


def split(header: Header, base: Base) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each component of a single file, without their prefixes.

    Raises IncompleteModelError when a component is not there at all.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for role in base.roles:
        for prefix in SINGLE_FILE_PREFIXES[role]:
            found = {name[len(prefix) :]: info for name, info in header.tensors.items() if name.startswith(prefix)}
            if found and role not in parts:
                parts[role] = found
        if role not in parts:
            wanted = SINGLE_FILE_PREFIXES[role][0] + "*"
            raise IncompleteModelError(header.path, f"{base.name} checkpoint (no {role})", missing=(wanted,))
    return parts


def build(
    path: Path, base: Base, parts: Mapping[str, Mapping[str, TensorInfo]], names: Iterable[str]
) -> CheckpointLayout:
    """The layout of a checkpoint whose components' tensors are given by role; ``names``: everything in its files.

    Raises IncompleteModelError, naming the tensors, when some are missing, have another shape, or fit nothing.
    """
    built = [_built(path, f"{base.name} checkpoint", base, role, parts[role]) for role in base.roles]
    components = [one.component for one in built]
    used = {place for one in built for place in one.used}
    missing = [name for one in built for name in one.missing]
    mismatched = [name for one in built for name in one.mismatched]
    seen = {name for _, name in used}
    left_over = {name: leftover.reason(name) for name in names if name not in seen}
    unexpected = [name for name, why in left_over.items() if why is None]
    if missing or mismatched or unexpected:
        raise IncompleteModelError(path, f"{base.name} checkpoint", missing, mismatched, unexpected)
    problem = _discord({component.role: component.config for component in components})
    if problem is not None:
        raise UnsupportedModelError(path, f"its parts do not go together: {problem}")
    return CheckpointLayout(path, base, tuple(components), {name: why or "" for name, why in left_over.items()})


def alone(path: Path, role: str, infos: Mapping[str, TensorInfo]) -> ComponentLayout:
    """The layout of a VAE or ControlNet (``role``) that has a file of its own. Raises IncompleteModelError as
    :func:`build` does."""
    what = "ControlNet" if role == CONTROLNET else "VAE"
    one = _built(path, what, BASES["sd1"], role, infos)
    used = {name for _, name in one.used}
    unexpected = [info.name for info in infos.values() if info.name not in used and leftover.reason(info.name) is None]
    if one.missing or one.mismatched or unexpected:
        raise IncompleteModelError(path, what, one.missing, one.mismatched, unexpected)
    return one.component


@dataclass(frozen=True, slots=True)
class _Built:
    component: ComponentLayout
    used: frozenset[tuple[Path, str]]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]


def _built(path: Path, what: str, base: Base, role: str, infos: Mapping[str, TensorInfo]) -> _Built:
    """One component, and what is wrong with it. ``what``: the file, as refusals name it."""
    used: set[tuple[Path, str]] = set()
    mismatched: list[str] = []
    try:
        config = _infer(base, role, {name: info.shape for name, info in infos.items()})
    except NotThisArchitecture as error:
        missing = _missing(role, rows(STANDARD[base.name, role]), infos) if (base.name, role) in STANDARD else ()
        # First the one without which the architecture is not known: the others may be of another size's.
        lacked = error.__cause__.args[0] if isinstance(error.__cause__, KeyError) else ""
        missing = tuple(sorted(missing, key=lambda one: lacked not in one))
        raise IncompleteModelError(path, what, missing=missing or (f"{role}: {error}",)) from error
    places: list[TensorPlace] = []
    table = list(rows(config))
    for row in table:
        source = next((source for source in row.sources if source.name in infos), None)
        if source is None:
            continue
        info = infos[source.name]
        used.add((info.path, info.name))
        place = _place(row, source, info)
        if place is None:
            sizes = f"{list(info.shape)} instead of {_in_file(row, source)}"
            mismatched.append(f"{labelled(info.name, f'{role}.{row.name}')}: {sizes}")
        elif place.dtype not in FLOATS:
            raise UnsupportedModelError(path, f"tensor {info.name} is {info.dtype}; only F32, F16 and BF16 are read")
        else:
            places.append(place)
    missing = _missing(role, table, infos)
    return _Built(ComponentLayout(role, config, tuple(places)), frozenset(used), missing, tuple(mismatched))


def _in_file(row: Row, source: Source) -> list[int]:
    """The shape that a row's tensor has in a file."""
    count = 1 if source.part is None else source.part[1]
    shape = row.shape[::-1] if source.transpose else row.shape
    return [shape[0] * count, *shape[1:]]


def _missing(role: str, table: Iterable[Row], infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """The rows for which a file has no tensor, as the file would name them: in the convention, and behind the prefix,
    of the tensors that it has."""
    found: Counter[tuple[int, str]] = Counter()
    absent: list[Row] = []
    for row in table:
        index = next((i for i, source in enumerate(row.sources) if source.name in infos), None)
        if index is None:
            absent.append(row)
        else:
            info = infos[row.sources[index].name]
            found[index, info.name.removesuffix(row.sources[index].name)] += 1
    if not found:
        return tuple(f"{role}.{row.name}" for row in absent)
    (index, prefix), _ = found.most_common(1)[0]
    names = (prefix + row.sources[min(index, len(row.sources) - 1)].name for row in absent)
    return tuple(dict.fromkeys(labelled(name, f"{role}.{row.name}") for name, row in zip(names, absent, strict=True)))


LATENT_SCALE = 8
"""Pixels to a latent, in each direction."""

NORM_GROUPS = 32
CHANNELS_PER_HEAD = 64
TIME_IDS_WIDTH = 256
"""Width of each of SDXL's size and crop numbers (six of them, five for the refiner) in its added conditioning."""

LATENT_LEVELS = 4
"""Levels of a VAE whose latents are eight times smaller than its images."""


def _discord(configs: Mapping[str, ComponentConfig]) -> str | None:
    """Why these parts cannot work together although each is complete, None when they can."""
    encoders = [config for config in configs.values() if isinstance(config, clip.CLIPConfig)]
    net, auto = configs["unet"], configs["vae"]
    assert isinstance(net, unet.UNetConfig)
    assert isinstance(auto, vae.VAEConfig)
    for encoder in encoders:
        if (encoder.vocabulary, encoder.positions) != (VOCABULARY, POSITIONS):
            return f"a text encoder for {encoder.vocabulary} tokens at {encoder.positions} positions is not CLIP's"
        if encoder.width % CHANNELS_PER_HEAD:
            return f"a text encoder {encoder.width} wide has no whole number of heads"
    for name, widths in (("UNet", net.block_out_channels), ("VAE", auto.block_out_channels)):
        if any(width % NORM_GROUPS for width in widths):
            return f"widths {widths} of its {name} are not multiples of {NORM_GROUPS}"
    context = sum(encoder.width for encoder in encoders)
    if net.cross_attention_dim != context:
        return f"its UNet reads text {net.cross_attention_dim} wide, its text encoders give {context}"
    pooled = encoders[-1].projection
    if net.time_features is not None and pooled is not None:
        numbers = 6 if len(encoders) == 2 else 5
        if net.time_features != numbers * TIME_IDS_WIDTH + pooled:
            return f"its UNet's added conditioning is {net.time_features} wide"
    if (auto.latent_channels, len(auto.block_out_channels)) != (net.out_channels, LATENT_LEVELS):
        return "its VAE's latents are not those of its UNet"
    return None


def attention_heads(base: Base, width: int) -> int:
    """Attention heads of a UNet's level that is ``width`` channels wide; narrow ones have one."""
    return base.heads or max(1, width // CHANNELS_PER_HEAD)


_VAE = vae.VAEConfig(3, 3, 4, (128, 256, 512, 512), 2)
_CLIP_L = clip.CLIPConfig(768, 3072, 12, VOCABULARY, POSITIONS, None, "quick_gelu")

STANDARD: Mapping[tuple[str, str], ComponentConfig] = {
    ("sd1", "text_encoder"): _CLIP_L,
    ("sd1", "unet"): unet.UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 768, False),
    ("sd1", "vae"): _VAE,
    ("sd2", "text_encoder"): clip.CLIPConfig(1024, 4096, 23, VOCABULARY, POSITIONS, None, "gelu"),
    ("sd2", "unet"): unet.UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 1024, True),
    ("sd2", "vae"): _VAE,
    ("sdxl", "text_encoder"): _CLIP_L,
    ("sdxl", "text_encoder_2"): clip.CLIPConfig(1280, 5120, 32, VOCABULARY, POSITIONS, 1280, "gelu"),
    ("sdxl", "unet"): unet.UNetConfig(4, 4, (320, 640, 1280), 2, (0, 2, 10), 10, 2048, True, 2816),
    ("sdxl", "vae"): _VAE,
}
"""The published sizes. Where a file lacks the tensors from which settings are read, these say what it lacks."""


def rows(config: ComponentConfig) -> Iterable[Row]:
    """The table of tensors of a component."""
    match config:
        case unet.UNetConfig():
            return unet.tensors(config)
        case vae.VAEConfig():
            return vae.tensors(config)
        case clip.CLIPConfig():
            return clip.tensors(config)
        case controlnet.ControlNetConfig():
            return controlnet.tensors(config)
        case AdapterConfig():
            return ()


def _infer(base: Base, role: str, shapes: Mapping[str, tuple[int, ...]]) -> ComponentConfig:
    if role == "unet":
        return unet.infer(shapes)
    if role == "vae":
        return vae.infer(shapes)
    if role == CONTROLNET:
        return controlnet.infer(shapes)
    pooled = role == "text_encoder_2"
    config = clip.infer(shapes, base.activations[role], base.drop_last)
    if pooled and config.projection is None:
        raise NotThisArchitecture("text_projection")
    return config if pooled else clip.without_projection(config)


def _place(row: Row, source: Source, info: TensorInfo) -> TensorPlace | None:
    """The bytes of a row, or None when the file's shape does not fit."""
    shape, offset, nbytes = info.shape, info.offset, info.nbytes
    if source.part is not None:
        index, count = source.part
        if not shape or shape[0] != row.shape[0] * count:
            return None
        shape = (row.shape[0], *shape[1:])
        nbytes //= count
        offset += index * nbytes
    if source.transpose:
        if shape != row.shape[::-1]:
            return None
    elif squeezed(shape) != squeezed(row.shape):
        return None
    return TensorPlace(row.name, info.dtype, row.shape, info.path, offset, nbytes, source.transpose, info.name)
