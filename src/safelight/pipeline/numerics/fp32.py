"""Reads and writes exactly the precision in which torch computes fp32 products and convolutions.

Torch has an old and a new interface to this state. Each stores its own values, and the old interface's getters raise if
the two disagree. This module calls torch's own functions only, because the property of ``torch.backends.mkldnn`` writes
to the wrong place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_C: Any = torch._C

Key = tuple[str, str]

_TOP: Key = ("generic", "all")
_BACKENDS: tuple[Key, ...] = (("mkldnn", "all"), ("cuda", "all"))
_MATMULS: tuple[Key, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
_CUDNN: tuple[Key, ...] = (("cuda", "conv"), ("cuda", "rnn"))
_OPS: tuple[Key, ...] = (*_MATMULS, *_CUDNN, ("mkldnn", "conv"), ("mkldnn", "rnn"))


@dataclass(frozen=True, slots=True)
class Fp32:
    """All of torch's ``fp32_precision`` settings (ieee, tf32, bf16).

    ``stored``: the nine stored values of the new interface. A value is "none" (the parent's value holds), "ieee",
    "tf32" or "bf16". In torch 2.13 the two values of cuDNN may also have an initial state that no setter can restore.
    It is recorded here as "default". It means tf32 unless a parent is set.
    ``matmul``, ``cudnn``: the two values of the old interface. The new interface's setters do not change them. Their
    getters raise if the two interfaces disagree.
    """

    stored: Mapping[Key, str]
    matmul: str
    cudnn: bool


class Fp32Access:
    """Reads and writes :class:`Fp32`.

    Torch's getters return the effective value, not the stored one. Therefore :meth:`read` sets the parent to "ieee" and
    then to "tf32": if the child's effective value changes too, it is inherited; if not, it is the stored one. Then
    :meth:`read` restores the parent.
    """

    @staticmethod
    def _stored_values(keys: tuple[Key, ...], parents: tuple[Key, ...]) -> dict[Key, str]:
        """Return the stored value of each key, "none" if it is inherited. The caller restores the ``parents``."""
        seen: list[list[str]] = []
        for value in ("ieee", "tf32"):
            for parent in parents:
                _C._set_fp32_precision_setter(*parent, value)
            seen.append([_C._get_fp32_precision_getter(*key) for key in keys])
        return {key: first if first == second else "none" for key, first, second in zip(keys, *seen, strict=True)}

    @classmethod
    def _stored(cls) -> dict[Key, str]:
        stored: dict[Key, str] = {_TOP: _C._get_fp32_precision_getter(*_TOP)}
        try:
            stored |= cls._stored_values(_BACKENDS, (_TOP,))
            stored |= cls._stored_values(_OPS, _BACKENDS)
            for parent in (_TOP, *_BACKENDS):
                _C._set_fp32_precision_setter(*parent, "none")
            for key in _CUDNN:
                if stored[key] == "none" and _C._get_fp32_precision_getter(*key) != "none":
                    stored[key] = "default"
        finally:
            for key in (_TOP, *_BACKENDS):
                if key in stored:
                    _C._set_fp32_precision_setter(*key, stored[key])
        return stored

    @classmethod
    def read(cls) -> Fp32:
        stored = cls._stored()
        touched = [*_MATMULS, *(() if _pristine(stored) else _CUDNN)]
        try:
            for key in _MATMULS:
                _C._set_fp32_precision_setter(*key, "ieee")
            matmul: str = _C._get_float32_matmul_precision()
            # If cuDNN's values are still "default", the old setter was never called, so its value is torch's initial
            # one, True.
            cudnn = True
            if not _pristine(stored):
                for key in _CUDNN:
                    _C._set_fp32_precision_setter(*key, "tf32")
                try:
                    cudnn = _C._get_cudnn_allow_tf32()
                except RuntimeError:
                    cudnn = False
        finally:
            for key in touched:
                _C._set_fp32_precision_setter(*key, stored[key])
        return Fp32(stored, matmul, cudnn)

    @classmethod
    def write(cls, value: Fp32) -> None:
        now = cls._stored()
        # The old setters come first, because they also write values of the new interface.
        _C._set_float32_matmul_precision(value.matmul)
        if not _pristine(now):
            _C._set_cudnn_allow_tf32(value.cudnn)
        inherits = any(value.stored[key] != "none" for key in (_TOP, ("cuda", "all")))
        for key, stored in value.stored.items():
            if stored != "default":
                _C._set_fp32_precision_setter(*key, stored)
            elif now[key] != "default":
                # A library called the old setter during the job. "default" cannot be written, so restore what it meant.
                _C._set_fp32_precision_setter(*key, "none" if inherits else "tf32")


def _pristine(stored: Mapping[Key, str]) -> bool:
    """Return whether a value of cuDNN is "default". The old setter would overwrite it, and must not be called then."""
    return any(stored[key] == "default" for key in _CUDNN)


def full_fp32(found: Fp32) -> Fp32:
    """Return the state with full fp32: "ieee" everywhere. A "default" stays, because it follows its parent, "ieee".

    During the job the old matmul getter returns "highest", and cuBLAS's ``allow_tf32`` is False.

    ``cudnn`` is False, unless a cuDNN value is still "default". The old setter must not be called then. So ``cudnn`` is
    True (torch's initial value), :meth:`Fp32Access.write` does not write it, and torch's ``allow_tf32`` getter for
    cuDNN raises during the job.
    """
    stored = {key: "default" if value == "default" else "ieee" for key, value in found.stored.items()}
    return Fp32(stored, "highest", cudnn=_pristine(stored))


def fp32_in_force() -> str | dict[str, str]:
    """Return the effective precision of each kind of operation, or a single value if all are equal."""
    values = {".".join(key): str(_C._get_fp32_precision_getter(*key)) for key in _OPS}
    return next(iter(values.values())) if len(set(values.values())) == 1 else values
