"""Maps each tensor of a weight adapter (LoRA, LoHa, LoKr, …) to the component and the tensor that it changes.

Supported names: kohya's scripts (``lora_unet_…``, with diffusers' or the original's block names), diffusers (old
attention processors, ``.lora.down``), PEFT (``.lora_A.weight``, with and without an adapter's name), LyCORIS, XLabs
(``.processor.qkv_lora1.down``), and ComfyUI (``diffusion_model.…``). The names are looked up in the architecture's own
table, never guessed by replacing underscores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from safelight.families.components import Component, Config
from safelight.families.tables import Rows, TensorRow, squeezed
from safelight.request.adapters import Purpose
from safelight.weights import adapter_kinds

Kind = Literal["lora", "loha", "lokr", "diff"]

MOST_RANK = 8192
"""Limit of the rank. It is above the width of every layer, so a larger rank is not a low rank."""

DEFAULT_PEFT_ROLE = "unet"
"""The role for PEFT's settings that name no component. They belong to the denoiser."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterConfig(Config):
    """The settings of an adapter that do not follow from shapes.

    ``kind``: the kind of the file, as in :mod:`safelight.families.rules`.
    ``scaled``: roles of the components for which PEFT's metadata gives a scale.
    ``scales``: these scales, in the order of ``scaled``: alpha / rank (alpha / sqrt(rank) for rsLoRA), the factor of
    up @ down.
    """

    architecture: ClassVar[str] = "adapter"
    kind: str
    scaled: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()

    def scale(self, component: Component) -> float | None:
        """Return the scale for a component; None if the metadata gives none."""
        known = dict(zip(self.scaled, self.scales, strict=True))
        default = known.get(DEFAULT_PEFT_ROLE) if component.purpose is Purpose.DENOISER else None
        return known.get(component.role, default)


@dataclass(frozen=True, slots=True)
class WeightChange:
    """The change that an adapter makes to one tensor of a component.

    ``kind``: the formula: a :data:`Kind`, or one that a package adds.
    ``target``: the changed tensor, by its name in the module.
    ``slots``: names of the adapter's tensors, by their role in the formula (``down``, ``up``, ``mid``, ``alpha``,
    ``dora_scale``, ``magnitude`` (PEFT's DoRA), ``hada_w1_a``, ``lokr_w1``, ``diff``, …).
    ``block``: block of LDM's UNet that contains the target (``IN04``, ``M00``, ``OUT11``), ``BASE`` elsewhere.
    ``rows``: which rows of the difference are the target's, in the target's order. None: all. An adapter for a fused
    projection changes several targets.
    """

    kind: str
    target: str
    slots: Mapping[str, str]
    block: str = "BASE"
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class AdapterMatch:
    """What an adapter changes in a checkpoint, and which of its tensors do not match.

    ``changes``: the changes of each component, by role.
    ``unknown``: names of tensors that match no tensor of the checkpoint.
    ``mismatched``: targets for which the adapter has the wrong shape, with both shapes.
    """

    changes: Mapping[str, tuple[WeightChange, ...]]
    unknown: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of changes in all components."""
        return sum(len(changes) for changes in self.changes.values())


_LETTERS = {"A": "down", "B": "up"}

_SUFFIXES = (
    (re.compile(r"(?P<module>.+)\.processor\.(?P<inner>to_q|to_k|to_v|to_out)_lora\.(?P<slot>down|up)\.weight"), ""),
    (re.compile(r"(?P<module>.+\.processor\.(qkv|proj)_lora[12]?)\.(?P<slot>down|up)\.weight"), ""),
    (re.compile(r"(?P<module>.+)\.lora_linear_layer\.(?P<slot>down|up)\.weight"), ""),
    (re.compile(r"(?P<module>.+)\.lora\.(?P<slot>down|up)\.weight"), ""),
    (re.compile(r"(?P<module>.+)\.lora_(?P<slot>[AB])(\.[^.]+)?\.weight"), ""),
    (re.compile(r"(?P<module>.+)\.lora_(?P<slot>B)(\.[^.]+)?\.bias"), "bias"),
    (re.compile(r"(?P<module>.+)\.lora_(?P<slot>down|up|mid)\.weight"), ""),
    (re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\..+)?"), "magnitude"),
    (re.compile(r"(?P<module>.+)\.(?P<slot>alpha|dora_scale|diff|diff_b|w_norm|b_norm)"), ""),
    (re.compile(r"(?P<module>.+)\.(?P<slot>hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2))"), ""),
)

_SCALING_SLOTS = frozenset({"alpha", "dora_scale", "magnitude"})
_WEIGHT_ONLY_SCALING_SLOTS = frozenset({"dora_scale", "magnitude"})
_BIAS_SLOTS = frozenset({"bias", "diff_b", "b_norm"})


def split(name: str) -> tuple[str, str] | None:
    """Split the name of an adapter's tensor into (module, slot). Return None if the form of the name is unknown.

    ``slot``: the tensor's role in the formula (:class:`WeightChange`).
    """
    for pattern, fixed in _SUFFIXES:
        found = pattern.fullmatch(name)
        if found is None:
            continue
        groups = found.groupdict()
        module, slot = groups["module"], fixed or groups["slot"]
        inner = groups.get("inner")
        if inner is not None:
            module = f"{module}.{inner}" + (".0" if inner == "to_out" else "")
        return module, _LETTERS.get(slot, slot)
    return adapter_kinds.split_package_tensor_name(name)


@dataclass
class Module:
    """A module of a component.

    ``path``: its name in the component.
    ``block``: the block of LDM's UNet that contains it, ``BASE`` elsewhere.
    ``shapes``: the shapes of its tensors, by name in the module.
    """

    role: str
    path: str
    block: str
    shapes: dict[str, Shape] = field(default_factory=dict[str, Shape])


@dataclass(frozen=True)
class Target:
    """A module under one of its names.

    ``rows``: which rows under this name are the module's, in the module's order: for a fused projection, or for one
    with its halves in another order. None: all.
    ``of``: how many rows there are under this name, if ``rows`` is not None.
    """

    module: Module
    rows: Rows | None = None
    of: int = 0

    def shape(self, leaf: str) -> Shape | None:
        """Return the shape of a tensor under this name; None if the module has no such tensor."""
        own = self.module.shapes.get(leaf)
        return own if own is None or self.rows is None else (self.of, *own[1:])


Names = Mapping[str, tuple[Target, ...]]
"""Modules by every name that adapters use for them. The name of a fused projection stands for several modules."""


def modules_by_name(components: Iterable[tuple[Component, Iterable[TensorRow]]]) -> Names:
    """Return the modules of these components under every name that adapters use for them.

    ``components``: each component with its table. Adapters do not change VAEs.
    """
    found: dict[str, tuple[Target, ...]] = {}
    # A denoiser and a text encoder may have modules of the same name. Names without a prefix then mean the denoiser's.
    for component, rows in sorted(components, key=lambda pair: pair[0].purpose is not Purpose.DENOISER):
        if component.purpose not in (Purpose.DENOISER, Purpose.TEXT_ENCODER):
            continue
        modules: dict[str, Module] = {}
        for row in rows:
            path, _, leaf = row.name.rpartition(".")
            sources = (*row.sources, *component.adapter_sources(row.name))
            others = [source.name.rpartition(".")[0] for source in sources if source.in_order]
            # ComfyUI has the whole name of a tensor that is neither a weight nor a bias (``….query_norm.scale.diff``).
            others += [one.name for one in sources if one.in_order and not one.name.endswith((".weight", ".bias"))]
            block = NO_BLOCK if component.block_of is None else component.block_of(others)
            known = modules.setdefault(path, Module(component.role, path, block))
            known.shapes[leaf] = row.shape
            for name in _names(component, [path, *others]):
                found.setdefault(name, (Target(known),))
            for source in sources:
                other, _, name_of_leaf = source.name.rpartition(".")
                if not source.in_order and name_of_leaf == leaf == "weight":
                    part = Target(known, source.pieces(row.shape[0]), source.part(row.shape[0])[1])
                    for name in dict.fromkeys(_names(component, [other])):
                        found[name] = (*found.get(name, ()), part)
    return found


NO_BLOCK = "BASE"
"""The block of modules outside of the denoiser's blocks."""


def _names(component: Component, paths: Iterable[str]) -> Iterable[str]:
    role = component.role
    for path in dict.fromkeys(paths):
        forms = [path]
        if component.optional_prefix:
            bare = path.removeprefix(component.optional_prefix)
            forms = [bare, component.optional_prefix + bare]
        for form in forms:
            for prefix in component.lora_prefixes:
                yield prefix + form.replace(".", "_")
            yield f"{role}.{form}"
            yield f"{role}.base_model.model.{form}"
            yield f"base_model.model.{form}"
            for prefix in component.lora_paths:
                yield prefix + form
            if component.purpose is Purpose.DENOISER:
                yield form


def match_adapter(shapes: Mapping[str, Shape], known: Names) -> AdapterMatch:
    """Match an adapter's tensors with the modules of a checkpoint.

    ``shapes``: the shapes of the adapter's tensors, by name.
    ``known``: the checkpoint's modules, from :func:`modules_by_name`.
    """
    grouped: dict[tuple[str, str], dict[str, str]] = {}
    targets: dict[tuple[str, str], Target] = {}
    unknown: list[str] = []
    for name in shapes:
        parsed = split(name)
        found_targets = known.get(parsed[0], ()) if parsed is not None else ()
        if parsed is None or not found_targets:
            unknown.append(name)
            continue
        for target in found_targets:
            key = target.module.role, target.module.path
            # A module and the fused projection that contains it cannot both be changed.
            if parsed[1] in grouped.setdefault(key, {}) or targets.setdefault(key, target).rows != target.rows:
                unknown.append(name)
                continue
            grouped[key][parsed[1]] = name
    changes: dict[str, list[WeightChange]] = {}
    mismatched: list[str] = []
    for key, slots in grouped.items():
        place = targets[key]
        module = place.module
        for leaf, kind, chosen in _formulas(slots):
            target, shape = f"{module.path}.{leaf}", place.shape(leaf)
            if kind is None or shape is None:
                unknown += chosen.values()
                continue
            sizes = {slot: shapes[name] for slot, name in chosen.items()}
            found = _shape(kind, sizes, shape)
            if place.rows is not None and math.prod(sizes.get("dora_scale", (place.of,))) != place.of:
                # A magnitude per column is a norm over the rows of all parts.
                found = None
            if found is None or not _same(found, shape):
                mismatched.append(
                    f"{module.role}.{target}: {list(found) if found else 'nothing'} instead of {list(shape)}"
                )
                continue
            changes.setdefault(module.role, []).append(WeightChange(kind, target, chosen, module.block, place.rows))
    unknown = list(dict.fromkeys(unknown))
    return AdapterMatch({role: tuple(changes) for role, changes in changes.items()}, tuple(unknown), tuple(mismatched))


def _shape(kind: str, sizes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    """Return the shape of what a change adds to a weight, None if its tensors do not fit together."""
    if kind not in get_args(Kind):
        return weight if adapter_kinds.shapes_match(kind, sizes, weight) else None
    return _difference_shape(kind, sizes) if _scales_fit(sizes, weight) else None


def _formulas(slots: Mapping[str, str]) -> Iterable[tuple[str, str | None, dict[str, str]]]:
    """Yield (tensor of the module, formula, slots). The formula is None if the slots together form none."""
    for kind in dict.fromkeys(slot.partition("/")[0] for slot in slots if "/" in slot):
        own = {slot: name for slot, name in slots.items() if slot.startswith(f"{kind}/")}
        yield "weight", kind, {slot.partition("/")[2]: name for slot, name in own.items()}
    slots = {slot: name for slot, name in slots.items() if "/" not in slot}
    scale = {slot: name for slot, name in slots.items() if slot in _SCALING_SLOTS}
    rest = {slot: name for slot, name in slots.items() if slot not in scale and slot not in _BIAS_SLOTS}
    bias = {slot: name for slot, name in slots.items() if slot in _BIAS_SLOTS}
    if rest:
        yield "weight", _kind(rest), {**rest, **scale}
    elif scale:
        yield "weight", None, scale
    for slot, name in bias.items():
        # PEFT also multiplies the bias of ``up`` by alpha / rank. So pass on alpha, and ``down``, from whose shape
        # ``rank()`` reads the rank.
        more = {**scale, "down": rest["down"]} if slot == "bias" and "down" in rest else {}
        yield "bias", "diff", {"diff": name, **{k: v for k, v in more.items() if k not in _WEIGHT_ONLY_SCALING_SLOTS}}


def _kind(slots: Mapping[str, str]) -> Kind | None:
    names = set(slots)
    if names in ({"diff"}, {"w_norm"}):
        return "diff"
    if names in ({"down", "up"}, {"down", "up", "mid"}):
        return "lora"
    hada = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    if names in (hada, hada | {"hada_t1", "hada_t2"}):
        return "loha"
    first = {"lokr_w1"} <= names or {"lokr_w1_a", "lokr_w1_b"} <= names
    second = {"lokr_w2"} <= names or {"lokr_w2_a", "lokr_w2_b"} <= names
    if first and second and all(name.startswith("lokr_") for name in names):
        return "lokr"
    return None


def _scales_fit(sizes: Mapping[str, Shape], shape: Shape) -> bool:
    """Return whether alpha is a single number, and a magnitude has one number per row or per column."""
    count = {slot: math.prod(size) for slot, size in sizes.items()}
    magnitude = count.get("magnitude", shape[0]) == shape[0] and count.get("dora_scale", shape[0]) in shape[:2]
    return count.get("alpha", 1) == 1 and magnitude


def _same(found: Shape, shape: Shape) -> bool:
    """Compare two shapes. A convolution's difference may be a matrix with channels × kernel columns."""
    flat = len(found) == 2 and len(shape) > 2 and found == (shape[0], math.prod(shape[1:]))
    return flat or squeezed(found) == squeezed(shape)


def rank(kind: str, shapes: Mapping[str, Shape]) -> int:
    """Return the rank by which alpha is divided; 0 if alpha is not divided."""
    match kind:
        case "lora":
            return shapes["down"][0]
        case "loha":
            return shapes["hada_w1_b"][0]
        case "lokr":
            factor = shapes.get("lokr_w1_b", shapes.get("lokr_w2_b"))
            return factor[0] if factor is not None else 0
        case "diff":
            return shapes["down"][0] if "down" in shapes else 0
        case _:
            return 0


def _difference_shape(kind: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the shape of the difference, None if its factors do not fit together."""
    try:
        if rank(kind, shapes) > MOST_RANK:
            return None
        match kind:
            case "diff":
                return shapes.get("diff", shapes.get("w_norm"))
            case "lora":
                return _lora(shapes)
            case "loha":
                return _loha(shapes)
            case "lokr":
                return _lokr(shapes)
            case _:
                return None
    except (IndexError, ValueError):
        return None


def _lora(shapes: Mapping[str, Shape]) -> Shape | None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    if mid is not None:
        whole = (up[0], down[1], *mid[2:])
        return whole if (mid[0], mid[1]) == (up[1], down[0]) and len(mid) == 4 else None
    return (up[0], *down[1:]) if up[1] == down[0] and all(n == 1 for n in up[2:]) else None


def _loha(shapes: Mapping[str, Shape]) -> Shape | None:
    products: list[Shape] = []
    for number in "12":
        a, b, t = shapes[f"hada_w{number}_a"], shapes[f"hada_w{number}_b"], shapes.get(f"hada_t{number}")
        if t is None:
            (rows, inner), (other, columns) = a, b
            if inner != other:
                return None
            products.append((rows, columns))
        else:
            (inner_a, rows), (inner_b, columns) = a, b
            if (t[0], t[1]) != (inner_a, inner_b):
                return None
            products.append((rows, columns, *t[2:]))
    return products[0] if products[0] == products[1] else None


def _lokr(shapes: Mapping[str, Shape]) -> Shape | None:
    for name in ("lokr_w1", "lokr_w2"):
        a, b = shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
        if a is not None and b is not None and "lokr_t2" not in shapes and a[1] != b[0]:
            return None
    if "lokr_w1" in shapes:
        rows, columns = shapes["lokr_w1"]
    else:
        rows, columns = shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1]
    second = shapes.get("lokr_w2")
    if second is None:
        a, b, t = shapes["lokr_w2_a"], shapes["lokr_w2_b"], shapes.get("lokr_t2")
        second = (a[0], *b[1:]) if t is None else (a[1], b[1], *t[2:])
    return (rows * second[0], columns * second[1], *second[2:])
