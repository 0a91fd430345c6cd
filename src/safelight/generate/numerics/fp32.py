"""What torch computes fp32 products and convolutions in: all that it keeps of it, read and written exactly.

Torch has an old and a new interface to this state; their values are kept apart, and the old one's getters raise where
the two disagree. Only torch's own functions are called: the property of ``torch.backends.mkldnn`` writes to the wrong
place.
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
    """All that torch keeps on fp32's inner precision: nine values of the new interface as they are stored, and the two
    of the old one, which the new one's setters do not touch and whose getters raise where the two disagree.

    Stored is "none" (the parent's value holds), "ieee", "tf32", "bf16", or, at cuDNN's two in torch 2.13, a value that
    cannot be written, here "default": tf32 unless a parent says otherwise.
    """

    stored: Mapping[Key, str]
    matmul: str
    cudnn: bool


class Fp32Access:
    """Reads and writes :class:`Fp32`. torch's getters give what holds, not what is stored: a value that follows its
    parent about is inherited, one that stays is its own. So reading writes for a moment, and puts back.
    """

    @staticmethod
    def _own(keys: tuple[Key, ...], parents: tuple[Key, ...]) -> dict[Key, str]:
        seen: list[list[str]] = []
        for value in ("ieee", "tf32"):
            for parent in parents:
                _C._set_fp32_precision_setter(*parent, value)
            seen.append([_C._get_fp32_precision_getter(*key) for key in keys])
        return {key: one if one == two else "none" for key, one, two in zip(keys, *seen, strict=True)}

    @classmethod
    def _stored(cls) -> dict[Key, str]:
        stored: dict[Key, str] = {_TOP: _C._get_fp32_precision_getter(*_TOP)}
        try:
            stored |= cls._own(_BACKENDS, (_TOP,))
            stored |= cls._own(_OPS, _BACKENDS)
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
            cudnn = True  # The old setter would have overwritten the value that cannot be written.
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
        # The old setters first: they write new values too.
        _C._set_float32_matmul_precision(value.matmul)
        if not _pristine(now):
            _C._set_cudnn_allow_tf32(value.cudnn)
        inherits = any(value.stored[key] != "none" for key in (_TOP, ("cuda", "all")))
        for key, stored in value.stored.items():
            if stored != "default":
                _C._set_fp32_precision_setter(*key, stored)
            elif now[key] != "default":
                # A library within has used the old setter. What held is put back.
                _C._set_fp32_precision_setter(*key, "none" if inherits else "tf32")


def _pristine(stored: Mapping[Key, str]) -> bool:
    """Whether a value that cannot be written again is among cuDNN's: the old setter must not be called then."""
    return any(stored[key] == "default" for key in _CUDNN)


def full_fp32(found: Fp32) -> Fp32:
    """ "ieee" everywhere; where "default" is, it is left, and follows its parent, which is "ieee".

    Old getters read within: "highest", and False for cuBLAS; that for cuDNN reads False, or raises where "default" is.
    """
    stored = {key: "default" if value == "default" else "ieee" for key, value in found.stored.items()}
    return Fp32(stored, "highest", cudnn=_pristine(stored))


def fp32_in_force() -> str | dict[str, str]:
    """What holds for each kind of operation: one word where it is one for all."""
    held = {".".join(key): str(_C._get_fp32_precision_getter(*key)) for key in _OPS}
    return next(iter(held.values())) if len(set(held.values())) == 1 else held
