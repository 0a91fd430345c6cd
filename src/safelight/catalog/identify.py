"""Identifies a file or folder from its headers alone, and reports the rule that decided."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from safelight.errors import CorruptFileError, UnsupportedModelError
from safelight.families.components import Component, Config
from safelight.families.family import AdapterSigns, Family, PredictionType
from safelight.families.llama_cpp_names import with_library_names
from safelight.families.registry import families
from safelight.families.rules import ADAPTER_RULES, NOT_SUPPORTED, PART_RULES, KindRule, lines_of
from safelight.families.tables import NotThisArchitecture
from safelight.files import folder, gguf, pickle, safetensors
from safelight.files.blocks import BLOCKS
from safelight.files.disk import open_regular
from safelight.files.folder import Folder
from safelight.files.header import MADE_FROM, Header, is_pickle
from safelight.files.packing import PACKED, find_packed
from safelight.weights import adapter_kinds, layout
from safelight.weights.layout import CheckpointLayout

DENOISER = "denoiser"
"""The kind of rules for files that hold a denoiser and nothing else."""

_DTYPE_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}
_COMPACT_NAMES = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2", **{form: form.lower() for form in (*BLOCKS, *PACKED)}}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is.

    ``nbytes``: bytes of its tensors.
    ``format``: ``safetensors``, ``gguf``, ``pickle``, ``diffusers``, or ``diffusers-pickle`` (a folder with pickles).
    ``rule``: the sentences of the rules that decided.
    ``resolution``: pixels per side; None if the metadata does not give it.
    ``variant``: see :class:`safelight.catalog.model.Model`.
    ``layout``, ``prediction_type``, ``variant``: None unless the file is a complete checkpoint.
    ``prediction_type_from_user``, ``variant_from_user``: the user set it.
    ``metadata``: that of a single file's header.
    ``watched``: files and folders without tensors that influenced the decision. The identification is valid only while
    these are unchanged.
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
    prediction_type_from_user: bool = False
    variant_from_user: bool = False
    watched: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


def identify(path: Path, prediction_type: PredictionType | None = None, variant: str = "") -> Identity:
    """Identify ``path``: a ``.safetensors`` file, a pickle, or a diffusers folder. Reads headers only.

    ``prediction_type``, ``variant``: set by the user; each overrides every rule. "" for the file's own variant.
    Raises FileError for a damaged or unreadable file.
    Raises IncompleteModelError for an incomplete checkpoint.
    """
    identity = _folder(path, variant) if os.path.isdir(path) else _single(read_header(path), variant)
    if prediction_type is not None and identity.kind == "checkpoint":
        rule = f"{identity.rule}; but the user set {prediction_type}"
        identity = replace(identity, prediction_type=prediction_type, rule=rule, prediction_type_from_user=True)
    if variant and identity.layout is not None:
        rule = f"{identity.rule}; the user set the variant {variant}"
        identity = replace(identity, rule=rule, variant_from_user=True)
    return identity


def read_header(path: Path) -> Header:
    """Read the header of a single file of any format, with each packed weight as one tensor."""
    return find_packed(read_raw_header(path))


def read_raw_header(path: Path) -> Header:
    """Read the header of a single file of any format. The first bytes decide the format.

    A pickle's file suffix counts only if the first bytes decide nothing.
    """
    descriptor, _ = open_regular(path)
    with open(descriptor, "rb") as file:
        start = file.read(9)
    if start.startswith(gguf.MAGIC):
        return with_library_names(gguf.read_header(path))
    if is_pickle(start):
        return pickle.read_header(path)
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"} and start[8:9] != b"{":
        return pickle.read_header(path)
    return safetensors.read_header(path)


def _dtype(infos: Mapping[str, str]) -> str:
    """Return the form of most tensors. ``infos``: the form of each, by the tensor's name.

    A quantised file always has tensors in plain dtypes, too: norms and biases.
    """
    counted = Counter(infos.values())
    compact = {form: n for form, n in counted.items() if form in _COMPACT_NAMES}
    if compact:
        return _COMPACT_NAMES[max(compact, key=lambda form: compact[form])]
    floats = {dtype: n for dtype, n in counted.items() if dtype in _DTYPE_NAMES} or dict(counted)
    if not floats:
        return "none"
    if len(floats) > 1 and max(floats.values()) < 0.9 * sum(floats.values()):
        return "mixed"
    most = max(floats, key=lambda dtype: floats[dtype])
    return _DTYPE_NAMES.get(most, most.lower())


def kind_rules() -> tuple[KindRule, ...]:
    """Return all rules for single files, in the order in which they are tried."""
    own = [rule for family in families().values() for rule in family.rules]
    parts = [rule for family in families().values() for rule in family.part_rules]
    adapters = [rule for family in families().values() for rule in family.adapter_rules]
    return (*NOT_SUPPORTED, *adapters, *ADAPTER_RULES, *adapter_kinds.rules(), *own, *parts, *PART_RULES)


def _matching_rule(header: Header) -> KindRule:
    shapes = {name: info.shape for name, info in header.tensors.items()}
    lines = lines_of(shapes)
    found = next((rule for rule in kind_rules() if rule.fires(shapes, lines)), None) or _lone_vectors(header)
    if found is None:
        some = ", ".join(sorted(shapes)[:3]) or "none at all"
        raise UnsupportedModelError(header.path, f"is an unknown kind of model ({len(shapes)} tensors: {some})")
    return found


def _lone_vectors(header: Header) -> KindRule | None:
    """Recognise a textual inversion with one tensor of any name: diffusers names the tensor by its placeholder."""
    floats = [info for info in header.tensors.values() if info.dtype in layout.FLOATS]
    if len(floats) == 1 and "." not in floats[0].name and len(floats[0].shape) in (1, 2) and floats[0].shape[-1] >= 32:
        return KindRule("textual_inversion", None, "one tensor of vectors and nothing else", ())
    return None


def _single(header: Header, variant: str) -> Identity:
    kind_rule = _matching_rule(header)
    kind, base = kind_rule.kind, kind_rule.base
    made_from = header.metadata.get(MADE_FROM)
    origin = f"; made by Safelight from {made_from[:10]}" if made_from else ""
    rule = f"{kind}: {kind_rule.sentence}{origin}"
    dtype = _dtype({name: info.dtype for name, info in header.tensors.items()})
    common = Identity(
        header.path,
        kind,
        base,
        None,
        None,
        False,
        dtype,
        header.nbytes,
        header.format,
        rule,
        metadata=header.metadata,
    )
    if kind == DENOISER:
        # A checkpoint whose other components are in other files.
        common = replace(common, kind="checkpoint")
    elif kind != "checkpoint":
        found = _inversion_base(header) if kind == "textual_inversion" else _adapter_base(header)
        return replace(common, base=found or base)
    family = families().get(base or "")
    if family is None:
        return replace(common, rule=f"{rule}; it is not supported yet")
    parts = layout.split(header, family)
    choose = partial(_variant_of, header.path, family, header, variant)
    built = layout.build(header.path, family, parts, header.tensors, choose)
    training = family.detect_training(header)
    return replace(
        common,
        base=base,
        variant=built.variant,
        prediction_type=training.prediction_type,
        zero_terminal_snr=training.zero_terminal_snr,
        dtype=_dtype_of(built),
        rule=f"{rule}; {training.why}",
        layout=built,
        resolution=_resolution(header.metadata.get("modelspec.resolution", "")),
    )


def _resolution(text: str) -> int | None:
    """Return pixels per side from ``modelspec.resolution``, such as ``1024x1024``; None for an impossible size."""
    found = re.match(r"([0-9]{1,5})(x|$)", text)
    pixels = int(found[1]) if found else 0
    return pixels if 8 <= pixels <= 16384 and pixels % 8 == 0 else None


def _folder(path: Path, variant: str) -> Identity:
    every = {name: None for family in families().values() for name in family.folders}
    found = folder.read(path, tuple(every))
    found = replace(found, components={name: find_packed(header) for name, header in found.components.items()})
    family, rule = _family_of(found)
    absent = [name for name in family.folders if name not in found.components]
    if absent:
        raise CorruptFileError(path, f"its index names no {absent[0]}, which {family.name} needs")
    built = _folder_layout(found, family, variant)
    _refuse_other_settings(built)
    assert family.detect_folder_training is not None, family.name
    training = family.detect_folder_training(found)
    formats = {found.components[name].format for name in family.folders}
    return Identity(
        path,
        "checkpoint",
        family.name,
        built.variant,
        training.prediction_type,
        training.zero_terminal_snr,
        _dtype_of(built),
        sum(component.nbytes for component in built.components),
        "diffusers-pickle" if "pickle" in formats else "diffusers",
        f"checkpoint: {found.pipeline}, {rule}; {training.why}",
        built,
        resolution=_sample_size(path, family),
        watched=found.watched,
    )


def _family_of(found: Folder) -> tuple[Family, str]:
    """Return the family of a folder, and the reason. Raises UnsupportedModelError for an unknown one."""
    for family in families().values():
        rule = family.recognise_folder(found)
        if rule is not None:
            return family, rule
    for family in families().values():
        # A tensor is missing from which the family would be recognised: then the error has to name the tensor.
        if family.pipeline_class == found.pipeline and _lacks_a_tensor(family.component(family.denoiser), found):
            return family, "by its pipeline"
    held = ", ".join(found.components) or "no component"
    raise UnsupportedModelError(found.path, f"is a {found.pipeline} of an unknown family (it has {held})")


def _lacks_a_tensor(component: Component, found: Folder) -> bool:
    header = found.components.get(component.role)
    if header is None:
        return False
    try:
        component.infer({name: info.shape for name, info in header.tensors.items()})
    except NotThisArchitecture as error:
        return error.__cause__ is not None or bool(error.tensor)
    except KeyError:
        return True
    return False


def _folder_layout(found: Folder, family: Family, variant: str) -> CheckpointLayout:
    renamed = {
        place: {name: replace(info, name=f"{place}.{name}") for name, info in found.components[place].tensors.items()}
        for place in family.folders
    }
    names = [info.name for infos in renamed.values() for info in infos.values()]
    parts = {component.role: renamed[component.folder] for component in family.components}
    return layout.build(found.path, family, parts, names, partial(_variant_of, found.path, family, found, variant))


def _sample_size(path: Path, family: Family) -> int | None:
    """Return pixels per side, from the sample size in latents in the denoiser's settings; None if there is none."""
    file = path / family.denoiser / "config.json"
    said = folder.read_json(file).get("sample_size") if file.exists() else None
    return _resolution(str(said * family.latents.vae_scale_factor)) if isinstance(said, int) else None


_SETTINGS_FILES = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
"""Settings files of a folder that belong to no component."""


def _refuse_other_settings(built: CheckpointLayout) -> None:
    """Reject a folder whose settings differ from those of the family and of the tensors' shapes."""
    configs = {component.role: component.config for component in built.components}
    for role, name, value in built.family.folder_settings(configs):
        place = _SETTINGS_FILES.get(role, f"{role}/config.json")
        file = built.path / place
        said = _setting(folder.read_json(file), name) if file.exists() else None
        same = said == value or (isinstance(value, list) and isinstance(said, int) and set(value) == {said})  # pyright: ignore[reportUnknownArgumentType]
        if said is not None and not same:
            problem = f"{place} says {name} = {said}; {built.family.name} has {value}"
            raise UnsupportedModelError(built.path, problem)


def _setting(settings: Mapping[str, object], name: str) -> object:
    """Return the value of a setting, None if it is absent. ``name``: a dot separates the names of nested settings."""
    found: object = settings
    for part in name.split("."):
        found = cast("Mapping[str, object]", found).get(part) if isinstance(found, dict) else None
    return found


def _variant_of(
    path: Path, family: Family, found: Folder | Header, from_user: str, configs: Mapping[str, Config]
) -> str | None:
    """Return the variant of a checkpoint; None if the user must say it.

    ``from_user``: the variant that the user set; "" for the checkpoint's own.
    """
    if from_user:
        if from_user not in family.variants:
            known = ", ".join(family.variants)
            raise UnsupportedModelError(path, f"is {family.name}, whose variants are {known}; not {from_user}")
        return from_user
    if not family.asks_variant(configs):
        detected = family.detect_variant(configs)
        if detected is None:
            label = configs[family.denoiser].label
            raise UnsupportedModelError(path, f"its {family.denoiser} is of no known variant ({label})")
        return detected
    if isinstance(found, Header):
        return family.declared_variants.get(found.metadata.get("modelspec.architecture", "").lower())
    return None if family.detect_folder_variant is None else family.detect_folder_variant(found)


def _dtype_of(built: CheckpointLayout) -> str:
    return _dtype({place.name: place.dtype for place in built.component(built.family.denoiser).tensors})


def _adapter_base(header: Header) -> str | None:
    """Return the family of an adapter, None if it is unknown.

    These decide, in this order:
    - names that only this family has;
    - shapes that only this family has;
    - the width of the text embeddings that the adapter's cross-attention reads (``cross_attention_dim``);
    - the family that the metadata declares, if it is one of the known values.
    If one of them fits several families, the next ones choose among these. If all do, any of them may be meant.
    """
    signs = {family.name: family.adapter_signs for family in families().values()}
    width = _cross_attention_dim(header, frozenset(sign.cross_attention_dim for sign in signs.values()))
    declared = {
        header.metadata.get(key, "").partition("/")[0].lower()
        for key in ("ss_base_model_version", "modelspec.architecture")
    }
    rounds: tuple[Callable[[AdapterSigns], bool], ...] = (
        lambda sign: sign.names is not None and any(sign.names.search(name) for name in header.tensors),
        lambda sign: sign.shapes is not None and sign.shapes(header),
        lambda sign: width is not None and sign.cross_attention_dim == width,
        lambda sign: not declared.isdisjoint(sign.declared),
    )
    left = list(signs)
    for fits in rounds:
        found = [name for name in left if fits(signs[name])]
        if len(found) == 1:
            return found[0]
        left = found or left
    return None


def _cross_attention_dim(header: Header, known: frozenset[int]) -> int | None:
    """Return the width of the embeddings that an adapter's cross-attention reads; None if no family has that width."""
    for name, info in header.tensors.items():
        reads_text = "attn2" in name and any(part in name for part in ("to_k", "to_v"))
        down = any(part in name for part in ("lora_down", "lora_A", "lora.down", "hada_w1_b"))
        plain = name.endswith(("to_k.weight", "to_v.weight", "to_k.diff", "to_v.diff"))
        if reads_text and (down or plain) and len(info.shape) >= 2 and info.shape[1] in known:
            return info.shape[1]
    return None


def _inversion_base(header: Header) -> str | None:
    """Return the family of a textual inversion, from the width of its vectors; None if it is unknown."""
    widths = {info.shape[-1] for info in header.tensors.values() if info.shape and info.dtype in layout.FLOATS}
    known = {family.adapter_signs.cross_attention_dim: name for name, family in families().items()}
    return known.get(widths.pop()) if len(widths) == 1 else None
