"""The layout of a checkpoint: for every tensor that its modules need, the file and the offset of its bytes.

Widths and depths come from the shapes. Everything else comes from the base (:data:`BASES`).
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
from safelight.formats.keys.rows import NotThisArchitecture, TensorRow, TensorSource, squeezed

ComponentConfig = clip.CLIPConfig | unet.UNetConfig | vae.VAEConfig | controlnet.ControlNetConfig | AdapterConfig

FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Base:
    """The settings of a base that do not follow from the shapes of its tensors.

    ``roles``: its components, in the order of use.
    ``heads``: attention heads of the UNet; None for 64 channels per head.
    ``scaling_factor``: factor of the latents.
    ``activations``: activation function of each text encoder.
    ``pad_ids``: id of the padding token of each text encoder.
    ``drop_last``: leave out the last layer of an OpenCLIP encoder.
    """

    name: str
    roles: tuple[str, ...]
    heads: int | None
    scaling_factor: float
    activations: Mapping[str, str]
    pad_ids: Mapping[str, int]
    drop_last: bool = False


CONTROLNET = "controlnet"
"""The role of ControlNets. A job may have several."""

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
"""Prefixes of a component's tensors in a single file: those of LDM, and the folder names of diffusers."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor under its module's name, and where its bytes are.

    ``shape``: the shape in the module.
    ``offset``, ``nbytes``: bytes in ``path``.
    ``transpose``: the file stores the matrix transposed.
    ``source``: the tensor's name in the file.

    The places of a pickle only prove that it is complete. Safelight converts pickles before it reads their bytes, and
    takes each tensor's offset from the pickle's own header.
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
        """The tensor's name in the file, with the module's name in brackets if it differs."""
        return labelled(self.source or self.name, self.name)


def labelled(theirs: str, ours: str) -> str:
    """Return a tensor's name in the user's file, with the module's name in brackets if it differs."""
    return theirs if theirs == ours or theirs.endswith(f".{ours}") else f"{theirs} ({ours})"


@dataclass(frozen=True, slots=True)
class ComponentLayout:
    """The layout of one component.

    ``role``: its folder name in diffusers.
    ``tensors``: in the order in which a forward pass uses them.
    """

    role: str
    config: ComponentConfig
    tensors: tuple[TensorPlace, ...]

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.tensors)


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """The layout of a checkpoint. ``left_over``: tensors that no module needs, with the reason why each is allowed."""

    path: Path
    base: Base
    components: tuple[ComponentLayout, ...]
    left_over: Mapping[str, str]

    def component(self, role: str) -> ComponentLayout:
        return next(component for component in self.components if component.role == role)


def split(header: Header, base: Base) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each component of a single file, without their prefixes.

    Raises IncompleteModelError when a component has no tensors.
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
    """Return the layout of a checkpoint.

    ``parts``: the tensors of each component, by role.
    ``names``: the names of all tensors in its files.
    Raises IncompleteModelError when tensors are missing, have a wrong shape, or are unknown. The error lists them.
    Raises UnsupportedModelError when the components are complete but do not fit together.
    """
    built = [_built(path, f"{base.name} checkpoint", base, role, parts[role]) for role in base.roles]
    components = [part.component for part in built]
    used = {place for part in built for place in part.used}
    missing = [name for part in built for name in part.missing]
    mismatched = [name for part in built for name in part.mismatched]
    seen = {name for _, name in used}
    left_over = {name: leftover.reason(name) for name in names if name not in seen}
    unexpected = [name for name, why in left_over.items() if why is None]
    if missing or mismatched or unexpected:
        raise IncompleteModelError(path, f"{base.name} checkpoint", missing, mismatched, unexpected)
    problem = _discord({component.role: component.config for component in components})
    if problem is not None:
        raise UnsupportedModelError(path, f"its components do not fit together: {problem}")
    return CheckpointLayout(path, base, tuple(components), {name: why or "" for name, why in left_over.items()})


def alone(path: Path, role: str, infos: Mapping[str, TensorInfo]) -> ComponentLayout:
    """Return the layout of a VAE or ControlNet (``role``) in its own file.

    Raises IncompleteModelError as :func:`build` does.
    """
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
    """Build one component and collect its faults. ``what``: the name of the file's kind in errors."""
    used: set[tuple[Path, str]] = set()
    mismatched: list[str] = []
    try:
        config = _infer(base, role, {name: info.shape for name, info in infos.items()})
    except NotThisArchitecture as error:
        missing = _missing(role, rows(STANDARD[base.name, role]), infos) if (base.name, role) in STANDARD else ()
        # First the tensor without which the architecture is unknown: the others may belong to another size.
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


def _in_file(row: TensorRow, source: TensorSource) -> list[int]:
    """Return the shape of a row's tensor in a file."""
    count = 1 if source.part is None else source.part[1]
    shape = row.shape[::-1] if source.transpose else row.shape
    return [shape[0] * count, *shape[1:]]


def _missing(role: str, table: Iterable[TensorRow], infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the tensors that a file lacks, under the names that the file would use.

    The naming convention and the prefix are those of the tensors that the file has.
    """
    found: Counter[tuple[int, str]] = Counter()
    absent: list[TensorRow] = []
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
"""Pixels per latent, in each direction."""

NORM_GROUPS = 32
CHANNELS_PER_HEAD = 64
TIME_IDS_WIDTH = 256
"""Width of each of SDXL's size and crop numbers (six of them, five for the refiner) in its added conditioning."""

LATENT_LEVELS = 4
"""Levels of a VAE whose latents are eight times smaller than its images, in each direction."""


def _discord(configs: Mapping[str, ComponentConfig]) -> str | None:
    """Return why these complete components cannot work together, None if they can."""
    encoders = [config for config in configs.values() if isinstance(config, clip.CLIPConfig)]
    net, auto = configs["unet"], configs["vae"]
    assert isinstance(net, unet.UNetConfig)
    assert isinstance(auto, vae.VAEConfig)
    for encoder in encoders:
        if (encoder.vocabulary, encoder.positions) != (VOCABULARY, POSITIONS):
            return f"a text encoder for {encoder.vocabulary} tokens at {encoder.positions} positions is not CLIP"
        if encoder.width % CHANNELS_PER_HEAD:
            return f"a text encoder {encoder.width} wide has no whole number of heads"
    for name, widths in (("UNet", net.block_out_channels), ("VAE", auto.block_out_channels)):
        if any(width % NORM_GROUPS for width in widths):
            return f"widths {widths} of its {name} are not multiples of {NORM_GROUPS}"
    context = sum(encoder.width for encoder in encoders)
    if net.cross_attention_dim != context:
        return f"its UNet reads text {net.cross_attention_dim} wide, its text encoders return {context}"
    pooled = encoders[-1].projection
    if net.time_features is not None and pooled is not None:
        numbers = 6 if len(encoders) == 2 else 5
        if net.time_features != numbers * TIME_IDS_WIDTH + pooled:
            wanted = numbers * TIME_IDS_WIDTH + pooled
            return f"its UNet's added conditioning is {net.time_features} wide instead of {wanted}"
    if (auto.latent_channels, len(auto.block_out_channels)) != (net.out_channels, LATENT_LEVELS):
        return "the latents of its VAE and of its UNet differ"
    return None


def attention_heads(base: Base, width: int) -> int:
    """Return the number of attention heads of a UNet's level that is ``width`` channels wide, at least 1."""
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
"""The published sizes. If a file lacks the tensors from which settings are inferred, these tell which tensors it lacks.
"""


def rows(config: ComponentConfig) -> Iterable[TensorRow]:
    """Return the table of a component's tensors."""
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


def _place(row: TensorRow, source: TensorSource, info: TensorInfo) -> TensorPlace | None:
    """Return where a row's bytes are, or None if the shape in the file does not fit."""
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
