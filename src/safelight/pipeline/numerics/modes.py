"""Shields a job from the host program's torch modes and global random generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch.utils import _device as torch_device

_C: Any = torch._C


@contextlib.contextmanager
def no_modes() -> Generator[None]:
    """Switch off the host's torch modes: default devices (set by any means), function modes and dispatch modes.

    Afterwards the same mode objects are active again, in the same order.
    """
    context: Any = torch._GLOBAL_DEVICE_CONTEXT
    default = getattr(context, "device_context", None)
    current = torch_device.CURRENT_DEVICE
    state = _C._get_torch_function_state()
    functions = [_C._pop_torch_function_stack() for _ in range(_C._len_torch_function_stack())]
    dispatches: list[Any] = []
    if _C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _pop_mode

        dispatches = [_pop_mode() for _ in range(_C._len_torch_dispatch_stack())]
    try:
        _set_default_device(context, None)
        torch_device.CURRENT_DEVICE = None
        _C._set_torch_function_state(_C._TorchFunctionState.ENABLED)
        yield
    finally:
        # Remove modes that a library left during the job. They do not belong to the host.
        for _ in range(_C._len_torch_function_stack()):
            _C._pop_torch_function_stack()
        for mode in reversed(functions):
            _C._push_on_torch_function_stack(mode)
        if dispatches:
            from torch.utils._python_dispatch import _push_mode

            for mode in reversed(dispatches):
                _push_mode(mode)
        _set_default_device(context, default)
        torch_device.CURRENT_DEVICE = current
        _C._set_torch_function_state(state)


def _set_default_device(context: Any, default: Any) -> None:
    """Set torch's default device of this thread. ``default``: torch's context object, None for no default device."""
    if default is not None:
        context.device_context = default
    elif hasattr(context, "device_context"):
        # With the value None, torch.get_default_device() of torch 2.9 raises AttributeError.
        del context.device_context


def _states_of_devices() -> list[tuple[torch.Generator, torch.Tensor]]:
    """Return the global random generators of the devices in use, with their states."""
    generators: list[torch.Generator] = []
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    if torch.backends.mps.is_available():
        generators.append(torch.mps._get_default_mps_generator())
    xpu: Any = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_initialized():
        generators += xpu.default_generators
    return [(generator, generator.get_state()) for generator in generators]


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed every global random generator, and restore their states afterwards.

    numpy's global generator is an MT19937 within the context, even if the host installed another one.
    """
    numpy: Any = np.random  # Its stubs lack two of its functions.
    bits = numpy.get_bit_generator()
    states = (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())
    on_devices = _states_of_devices()
    try:
        random.seed(seed)
        if type(bits) is not np.random.MT19937:
            numpy.set_bit_generator(np.random.MT19937())
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for generator, _ in on_devices:
            generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        if numpy.get_bit_generator() is not bits:
            numpy.set_bit_generator(bits)
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for generator, state in on_devices:
            generator.set_state(state)
