"""Imports diffusers and transformers without what Safelight does not use, which takes most of a start's time.

A few modules are not loaded when the libraries import them, but when something is first looked up in them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"
"""PyTorch's compiler. Safelight compiles no model: compiled code may round differently."""

STATISTICS = "scipy.stats"
"""Diffusers' schedulers need it for the beta schedule alone, which Safelight does not have."""

INTEGRATION = "scipy.integrate"
"""Diffusers' scheduler for the sampler ``lms`` computes its coefficients with it."""

OPTIMIZATION = "scipy.optimize"
"""Transformers imports a function of it for the training of object detection."""

UNUSED = ("accelerate", "peft")
"""Packages that diffusers and transformers import if they are installed. Safelight does not need them."""

_MARKERS = frozenset({"allow_in_graph", "assume_constant_result", "disable"})
"""Decorators by which the libraries tell the compiler how to treat a function."""


@contextmanager
def lean_imports() -> Generator[None]:
    """Within the context, imports do not load the modules above, nor torch's modules for several machines.

    For diffusers and transformers, the packages of ``UNUSED`` are not installed in this process: they ask once.

    After the context, the first lookup in the modules above loads them. Until then the compiler's decorators return
    their function as it is: nobody compiles it. For transformers, torch cannot use several machines in this process:
    it asks once.

    Call it only in Safelight's own processes: a host process may compile diffusers' models.
    """
    postponed = [
        module for module in map(_postpone, (COMPILER, STATISTICS, INTEGRATION, OPTIMIZATION)) if module is not None
    ]
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # pyright: ignore[reportCallIssue, reportArgumentType]
    has_distributed = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = has_distributed
        for name in hidden:
            sys.modules.pop(name, None)
        for module in postponed:
            module.may_load()


class _Postponed(ModuleType):
    """A module that is loaded when something is first looked up in it, or one of its submodules is imported, but not
    before :meth:`may_load` was called: the libraries import a submodule of the compiler, and
    ``importlib.util.LazyLoader`` would load all of it.
    """

    _may_load = False

    def may_load(self) -> None:
        # An import of a submodule looks ``__path__`` up, and so loads the module.
        vars(self).pop("__path__", None)
        self._may_load = True

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == COMPILER and name in _MARKERS:
            return _unchanged
        if self.__name__ == OPTIMIZATION and not self._may_load and not name.startswith("__"):
            return partial(_call, OPTIMIZATION, name)
        if not self._may_load or (name.startswith("__") and name != "__path__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} yet")
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        vars(self).pop("_may_load")
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)


def _postpone(name: str) -> _Postponed | None:
    """Put a postponed module in the place of a module; None if it is already imported, or is not there."""
    spec: ModuleSpec | None = None
    # The package may be missing: scipy comes with an extra.
    with suppress(ModuleNotFoundError):
        spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return None
    module = _Postponed(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__ = spec.parent
    if spec.submodule_search_locations is not None:
        module.__path__ = spec.submodule_search_locations
    sys.modules[name] = module
    return module


def _call(module: str, name: str, *arguments: object, **more: object) -> Any:
    """Call a function of a postponed module that was imported by its name."""
    return getattr(sys.modules[module], name)(*arguments, **more)


def _unchanged(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    """Return the function, or without one a decorator that does."""
    return _unchanged if function is None else function
