"""The process-wide state that can change a number, set for a job and put back after it.

Every piece of it is a row (:mod:`.table`): a name, how it is read, how it is written, what a job wants. A job enters
the rows in order and leaves them in the other order; what already is as wanted is not written at all, since some of
torch's setters cannot be undone (:mod:`.fp32`). Only torch's own functions are called, not the properties of
``torch.backends``: those refuse once a host has called ``torch.backends.disable_global_flags()``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch

from safelight.generate.numerics.fp32 import fp32_in_force
from safelight.generate.numerics.modes import no_modes, seeded
from safelight.generate.numerics.row import Row
from safelight.generate.numerics.table import flushing, rows

_log = structlog.get_logger(__name__)

_C: Any = torch._C

_one_at_a_time = threading.RLock()
"""This state belongs to the process: two engines in it wait for each other."""

STATE_VERSION = 1
"""Counted up whenever a row's wanted value changes, or a row comes or goes; recorded."""


@dataclass(slots=True)
class _Held:
    rows: list[Row] = field(default_factory=list[Row])
    not_set: list[str] = field(default_factory=list[str])
    threads: int = 1


_held: list[_Held] = []
"""Of the job under way, innermost last; under the lock."""


@contextlib.contextmanager
def fixed(threads: int, seed: int) -> Generator[None]:
    """Within: ``threads`` threads and what :func:`rows` wants, no mode and no autocast of the host's, no gradients, and
    every global random generator, those of devices in use too, seeded with ``seed``, so that what a library draws
    from them repeats. After: all as before. Raises RuntimeError, by name, where this torch lacks what a job needs.
    """
    with _one_at_a_time, contextlib.ExitStack() as stack:
        stack.enter_context(no_modes())
        held = _Held(threads=threads)
        _held.append(held)
        stack.callback(_held.pop)
        for row in rows(threads):
            if row.lacks:
                if row.required:
                    raise RuntimeError(f"numerics: torch {torch.__version__} has no {', '.join(row.lacks)}")
                held.not_set.append(row.name)
                _say_once(row)
                continue
            found = row.read()
            stack.callback(row.put, found)
            row.put(row.aim(found))
            held.rows.append(row)
        stack.enter_context(seeded(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


_said: set[str] = set()


def _say_once(row: Row) -> None:
    if row.name not in _said:
        _said.add(row.name)
        _log.warning("torch lacks a setting; it stays", torch=torch.__version__, lacks=row.lacks, setting=row.name)


_ENVIRONMENT = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DISABLE_FAST_MM", "MKL_DYNAMIC",
    "OPENBLAS_CORETYPE", "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE", "TORCH_LINEAR_FLATTEN_3D",
    "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
    "DISABLE_ADDMM_CUDA_LT", "TORCH_CUDNN_V8_API_DISABLED", "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "PYTORCH_TUNABLEOP_ENABLED", "PYTORCH_MPS_FAST_MATH", "PYTORCH_MPS_PREFER_METAL", "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MIOPEN_SUGGEST_NHWC", "ROCM_ALLOW_GROUP_GEMM_CK", "TORCH_ROCM_FA_PREFER_CK",
)  # fmt: skip
"""Read by libraries as they start; a process cannot set them for itself any more, so they are recorded."""

_KERNELS = ("error", "math", "flash", "mem_efficient", "cudnn", "overrideable")


def record() -> dict[str, Any]:
    """To be called within :func:`fixed`: what holds there, as JSON has it, for an image's metadata.

    ``differs`` names what could not be had, ``not_set`` what this torch does not have: both are empty as a rule.
    """
    held = _held[-1]
    differs: dict[str, Any] = {}
    for row in held.rows:
        now = row.read()
        if now != row.aim(now):
            differs[row.name] = str(now)
    if held.threads > 1 and (share := flushing(held.threads)):
        differs["flush_denormal.workers"] = share
    return {
        "state": STATE_VERSION,
        "fp32": fp32_in_force(),
        "deterministic": bool(_C._get_deterministic_algorithms()),
        "blas": str(_C._get_blas_preferred_backend()).rpartition(".")[2].lower(),
        "attention": [
            name
            for kind in _C._get_sdp_priority_order()
            if getattr(_C, f"_get_{(name := _KERNELS[kind + 1])}_sdp_enabled")()
        ],
        "differs": differs,
        "not_set": sorted(held.not_set),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
