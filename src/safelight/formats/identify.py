"""What a file or folder is, from headers alone, and the rule that said so."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safelight.errors import CorruptFileError, UnsupportedModelError
from safelight.files import open_regular
from safelight.formats import folder, layout, pickle, safetensors
from safelight.formats.header import Header
from safelight.formats.keys import unet
from safelight.formats.keys.kinds import KIND_RULES, KindRule
from safelight.formats.keys.rows import NotThisArchitecture
from safelight.formats.keys.unet import UNetConfig
from safelight.formats.layout import BASES, CheckpointLayout

PredictionType = Literal["epsilon", "v_prediction"]

VARIANTS: Mapping[int, str] = {4: "text-to-image", 5: "depth", 8: "instruct-pix2pix", 9: "inpainting"}
"""By the UNet's input channels."""

_DTYPE_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is. ``nbytes`` counts its tensors. ``rule`` is the sentence of the rules that decided.

    ``format``: ``safetensors``, ``pickle``, ``diffusers``, or ``diffusers-pickle``: a folder with pickles in it.
    ``resolution``: pixels a side, where the metadata says. ``layout`` is there for complete checkpoints only;
    ``prediction_type``, ``variant`` likewise. ``told``: the prediction type is the user's word. ``watched``: what else
    than the files of tensors decided, and must not change.
    """

    path: Path
    kind: str
    base: str | None
    variant: str | None
    prediction_type: PredictionType | None
    zero_terminal_snr: bool
    dtype: str
    nbytes: int
    format: str
    rule: str
    layout: CheckpointLayout | None = None
    resolution: int | None = None
    told: bool = False
    watched: tuple[Path, ...] = ()


def identify(path: Path, prediction_type: PredictionType | None = None) -> Identity:
    """What ``path`` is: a ``.safetensors`` file, a pickle, or a diffusers folder. Reads headers only.

    ``prediction_type`` is the user's word, and goes above every rule. Raises FileError for damaged or unreadable files
    and IncompleteModelError for a checkpoint that is not complete.
    """
    if os.path.isdir(path):
        identity = _folder(path)
    else:
        header = read_header(path)
        identity = _single(header)
    if prediction_type is not None and identity.kind == "checkpoint":
        rule = f"{identity.rule}; but {prediction_type} by the user's word"
        identity = replace(identity, prediction_type=prediction_type, rule=rule, told=True)
    return identity


def read_header(path: Path) -> Header:
    """The header of a single file of any format, told apart by its first bytes, not by its name."""
    descriptor, _ = open_regular(path)
    with open(descriptor, "rb") as file:
        start = file.read(9)
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[8:9] != b"{":
        return pickle.read_header(path)
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"} and start[8:9] != b"{":
        return pickle.read_header(path)
    return safetensors.read_header(path)


def _dtype(infos: Mapping[str, str]) -> str:
    counted = Counter(infos.values())
    floats = {dtype: n for dtype, n in counted.items() if dtype in _DTYPE_NAMES} or dict(counted)
    if not floats:
        return "none"
    if len(floats) > 1 and max(floats.values()) < 0.9 * sum(floats.values()):
        return "mixed"
    most = max(floats, key=lambda dtype: floats[dtype])
    return _DTYPE_NAMES.get(most, most.lower())


def _fire(header: Header) -> KindRule:
    names = list(header.tensors)
    fired = next((rule for rule in KIND_RULES if rule.fires(names)), None) or _lone_vectors(header)
    if fired is None:
        some = ", ".join(sorted(names)[:3]) or "none at all"
        raise UnsupportedModelError(header.path, f"is not a kind of model known here ({len(names)} tensors: {some})")
    return fired


def _lone_vectors(header: Header) -> KindRule | None:
    """The rule for a textual inversion whose only tensor has any name: diffusers calls it by its placeholder."""
    floats = [info for info in header.tensors.values() if info.dtype in layout.FLOATS]
    if len(floats) == 1 and "." not in floats[0].name and len(floats[0].shape) in (1, 2) and floats[0].shape[-1] >= 32:
        return KindRule("textual_inversion", None, (), "one tensor of vectors and nothing else")
    return None


def _single(header: Header) -> Identity:
    fired = _fire(header)
    rule = f"{fired.kind}: {fired.sentence}"
    base = fired.base
    dtype = _dtype({name: info.dtype for name, info in header.tensors.items()})
    common = Identity(header.path, fired.kind, base, None, None, False, dtype, header.nbytes, header.format, rule)
    if fired.kind != "checkpoint":
        found = _inversion_base(header) if fired.kind == "textual_inversion" else _adapter_base(header)
        return replace(common, base=found or base)
    if base is None:
        projection = header.tensors.get("unet.down_blocks.0.attentions.0.proj_in.weight")
        base = "sd2" if projection is not None and len(projection.shape) == 2 else "sd1"
        rule = f"{rule}; {base} by the shape of its projections"
    if base not in BASES:
        return replace(common, rule=f"{rule}; this base is not supported yet")
    parts = layout.split(header, BASES[base])
    built = layout.build(header.path, BASES[base], parts, header.tensors)
    prediction, snr, why = _prediction_of_file(header, base)
    return replace(
        common,
        base=base,
        variant=_variant(built),
        prediction_type=prediction,
        zero_terminal_snr=snr,
        dtype=_dtype_of(built),
        rule=f"{rule}; {why}",
        layout=built,
        resolution=_resolution(header.metadata.get("modelspec.resolution", "")),
    )


def _resolution(text: str) -> int | None:
    """Pixels a side from ``modelspec.resolution``, such as ``1024x1024``; None for what no image can have."""
    found = re.match(r"([0-9]{1,5})(x|$)", text)
    pixels = int(found[1]) if found else 0
    return pixels if 8 <= pixels <= 16384 and pixels % 8 == 0 else None


def _folder(path: Path) -> Identity:
    found = folder.read(path)
    roles = set(found.components)
    if "unet" not in roles:
        raise UnsupportedModelError(path, f"is a {found.pipeline} without a UNet: not a base known here")
    shapes = {name: info.shape for name, info in found.components["unet"].tensors.items()}
    try:
        config = unet.infer(shapes)
    except NotThisArchitecture as error:
        raise UnsupportedModelError(path, f"is a {found.pipeline} whose UNet is not one known here: {error}") from error
    if config.time_features is not None:
        base = "sdxl" if "text_encoder" in roles else "sdxl-refiner"
        rule = "a UNet with added conditioning, " + ("two text encoders" if base == "sdxl" else "one text encoder")
    else:
        base = "sd2" if config.linear_projection else "sd1"
        rule = f"a UNet whose projections are {'matrices' if base == 'sd2' else '1×1 convolutions'}"
    absent = [role for role in BASES[base].roles if role not in roles]
    if absent:
        raise CorruptFileError(path, f"model_index.json names no {absent[0]}, which {base} needs")
    _refuse_other_settings(path, base, config)
    parts = {role: found.components[role].tensors for role in BASES[base].roles}
    # SD 2's folders hold a text encoder that has lost its last layer already.
    known = replace(BASES[base], drop_last=False)
    names = [f"{role}.{name}" for role in known.roles for name in parts[role]]
    renamed = {
        role: {name: replace(info, name=f"{role}.{info.name}") for name, info in infos.items()}
        for role, infos in parts.items()
    }
    built = layout.build(path, known, renamed, names)
    said = found.scheduler.get("prediction_type")
    if said in ("epsilon", "v_prediction"):
        prediction, why = said, f"{said} as its scheduler's settings say"
    elif said is not None:
        raise UnsupportedModelError(path, f"its scheduler predicts {said!r}, which cannot be run yet")
    else:
        prediction, why = _prediction_by_base(base)
    return Identity(
        path,
        "checkpoint",
        base,
        _variant(built),
        prediction,
        bool(found.scheduler.get("rescale_betas_zero_snr", False)),
        _dtype_of(built),
        sum(component.nbytes for component in built.components),
        "diffusers-pickle" if "pickle" in {found.components[role].format for role in parts} else "diffusers",
        f"checkpoint: {found.pipeline}, {rule}; {why}",
        built,
        resolution=_sample_size(path),
        watched=found.watched,
    )


def _sample_size(path: Path) -> int | None:
    """Pixels a side, as a folder's UNet says in latents; None where it does not, or says what no image can have."""
    file = path / "unet" / "config.json"
    said = folder.read_json(file).get("sample_size") if file.exists() else None
    return _resolution(str(said * layout.LATENT_SCALE)) if isinstance(said, int) else None


def _refuse_other_settings(path: Path, base: str, config: UNetConfig) -> None:
    """Refuse a folder whose settings say what neither shapes nor the base's rule would give."""
    rule = BASES[base]
    heads = [layout.attention_heads(rule, width) for width in config.block_out_channels]
    expected: list[tuple[str, str, object]] = [
        ("vae", "scaling_factor", rule.scaling_factor),
        ("vae", "norm_num_groups", layout.NORM_GROUPS),
        ("unet", "norm_num_groups", layout.NORM_GROUPS),
        ("unet", "attention_head_dim", heads),
        *((role, "hidden_act", activation) for role, activation in rule.activations.items()),
    ]
    for role, name, value in expected:
        file = path / role / "config.json"
        said = folder.read_json(file).get(name) if file.exists() else None
        if said is not None and said != value and not (isinstance(said, int) and [said] * len(heads) == value):
            raise UnsupportedModelError(path, f"{role}/config.json says {name} = {said}; {base} has {value}")


def _variant(built: CheckpointLayout) -> str:
    config = built.component("unet").config
    channels = config.in_channels if isinstance(config, UNetConfig) else 0
    if channels not in VARIANTS:
        raise UnsupportedModelError(built.path, f"its UNet takes {channels} channels, which no known variant does")
    return VARIANTS[channels]


def _dtype_of(built: CheckpointLayout) -> str:
    return _dtype({place.name: place.dtype for place in built.component("unet").tensors})


def _prediction_by_base(base: str) -> tuple[PredictionType, str]:
    if base == "sd2":
        return "v_prediction", "v_prediction, which SD 2.0 and 2.1 use at 768 pixels; nothing in the file says"
    return "epsilon", f"epsilon, which {base} was trained with; nothing in the file says"


def _prediction_of_file(header: Header, base: str) -> tuple[PredictionType, bool, str]:
    """(prediction type, zero terminal SNR, why), by the markers that the community writes, else by the base."""
    snr = "ztsnr" in header.tensors
    if "v_pred" in header.tensors:
        return "v_prediction", snr, "v_prediction by its marker tensor v_pred"
    said = header.metadata.get("modelspec.prediction_type", "").lower().replace("-", "_")
    if said in ("v", "v_prediction", "vprediction"):
        return "v_prediction", snr, "v_prediction by modelspec.prediction_type"
    if said in ("epsilon", "eps"):
        return "epsilon", snr, "epsilon by modelspec.prediction_type"
    edm = next((name for name in header.tensors if name.startswith("edm_")), None)
    if said or edm:
        raise UnsupportedModelError(
            header.path, f"says that it predicts {said or 'as EDM does (' + str(edm) + ')'}, which cannot be run yet"
        )
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    if architecture.endswith("-v") or "768-v" in architecture:
        return "v_prediction", snr, f"v_prediction by modelspec.architecture {architecture}"
    if architecture.startswith("stable-diffusion-v2-512"):
        return "epsilon", snr, f"epsilon by modelspec.architecture {architecture}"
    prediction, why = _prediction_by_base(base)
    return prediction, snr, why


_CONTEXT_BASES: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}


_DECLARED: Mapping[str, str] = {
    "sd_v1": "sd1",
    "sd_1.5": "sd1",
    "sd_v2": "sd2",
    "sd_v2_v": "sd2",
    "sdxl_base_v0-9": "sdxl",
    "sdxl_base_v1-0": "sdxl",
    "sdxl_refiner_v0-9": "sdxl-refiner",
    "sdxl_refiner_v1-0": "sdxl-refiner",
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2-512": "sd2",
    "stable-diffusion-v2-768-v": "sd2",
    "stable-diffusion-xl-v0-9-base": "sdxl",
    "stable-diffusion-xl-v1-base": "sdxl",
    "stable-diffusion-xl-v1-refiner": "sdxl-refiner",
}
"""The values that kohya's scripts write as ``ss_base_model_version`` and ``modelspec.architecture``."""

_ONLY_SDXL = re.compile(r"(^lora_te2_|(^|[._])text_encoder_2\.|transformer_blocks[._][1-9][0-9]?[._])")
"""SD 1 and 2 have one text encoder, and one transformer block in each attention."""


def _adapter_base(header: Header) -> str | None:
    """The base of an adapter, None when nothing tells.

    By the width of the text that its attention reads; by modules that only one base has (convolutions as ``proj_in``:
    SD 1); by the width of the one text encoder that kohya calls ``lora_te``; then by what its metadata declares in an
    exact known value.
    """
    for name, info in header.tensors.items():
        reads_text = "attn2" in name and any(part in name for part in ("to_k", "to_v"))
        down = any(part in name for part in ("lora_down", "lora_A", "lora.down", "hada_w1_b"))
        plain = name.endswith(("to_k.weight", "to_v.weight", "to_k.diff", "to_v.diff"))
        if reads_text and (down or plain) and len(info.shape) >= 2 and info.shape[1] in _CONTEXT_BASES:
            return _CONTEXT_BASES[info.shape[1]]
    if any(_ONLY_SDXL.search(name) for name in header.tensors):
        return "sdxl"
    for name, info in header.tensors.items():
        reads = any(part in name for part in ("lora_down", "lora_A", "lora.down"))
        if reads and "proj_in" in name and len(info.shape) == 4:
            return "sd1"
        if reads and name.startswith("lora_te_") and "_fc2" not in name and len(info.shape) == 2:
            found = {768: "sd1", 1024: "sd2"}.get(info.shape[1])
            if found is not None:
                return found
    for key in ("ss_base_model_version", "modelspec.architecture"):
        declared = header.metadata.get(key, "").partition("/")[0].lower()
        if declared in _DECLARED:
            return _DECLARED[declared]
    return None


def _inversion_base(header: Header) -> str | None:
    """The base of a textual inversion, by the width of its vectors; None when that tells nothing."""
    widths = {info.shape[-1] for info in header.tensors.values() if info.shape and info.dtype in layout.FLOATS}
    return _CONTEXT_BASES.get(widths.pop()) if len(widths) == 1 else None
