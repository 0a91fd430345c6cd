"""Wires the engine of this process from the settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from safelight.assembly import memory_report as report
from safelight.assembly.library import open_library
from safelight.assembly.programs import WORKER
from safelight.boundary import kernels
from safelight.catalog.inputs import Inputs
from safelight.catalog.model import Model
from safelight.devices import choice, machine, selftest
from safelight.devices.base import CountsPeak, Device, shares_host_memory
from safelight.devices.cpu import CPU
from safelight.devices.machine import MemoryLimit
from safelight.devices.transfer import STAGING_BYTES, Transfers
from safelight.devices.verification import Verification
from safelight.diagnostics.canary import Canaries, after_switch
from safelight.memory.account import BufferAccount
from safelight.memory.budget import HOST, Ledger
from safelight.memory.host_source import HostSource
from safelight.memory.limits import GB, HOST_RESERVE, BudgetUpdater, count_once
from safelight.memory.residency import Residency
from safelight.memory.source import FileSource
from safelight.memory.working_memory import MeasurePeak, WorkingMemoryEstimator, counted_peak, polled_peak
from safelight.models.attention import Kernels
from safelight.models.skeleton import SkeletonCache
from safelight.pipeline import numerics
from safelight.pipeline.conditioning import MAX_CACHE_BYTES, EmbeddingCache
from safelight.pipeline.preview import Previews
from safelight.pipeline.resources import TORCH_DTYPES, Resources, dtype_of
from safelight.request.run_settings import Precision, RunSettings
from safelight.settings import Settings
from safelight.version import VERSION
from safelight.workers.fresh_process import FreshProcesses
from safelight.workers.local_engine import LocalEngine

LIBRARIES = (
    *("torch", "diffusers", "transformers", "opencv-python-headless", "pillow", "numpy", "scipy", "torchsde"),
    *kernels.DISTRIBUTIONS.values(),
)
"""The packages that compute. Their versions are recorded with each image, if they are installed."""


def open_engine(settings: Settings, device: Device | None = None, previews: bool = False) -> LocalEngine:
    """Open an engine.

    device: by default the one that the settings name or, with ``auto``, the best one of this machine.
    previews: whether progress includes previews of unfinished images.
    """
    device = device or choice.device(settings.device)
    threads = settings.threads or os.cpu_count() or 1
    memory = _open_memory(settings, device, threads)
    decide = _RunDecisions(settings, device, threads).decide
    resources = Resources(
        device=device,
        residency=memory.tiers[-1],
        skeletons=SkeletonCache(account=BufferAccount(memory.ledger, memory.tiers[-1].place)),
        working_memory_estimator=WorkingMemoryEstimator(settings.root / "working_memory.json"),
        measure_peak=_peak_measure(memory.ledger, device),
        run_settings=decide("auto", None),
        verification=memory.verification,
        inputs=Inputs(settings.root),
        working_memory_override=_bytes(settings.device_working_mem_gb) if device.has_own_memory else None,
        embedding_cache=EmbeddingCache(MAX_CACHE_BYTES),
        previews=Previews() if previews else None,
    )
    engine = LocalEngine(open_library(settings), resources, decide, memory.describe, memory.tiers)
    if settings.canary == "switch":
        fresh_processes = FreshProcesses(WORKER, settings.model_copy(update={"canary": "off"}), engine.catalog)
        engine.on_switch = after_switch(
            Canaries(settings.root, fresh_processes.make_first_image), engine.image_repairer
        )
    return engine


@cache
def _version(package: str) -> str:
    """Return the version of an installed package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


class _RunDecisions:
    """What decides the run settings of a job: the settings and the hardware of this machine."""

    def __init__(self, settings: Settings, device: Device, threads: int) -> None:
        self._settings, self._device, self._threads = settings, device, threads
        self._versions = {"safelight": VERSION} | {name: found for name in LIBRARIES if (found := _version(name))}
        self._hardware = choice.hardware(device)
        self._kernels = Kernels(device, settings.root, self._as_in_a_job)

    def _as_in_a_job(self) -> AbstractContextManager[None]:
        """Return a context in which torch computes as in a job, but on no more threads than the process has now.

        The process that later forks for isolated images has one thread. With more, its forks would wait for ever.
        """
        return numerics.fixed(min(self._threads, torch.get_num_threads()), 0, self._device.torch)

    def decide(self, precision: Precision, model: Model | None) -> RunSettings:
        """Decide the run settings of a job. ``model``: None for the engine's initial ones, set before any job."""
        settings, device = self._settings, self._device
        wanted = precision if precision != "auto" else settings.precision
        dtype = choice.precision(wanted, device)
        # fp16 overflows in the VAEs of SDXL and of some other models. The VAE is small, so fp32 costs little.
        vae_dtype = "fp32" if dtype == "fp16" else dtype
        names = (model.name, model.base) if model is not None else ()
        kind = next((settings.attention_types[n] for n in names if n in settings.attention_types), None)
        slice_size = settings.attention_slice_size
        found = RunSettings(device.name, self._hardware, dtype, vae_dtype, "", self._threads, self._versions)
        computes_in = TORCH_DTYPES[dtype] if model is None else dtype_of(found, model.family, model.family.denoiser)
        attention = self._kernels.choose(kind or settings.attention_type, computes_in, slice_size)
        size = slice_size if attention == "sliced" else "auto"
        return replace(found, attention=attention, attention_slice_size=size)


@dataclass(frozen=True)
class _Memory:
    """The memory of an engine. ``tiers`` and ``updaters``: of the host, and then of the device if it has its own."""

    ledger: Ledger
    verification: Verification
    transfers: Transfers
    tiers: list[Residency]
    updaters: list[BudgetUpdater]

    def describe(self) -> Mapping[str, Any]:
        """Return the budgets and what they hold."""
        return report.memory(self.ledger, self.updaters, self.tiers, self.transfers, self.verification)


def _open_memory(settings: Settings, device: Device, threads: int) -> _Memory:
    """Open the tiers with their budgets, and charge the buffers."""
    ledger = Ledger({HOST: 0} | ({device.name: 0} if device.has_own_memory else {}))
    verification = Verification(settings.verify_transfers)
    host = _host_tier(settings, ledger, threads)
    updaters, tiers = [_host_budget_updater(ledger, host)], [host]
    host.planner.before_planning = updaters[0].update_budget
    stage_bytes = selftest.copy_test_result(device, settings.root).stage_bytes if device.has_own_memory else 0
    transfers = Transfers(device, verification, stage_bytes)
    if device.has_own_memory:
        updaters.append(_device_budget_updater(ledger, device))
        shared = shares_host_memory(device)
        # In shared memory, a copy for the host would take the room of the weights that are computed with.
        source = HostSource(host, transfers, settings.keep_ram_copy_of_weights and not shared, threads)
        if shared:
            count_once(*updaters)
        tiers.append(_device_tier(settings, ledger, device, source, updaters[1]))
    for updater in updaters:
        updater.update_budget()
    ledger.charge(
        HOST, threads * STAGING_BYTES, "readers", "buffers for reading files", stored=False, already_used=True
    )
    ledger.charge(HOST, transfers.staging_bytes, "transfers", "buffers for copies", stored=False, already_used=True)
    ledger.charge(HOST, MAX_CACHE_BYTES, "prompts", "cached text-encoder outputs", stored=False, already_used=True)
    return _Memory(ledger, verification, transfers, tiers, updaters)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * GB)


def _host_tier(settings: Settings, ledger: Ledger, threads: int) -> Residency:
    return Residency(
        CPU(),
        ledger,
        HOST,
        FileSource(threads, settings.root),
        partial=settings.enable_partial_loading,
        max_bytes=_bytes(settings.max_cache_ram_gb),
        log=settings.log_memory_usage,
    )


def _device_tier(
    settings: Settings, ledger: Ledger, device: Device, source: HostSource, updater: BudgetUpdater
) -> Residency:
    return Residency(
        device,
        ledger,
        device.name,
        source,
        partial=settings.enable_partial_loading,
        max_bytes=_bytes(settings.max_cache_vram_gb),
        before_planning=updater.update_budget,
        log=settings.log_memory_usage,
    )


def _host_budget_updater(ledger: Ledger, host: Residency) -> BudgetUpdater:
    at_start = machine.anonymous_bytes()

    def clamped_host_working_bytes() -> int:
        # Estimate of the working memory in use: growth of anonymous memory since the start, minus the stored weights.
        # At most the reserved bytes: growth beyond them belongs to the libraries.
        # It is negative while slabs are in the ledger but the operating system has not yet allocated their pages
        # (``pending_bytes``). At least ``-pending_bytes``: a lower value means that libraries freed memory, which the
        # system already reports as free.
        used = machine.anonymous_bytes() - at_start - ledger.stored(HOST)
        return max(-host.pending_bytes, min(used, ledger.reserved(HOST)))

    return BudgetUpdater(ledger, HOST, machine.tightest_limit, clamped_host_working_bytes, HOST_RESERVE)


def _device_budget_updater(ledger: Ledger, device: Device) -> BudgetUpdater:
    def read_available() -> MemoryLimit:
        return MemoryLimit(device.available(), f"the memory of {device.name}")

    read_working = _working_bytes_reader(ledger, device)

    def clamped_working_bytes() -> int:
        # Memory beyond the reserved bytes belongs to other users of torch in this process.
        return min(read_working() or 0, ledger.reserved(device.name))

    return BudgetUpdater(ledger, device.name, read_available, clamped_working_bytes)


def _working_bytes_reader(ledger: Ledger, device: Device) -> Callable[[], int | None]:
    """Return a function that returns the bytes in use on ``device`` minus the stored bytes of the ledger.

    It returns None if the device does not say how many bytes are in use.
    """

    def host() -> int | None:
        return machine.anonymous_bytes() - ledger.stored(HOST)

    def own() -> int | None:
        allocated = device.allocated()
        return None if allocated is None else max(0, allocated - ledger.stored(device.name))

    return own if device.has_own_memory else host


def _peak_measure(ledger: Ledger, device: Device) -> MeasurePeak:
    """Return a function that measures the working memory of a stage on ``device``."""
    if isinstance(device, CountsPeak):
        return partial(counted_peak, device, partial(ledger.changes, device.name))
    return partial(polled_peak, _working_bytes_reader(ledger, device))
