"""Splits what a folder has into checkpoints and adapters, and reads the option ``--variant``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from safelight.catalog.found import Found


def split_adapters(found: Iterable[Found]) -> tuple[list[Found], list[Found]]:
    """Split what a folder has into checkpoints and adapters: text encoders, VAEs, LoRAs, ControlNets and so on.

    What cannot be read counts as a checkpoint: adding it says why. So does a path that the user named.
    """
    from safelight.catalog.identify import identify
    from safelight.errors import InputError
    from safelight.weights.adapter_file import is_adapter

    checkpoints: list[Found] = []
    adapters: list[Found] = []
    for one in found:
        kind = ""
        if one.within and one.path.is_file():
            try:
                kind = identify(one.path).kind
            except InputError:
                kind = ""
        (adapters if is_adapter(kind) else checkpoints).append(one)
    return checkpoints, adapters


@dataclass(frozen=True, slots=True)
class GivenVariant:
    """A variant that the user named. ``family``: "" for every family that has it."""

    family: str
    variant: str


def read_variants(given: Iterable[str]) -> list[GivenVariant]:
    """Read the values of ``--variant``: VARIANT, or FAMILY=VARIANT. Raises InputError for a family without it."""
    from safelight.errors import InputError
    from safelight.families.registry import families

    read: list[GivenVariant] = []
    for text in given:
        before, equals, after = text.partition("=")
        if equals and before not in families():
            raise InputError(f"--variant {text}: no family {before!r}; there are {', '.join(sorted(families()))}")
        if equals and after not in families()[before].variants:
            able = ", ".join(families()[before].variants)
            raise InputError(f"--variant {text}: the variants of {before} are {able}")
        read.append(GivenVariant(before, after) if equals else GivenVariant("", before))
    return read


def choose_variant(candidate: Found, given: Iterable[GivenVariant]) -> str:
    """Return which of the given variants a checkpoint gets; "" for the file's own.

    In a folder, only a file that does not say its variant gets one that its family has. A path that the user named gets
    the one for its family, whatever the file says.
    Raises InputError if several fit, and FileError.
    """
    from safelight.catalog.identify import identify
    from safelight.errors import InputError
    from safelight.families.registry import families

    given = list(given)
    if not given:
        return ""
    found = identify(candidate.path)
    if found.layout is None or found.base is None or (candidate.within and found.variant is not None):
        return ""
    own = [one.variant for one in given if one.family == found.base]
    plain = [one.variant for one in given if not one.family]
    if candidate.within:
        plain = [variant for variant in plain if variant in families()[found.base].variants]
    fitting = list(dict.fromkeys(own or plain))
    if len(fitting) > 1:
        ways = " or ".join(f"--variant {found.base}={variant}" for variant in fitting)
        raise InputError(f"{candidate.path}: is {found.base}, for which several variants were given; write {ways}")
    return fitting[0] if fitting else ""
