"""All settings of the numeric state of torch 2.13 and of the libraries beside it, with the value that a job needs."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from safelight.pipeline.numerics import attention_order
from safelight.pipeline.numerics.fp32 import Fp32Access, full_fp32
from safelight.pipeline.numerics.setting import NumericSetting

_C: Any = torch._C

AUTOCAST = {
    "cpu": torch.bfloat16,
    "cuda": torch.float16,
    "mps": torch.float16,
    "xpu": torch.float16,
    "hpu": torch.bfloat16,
    "xla": torch.bfloat16,
    "mtia": torch.float16,
    "maia": torch.bfloat16,
    "ipu": torch.float16,
    "privateuseone": torch.float16,
}
"""Every kind of device that autocast supports, with torch's default dtype."""


def flushes_denormals() -> bool:
    """Return whether this thread flushes denormals.

    Computes with numpy, because torch's arithmetic depends on what the host has set elsewhere.
    """
    return bool(np.float32(1e-39) * np.float32(1.0) == 0)


def flushed_share(threads: int) -> float:
    """Return the fraction (0 to 1) of a large operation's elements that are flushed.

    Torch's worker threads keep the flag that was set when they started.
    """
    small = torch.full((threads * (1 << 16),), 1e-39, dtype=torch.float32, device="cpu")
    # Counts bits and not values, because a comparison of values flushes too.
    unflushed = np.count_nonzero((small * 1.0).numpy().view(np.int32))
    return round(1 - unflushed / small.numel(), 3)


def _c(name: str, wanted: object, read: str, write: str, *, required: bool = False) -> NumericSetting:
    """Create a setting from two of torch's own functions. A tuple holds the setter's arguments."""
    lacks = tuple(f"torch._C.{function}" for function in (read, write) if not hasattr(_C, function))
    get, put = getattr(_C, read, None), getattr(_C, write, None)

    def setter(value: Any) -> None:
        assert put is not None
        put(*value) if isinstance(value, tuple) else put(value)

    return NumericSetting(name, get or (lambda: None), setter, wanted, lacks, required)


def _reduction(found: object) -> object:
    """Return torch's default, which allows the reduction. From torch 2.10 the value also has a flag for split-k."""
    return (True, True) if isinstance(found, tuple) else True


def _default_blas(_found: object) -> object:
    """Return the backend that torch's "default" selects on this machine. Torch's getter never returns "default"."""
    return _C._get_blas_default_backend()


def _cuda_only(name: str, wanted: object, read: str, write: str) -> list[NumericSetting]:
    """Create a setting, but none on a build without CUDA, which does not have this state."""
    return [_c(name, wanted, read, write)] if torch.backends.cuda.is_built() else []


def _deterministic() -> tuple[bool, bool]:
    return _C._get_deterministic_algorithms(), _C._get_deterministic_algorithms_warn_only()


def _default_tensor_device(kind: str) -> None:
    where: Any = torch if kind == "cpu" else getattr(torch, kind)
    _C._set_default_tensor_type(where.FloatTensor)


def _autocast() -> list[NumericSetting]:
    settings = [
        NumericSetting("autocast.cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, wanted=True)
    ]
    for kind, dtype in AUTOCAST.items():
        if not _C._is_autocast_available(kind):
            continue

        def is_on(kind: str = kind) -> bool:
            return torch.is_autocast_enabled(kind)

        def turn(on: bool, kind: str = kind) -> None:
            torch.set_autocast_enabled(kind, on)

        def dtype_of(kind: str = kind) -> torch.dtype:
            return torch.get_autocast_dtype(kind)

        def give(to: torch.dtype, kind: str = kind) -> None:
            torch.set_autocast_dtype(kind, to)

        settings += [NumericSetting(f"autocast.{kind}", is_on, turn, wanted=False)]
        settings += [NumericSetting(f"autocast.{kind}.dtype", dtype_of, give, dtype)]
    return settings


def _einsum() -> list[NumericSetting]:
    """Create the setting for the order of an einsum with three or more operands, which opt_einsum would change."""
    module: Any = torch.backends.opt_einsum

    def write(on: bool) -> None:
        # A value set on the module itself hides the value that the module's functions set.
        if "enabled" in vars(module):
            module.enabled = on
        else:
            module.m.enabled = on

    return [NumericSetting("opt_einsum", lambda: bool(module.enabled), write, wanted=False)]


def _flash_implementation() -> list[NumericSetting]:
    attention: Any = torch.nn.attention
    names = ("current_flash_attention_impl", "activate_flash_attention_impl", "restore_flash_attention_impl")
    lacks = tuple(f"torch.nn.attention.{name}" for name in names if not hasattr(attention, name))

    def write(implementation: str | None) -> None:
        if implementation is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(implementation)

    return [NumericSetting("sdp.flash.implementation", getattr(attention, names[0], lambda: None), write, None, lacks)]


def _opencv() -> list[NumericSetting]:
    """Create a setting only if the calling program has imported cv2. Otherwise cv2 starts with the right value."""
    cv2: Any = sys.modules.get("cv2")
    return (
        [] if cv2 is None else [NumericSetting("opencv.optimized", cv2.useOptimized, cv2.setUseOptimized, wanted=True)]
    )


def numeric_settings(threads: int, device: torch.device | None = None) -> list[NumericSetting]:
    """Return all settings of this torch, in the order in which a job sets them.

    ``device``: where the job computes; None for the CPU.

    The default tensor type comes after the default dtype, because setting the type also sets the dtype. It is restored
    first.
    """
    backends: Any = torch.backends
    return [
        NumericSetting("threads", torch.get_num_threads, torch.set_num_threads, threads, required=True),
        NumericSetting("default_dtype", torch.get_default_dtype, torch.set_default_dtype, torch.float32, required=True),
        NumericSetting("default_tensor_device", _C._get_default_device, _default_tensor_device, "cpu"),
        NumericSetting("flush_denormal", flushes_denormals, torch.set_flush_denormal, wanted=False, required=True),
        NumericSetting(
            "fp32_precision",
            Fp32Access.read,
            Fp32Access.write,
            full_fp32,
            tuple(
                f"torch._C.{function}"
                for function in (
                    "_get_fp32_precision_getter",
                    "_set_fp32_precision_setter",
                    "_get_float32_matmul_precision",
                )
                if not hasattr(_C, function)
            ),
            required=True,
        ),
        *(
            # A torch built without Intel GPUs returns None and does not have this state.
            [_c("onednn.allow_tf32", False, "_get_onednn_allow_tf32", "_set_onednn_allow_tf32")]
            if getattr(_C, "_get_onednn_allow_tf32", lambda: None)() is not None
            else []
        ),
        _c(
            "cublas.fp16_reduction",
            _reduction,
            "_get_cublas_allow_fp16_reduced_precision_reduction",
            "_set_cublas_allow_fp16_reduced_precision_reduction",
        ),
        _c(
            "cublas.bf16_reduction",
            _reduction,
            "_get_cublas_allow_bf16_reduced_precision_reduction",
            "_set_cublas_allow_bf16_reduced_precision_reduction",
        ),
        _c(
            "cublas.fp16_accumulation",
            False,
            "_get_cublas_allow_fp16_accumulation",
            "_set_cublas_allow_fp16_accumulation",
        ),
        _c(
            "cpu.fp16_reduction",
            False,
            "_get_cpu_allow_fp16_reduced_precision_reduction",
            "_set_cpu_allow_fp16_reduced_precision_reduction",
        ),
        _c("cuda.sm_carveout", None, "_get_sm_carveout_experimental", "_set_sm_carveout_experimental"),
        NumericSetting(
            "blas",
            _C._get_blas_preferred_backend,
            _C._set_blas_preferred_backend,
            _default_blas,
            tuple(f"torch._C.{one}" for one in ("_get_blas_default_backend",) if not hasattr(_C, one)),
        ),
        _c("linalg", _C._LinalgBackend.Default, "_get_linalg_preferred_backend", "_set_linalg_preferred_backend"),
        _c("rocm_fa", _C._ROCmFABackend.Default, "_get_rocm_fa_preferred_backend", "_set_rocm_fa_preferred_backend"),
        *_cuda_only("cublas.tunable", False, "_cuda_tunableop_is_enabled", "_cuda_tunableop_enable"),
        _c("cudnn.enabled", True, "_get_cudnn_enabled", "_set_cudnn_enabled"),
        _c("cudnn.benchmark", False, "_get_cudnn_benchmark", "_set_cudnn_benchmark", required=True),
        _c("cudnn.deterministic", False, "_get_cudnn_deterministic", "_set_cudnn_deterministic"),
        _c("cudnn.depthwise_kernel", "auto", "_get_cudnn_depthwise_kernel", "_set_cudnn_depthwise_kernel"),
        _c("miopen.immediate", False, "_get_miopen_immediate", "_set_miopen_immediate"),
        _c("mkldnn.enabled", True, "_get_mkldnn_enabled", "_set_mkldnn_enabled", required=True),
        _c("mkldnn.deterministic", False, "_get_mkldnn_deterministic", "_set_mkldnn_deterministic"),
        _c("nnpack", True, "_get_nnpack_enabled", "_set_nnpack_enabled"),
        _c("sdp.flash", True, "_get_flash_sdp_enabled", "_set_sdp_use_flash"),
        _c("sdp.mem_efficient", True, "_get_mem_efficient_sdp_enabled", "_set_sdp_use_mem_efficient"),
        _c("sdp.math", True, "_get_math_sdp_enabled", "_set_sdp_use_math"),
        _c("sdp.cudnn", True, "_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn"),
        _c("sdp.overrideable", True, "_get_overrideable_sdp_enabled", "_set_sdp_use_overrideable"),
        _c("sdp.fa3", False, "_get_fa3_sdp_enabled", "_set_sdp_use_fa3"),
        replace(
            _c("sdp.order", attention_order.wanted(device), "_get_sdp_priority_order", "_set_sdp_priority_order"),
            read=partial(attention_order.read, device),
        ),
        _c(
            "sdp.math.reduction",
            False,
            "_get_math_sdp_allow_fp16_bf16_reduction",
            "_set_math_sdp_allow_fp16_bf16_reduction",
        ),
        *_flash_implementation(),
        NumericSetting(
            "mha.fastpath", backends.mha.get_fastpath_enabled, backends.mha.set_fastpath_enabled, wanted=True
        ),
        NumericSetting(
            "deterministic",
            _deterministic,
            lambda value: _C._set_deterministic_algorithms(value[0], warn_only=value[1]),
            (False, False),
            required=True,
        ),
        _c(
            "deterministic.fill",
            True,
            "_get_deterministic_fill_uninitialized_memory",
            "_set_deterministic_fill_uninitialized_memory",
        ),
        *_einsum(),
        *_autocast(),
        *_opencv(),
        NumericSetting(
            "numpy.errors",
            np.geterr,
            lambda value: np.seterr(**value),
            {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
        ),
    ]
