"""Identifies a file or folder from its headers alone, and reports the rule that decided."""

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
"""Variant of a checkpoint by the number of input channels of its UNet."""

_DTYPE_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is.

    ``nbytes``: bytes of its tensors.
    ``format``: ``safetensors``, ``pickle``, ``diffusers``, or ``diffusers-pickle`` (a folder that contains pickles).
    ``rule``: the sentences of the rules that decided.
    ``resolution``: pixels per side; None if the metadata does not give it.
    ``layout``, ``prediction_type``, ``variant``: None unless the file is a complete checkpoint.
    ``told``: the user set the prediction type.
    ``watched``: files and folders without tensors that influenced the decision. It holds only while they do not change.
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
    """Identify ``path``: a ``.safetensors`` file, a pickle, or a diffusers folder. Reads headers only.

    ``prediction_type``: set by the user; it overrides every rule.
    Raises FileError for a damaged or unreadable file.
    Raises IncompleteModelError for an incomplete checkpoint.
    """
    if os.path.isdir(path):
        identity = _folder(path)
    else:
        header = read_header(path)
        identity = _single(header)
    if prediction_type is not None and identity.kind == "checkpoint":
        rule = f"{identity.rule}; but the user set {prediction_type}"
        identity = replace(identity, prediction_type=prediction_type, rule=rule, told=True)
    return identity


def read_header(path: Path) -> Header:
    """Read the header of a single file of any format. The first bytes decide the format.

    A pickle's file suffix counts only if the first bytes decide nothing.
    """
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
        raise UnsupportedModelError(header.path, f"is an unknown kind of model ({len(names)} tensors: {some})")
    return fired


def _lone_vectors(header: Header) -> KindRule | None:
    """Recognise a textual inversion with one tensor of any name: diffusers names the tensor by its placeholder."""
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
        rule = f"{rule}; the shape of its projections says {base}"
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
    """Return pixels per side from ``modelspec.resolution``, such as ``1024x1024``; None for an impossible size."""
    found = re.match(r"([0-9]{1,5})(x|$)", text)
    pixels = int(found[1]) if found else 0
    return pixels if 8 <= pixels <= 16384 and pixels % 8 == 0 else None


def _folder(path: Path) -> Identity:
    found = folder.read(path)
    roles = set(found.components)
    if "unet" not in roles:
        raise UnsupportedModelError(path, f"is a {found.pipeline} without a UNet, so its base is unknown")
    shapes = {name: info.shape for name, info in found.components["unet"].tensors.items()}
    try:
        config = unet.infer(shapes)
    except NotThisArchitecture as error:
        raise UnsupportedModelError(path, f"is a {found.pipeline} whose UNet is unknown: {error}") from error
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
    # The text encoder in SD 2's folders already lacks its last layer.
    known = replace(BASES[base], drop_last=False)
    names = [f"{role}.{name}" for role in known.roles for name in parts[role]]
    renamed = {
        role: {name: replace(info, name=f"{role}.{info.name}") for name, info in infos.items()}
        for role, infos in parts.items()
    }
    built = layout.build(path, known, renamed, names)
    said = found.scheduler.get("prediction_type")
    if said in ("epsilon", "v_prediction"):
        prediction, why = said, f"its scheduler's settings say {said}"
    elif said is not None:
        raise UnsupportedModelError(path, f"its scheduler has prediction type {said!r}, which is not supported")
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
    """Return pixels per side, from the sample size in latents in the UNet's settings; None if absent or impossible."""
    file = path / "unet" / "config.json"
    said = folder.read_json(file).get("sample_size") if file.exists() else None
    return _resolution(str(said * layout.LATENT_SCALE)) if isinstance(said, int) else None


def _refuse_other_settings(path: Path, base: str, config: UNetConfig) -> None:
    """Reject a folder whose settings differ from those of the base and of the tensors' shapes."""
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
        raise UnsupportedModelError(built.path, f"its UNet has {channels} input channels; no known variant has as many")
    return VARIANTS[channels]


def _dtype_of(built: CheckpointLayout) -> str:
    return _dtype({place.name: place.dtype for place in built.component("unet").tensors})


def _prediction_by_base(base: str) -> tuple[PredictionType, str]:
    if base == "sd2":
        return "v_prediction", "v_prediction by default, as in SD 2.0 and 2.1 for 768 pixels; the file names none"
    return "epsilon", f"epsilon by default, as in {base}'s training; the file names none"


def _prediction_of_file(header: Header, base: str) -> tuple[PredictionType, bool, str]:
    """Return (prediction type, zero terminal SNR, reason), from the community's markers, else from the base."""
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
            header.path, f"has prediction type {said or 'EDM (' + str(edm) + ')'}, which is not supported"
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
"""Names that occur only in SDXL: SD 1 and 2 have one text encoder, and one transformer block in each attention."""


def _adapter_base(header: Header) -> str | None:
    """Return the base of an adapter, None if it is unknown.

    These decide, in this order:
    - the width of the text that the adapter's attention reads;
    - modules that only one base has (convolutions as ``proj_in``: SD 1);
    - the width of the single text encoder, which kohya calls ``lora_te``;
    - the base that the metadata declares, if it is one of the known values.
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
    """Return the base of a textual inversion, from the width of its vectors; None if it is unknown."""
    widths = {info.shape[-1] for info in header.tensors.values() if info.shape and info.dtype in layout.FLOATS}
    return _CONTEXT_BASES.get(widths.pop()) if len(widths) == 1 else None
