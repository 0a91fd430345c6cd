"""Kinds of weight adapters: the built-in ones, and those that installed packages add (group ``safelight.adapters``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from safelight.extensions import Extensible, extensions, instance_of
from safelight.families.rules import KindRule, rule

Shape = tuple[int, ...]
GROUP = "safelight.adapters"


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """A kind of adapters that a package adds. Each adapter changes weights of modules.

    ``suffixes``: maps a tensor-name suffix (``.ia3_scale``) to the tensor's slot in the formula (``scale``).
    ``fits(shapes, weight_shape)``: whether an adapter's tensors (shapes by slot) can change a weight of that shape;
    False if a slot is missing.
    ``difference``: the formula, as ``package.module:function``. The function takes the tensors by slot, and the weight,
    all fp32. It returns what is added to the weight at strength 1: a new tensor of the weight's shape, fp32.
    """

    suffixes: Mapping[str, str]
    fits: Callable[[Mapping[str, Shape], Shape], bool]
    difference: str


def _read(given: object) -> AdapterKind | None:
    return instance_of(AdapterKind)(given)


WEIGHT_ADAPTER_KINDS: Extensible[AdapterKind | None] = Extensible(
    dict.fromkeys(("lora", "loha", "lokr", "full_difference", "diff")), GROUP, _read
)
"""The kinds that change a checkpoint's weights; a request lists them as ``loras``.

Keys: the kinds of files, and the formula name ``diff`` (a ``full_difference`` file is computed with it). The value is
None for built-in kinds, else the package's :class:`AdapterKind`.
"""


def package_kinds() -> Iterator[tuple[str, AdapterKind]]:
    """Yield (name, kind) of what the installed packages add."""
    yield from ((name, kind) for name, kind in WEIGHT_ADAPTER_KINDS.usable() if kind is not None)


def rules() -> list[KindRule]:
    """Return the rules that recognise files of the added kinds."""
    return [
        rule(
            name,
            None,
            f"the names of {WEIGHT_ADAPTER_KINDS.package(name)}",
            f".*({'|'.join(map(re.escape, kind.suffixes))})$",
        )
        for name, kind in package_kinds()
    ]


def split_package_tensor_name(name: str) -> tuple[str, str] | None:
    """Split the name of a tensor into (module, slot). Return None for other tensors.

    The slot is ``kind/role``, with the tensor's role in the formula of the kind.
    """
    for kind_name, kind in package_kinds():
        for suffix, role in kind.suffixes.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix), f"{kind_name}/{role}"
    return None


def shapes_match(kind_name: str, shapes: Mapping[str, Shape], weight: Shape) -> bool:
    """Return whether tensors of an added kind can change a weight. Raises ExtensionError if the package fails."""
    kind = WEIGHT_ADAPTER_KINDS[kind_name]
    assert kind is not None
    try:
        return bool(kind.fits(shapes, weight))
    except Exception as error:
        raise extensions(GROUP).error(kind_name, error) from error
