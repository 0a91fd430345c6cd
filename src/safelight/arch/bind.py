"""Binding: a skeleton and weights make a model for as long as a context lasts, and nothing of it survives."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import structlog
import torch
from torch import nn

from safelight.arch.skeleton import SkeletonCache, SkeletonKey
from safelight.devices.pool import ALIGNMENT
from safelight.errors import BindingError
from safelight.weights.store import WeightSet

_log = structlog.get_logger(__name__)


@contextlib.contextmanager
def bound(cache: SkeletonCache, key: SkeletonKey, weights: WeightSet) -> Generator[nn.Module]:
    """The module of ``key`` with ``weights`` as its parameters.

    When the context ends, by whatever way, the module's parameters are absent again and the Parameters that were handed
    out are emptied: a reference to a module, to a pipeline, or to a traceback's frame that is kept somewhere holds no
    byte of the weights. Raises BindingError when the weights are not exactly the tensors of the skeleton, or
    do not start at aligned addresses, on which fp32 results depend.
    """
    skeleton = cache.take(key)
    handed: list[nn.Parameter] = []
    version = weights.slab.base._version
    try:
        if skeleton.places.keys() != weights.tensors.keys():
            odd = sorted(skeleton.places.keys() ^ weights.tensors.keys())
            raise BindingError(f"weights do not fit the {key.role}: {', '.join(odd[:5])}")
        for name, (child, attribute) in skeleton.places.items():
            tensor = weights.tensors[name]
            if tensor.shape != skeleton.shapes[name] or tensor.dtype != key.dtype:
                raise BindingError(f"weights do not fit the {key.role}: {name} is {list(tensor.shape)} {tensor.dtype}")
            if tensor.data_ptr() % ALIGNMENT:
                raise BindingError(f"{key.role}: {name} does not start at a multiple of {ALIGNMENT} bytes")
            parameter = nn.Parameter(tensor, requires_grad=False)
            handed.append(parameter)
            child._parameters[attribute] = parameter
        yield skeleton.module
    finally:
        skeleton.clear()
        for parameter in handed:
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        handed.clear()
        if weights.slab.base._version != version:
            _log.warning("bound weights were written, and are read again", role=key.role, digest=weights.digest)
            weights.spoiled = True
        cache.give(skeleton)
