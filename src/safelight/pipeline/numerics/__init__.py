"""Sets the process-wide state that can change a computed number for a job, and restores it afterwards.

This state consists of settings (:mod:`.table`). Each has a name, a getter, a setter, and the value that a job needs. A
job sets them in order and restores them in reverse order. It does not write a setting that already has the right value,
because some of torch's setters cannot be undone (:mod:`.fp32`).

This package calls torch's own functions and not the properties of ``torch.backends``, because these raise after the
host program has called ``torch.backends.disable_global_flags()``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from safelight.logs import Log
from safelight.pipeline.numerics.fp32 import fp32_in_force
from safelight.pipeline.numerics.modes import no_modes, seeded
from safelight.pipeline.numerics.setting import NumericSetting
from safelight.pipeline.numerics.table import flushed_share, numeric_settings

_log = Log(__name__)

_C: Any = torch._C

_one_at_a_time = threading.RLock()
"""The state belongs to the process, so two engines in one process wait for each other."""

STATE_VERSION = 2
"""Recorded with each image. It increases when a setting's value changes, or when a setting is added or removed."""


@dataclass(slots=True)
class _JobState:
    settings: list[NumericSetting] = field(default_factory=list[NumericSetting])
    not_set: list[str] = field(default_factory=list[str])
    threads: int = 1


_job_states: list[_JobState] = []
"""The states of the running jobs. A job may run inside another one, and the innermost is last.

Protected by the lock.
"""


@contextlib.contextmanager
def fixed(threads: int, seed: int, device: torch.device | None = None) -> Generator[None]:
    """Set the numeric state for a job, and restore the previous state afterwards.

    ``threads``: number of threads.
    ``seed``: seed of all global random generators, also of those of devices in use, so that libraries which draw from
    them repeat their numbers.
    ``device``: where the job computes; None for the CPU.

    Within the context every setting of :func:`.table.numeric_settings` has its value. The caller's torch modes,
    autocast and gradients are off.
    Raises RuntimeError, with the name, if this torch lacks a function that a job needs.
    """
    with _one_at_a_time, contextlib.ExitStack() as stack:
        stack.enter_context(no_modes())
        job_state = _JobState(threads=threads)
        _job_states.append(job_state)
        stack.callback(_job_states.pop)
        for setting in numeric_settings(threads, device):
            if setting.lacks:
                if setting.required:
                    raise RuntimeError(f"numerics: torch {torch.__version__} has no {', '.join(setting.lacks)}")
                job_state.not_set.append(setting.name)
                _warn_once(setting)
                continue
            found = setting.read()
            stack.callback(setting.put, found)
            setting.put(setting.wanted_value(found))
            job_state.settings.append(setting)
        stack.enter_context(seeded(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


_warned: set[str] = set()


def _warn_once(setting: NumericSetting) -> None:
    if setting.name not in _warned:
        _warned.add(setting.name)
        _log.warning("torch lacks a setting", torch=torch.__version__, lacks=setting.lacks, setting=setting.name)


_ENVIRONMENT = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DISABLE_FAST_MM", "MKL_DYNAMIC",
    "OMP_DYNAMIC", "OMP_THREAD_LIMIT",
    "OPENBLAS_CORETYPE", "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE", "TORCH_LINEAR_FLATTEN_3D",
    "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
    "DISABLE_ADDMM_CUDA_LT", "TORCH_CUDNN_V8_API_DISABLED", "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "PYTORCH_TUNABLEOP_ENABLED", "PYTORCH_MPS_FAST_MATH", "PYTORCH_MPS_PREFER_METAL", "PYTORCH_ENABLE_MPS_FALLBACK",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_CUDNN_SDPA_PREFERRED",
    "PYTORCH_MIOPEN_SUGGEST_NHWC", "ROCM_ALLOW_GROUP_GEMM_CK", "TORCH_ROCM_FA_PREFER_CK",
)  # fmt: skip
"""Variables that libraries read at their start. The process can no longer set them, so it records them."""

_KERNELS = ("error", "math", "flash", "mem_efficient", "cudnn", "overrideable")


def record() -> dict[str, Any]:
    """Return the present numeric state as JSON values, for an image's metadata. Call it within :func:`fixed`.

    ``differs``: settings that do not have the value that a job needs; usually empty.
    ``not_set``: settings that this torch lacks; usually empty.
    """
    job_state = _job_states[-1]
    differs: dict[str, Any] = {}
    for setting in job_state.settings:
        now = setting.read()
        if now != setting.wanted_value(now):
            differs[setting.name] = str(now)
    if job_state.threads > 1 and (share := flushed_share(job_state.threads)):
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
        "not_set": sorted(job_state.not_set),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
