"""How much host memory this process can use, and what limits it; facts about the machine. No torch.

Four limits apply: the machine's free memory, the limits of the process's cgroups (containers), ``ulimit -d`` and
``ulimit -v``. A cgroup's usage includes cached file pages. The kernel reclaims them when needed, so they count as free.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """``available``: bytes that can still be allocated. ``source``: the limit that says so."""

    available: int
    source: str


def tightest_limit(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> MemoryLimit:
    """Return the limit with the fewest available bytes. The folders are the kernel's; tests may pass others."""
    found = [MemoryLimit(psutil.virtual_memory().available, "the machine's free memory")]
    found += cgroup_limits(proc, cgroups)
    found += ulimit_limits(proc)
    return min(found, key=lambda limit: limit.available)


def cgroup_limits(proc: Path, cgroups: Path) -> list[MemoryLimit]:
    """Return the limits of this process's cgroups, version 2 and version 1, from the innermost to the root.

    Empty if there are no cgroups, or none has a limit.
    """
    limits: list[MemoryLimit] = []
    for line in _lines(proc / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            home, files = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            home, files = (
                cgroups / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        inner = home / path.lstrip("/")
        # In a container the path is the host's. The container's own limits are at the root that the container sees.
        for group in (inner, *inner.parents) if inner.is_dir() else (home,):
            if group == home.parent:
                break
            limits += _cgroup_limit(group, *files)
    return limits


def _cgroup_limit(group: Path, limit_file: str, usage_file: str, reclaimable: str) -> list[MemoryLimit]:
    limit, usage = _number(group / limit_file), _number(group / usage_file)
    if limit is None or usage is None or limit >= 1 << 60:
        return []
    files = 0
    for line in _lines(group / "memory.stat"):
        if line.startswith(f"{reclaimable} "):
            files = int(line.split()[1])
    return [MemoryLimit(max(0, limit - usage + files), f"the cgroup's limit of {limit / 2**30:.2f} GB ({group})")]


def ulimit_limits(proc: Path) -> list[MemoryLimit]:
    """Return the limits from ``ulimit -d`` and ``ulimit -v``, minus the bytes that this process has mapped."""
    status = {line.split(":")[0]: line for line in _lines(proc / "status")}
    limits: list[MemoryLimit] = []
    for kind, field, name in (
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit == resource.RLIM_INFINITY:
            continue
        used = int(status[field].split()[1]) * 1024 if field in status else 0
        limits.append(MemoryLimit(max(0, limit - used), f"{name} of {limit / 2**30:.2f} GB"))
    return limits


def anonymous_bytes() -> int:
    """Return the bytes of this process's resident memory that no file backs: its tensors and objects.

    On macOS it is the whole resident size, because a process without privileges cannot find out more.
    """
    try:
        fields = Path("/proc/self/statm").read_bytes().split()
    except OSError:
        return psutil.Process().memory_info().rss
    return (int(fields[1]) - int(fields[2])) * _PAGE


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name. On a Mac it is the chip's (``Apple M2 Pro``): :mod:`platform` only says "arm"."""
    for line in _lines(cpuinfo):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def system() -> str:
    """Return the macOS version and build (``macOS 15.5 24F74``), "" on other systems.

    The build can change results, because it contains the GPU's driver.
    """
    if sys.platform != "darwin":
        return ""
    return f"macOS {platform.mac_ver()[0]} {sysctl('kern.osversion')}".strip()


def sysctl(name: str) -> str:
    """Read a value of a Mac's kernel. "" if there is none, or on other systems."""
    if sys.platform != "darwin":
        return ""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def nvidia_driver(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of NVIDIA's driver, "" if it is unknown."""
    for line in _lines(version):
        found = re.search(r"\s([0-9]+(?:\.[0-9]+)+)\s", line)
        if found is not None:
            return found[1]
    return ""


def trim_allocator() -> None:
    """Make the allocator return freed memory to the system. It works with glibc; elsewhere nothing happens."""
    if _TRIM is not None:
        _TRIM(0)


@contextlib.contextmanager
def small_heap() -> Generator[None]:
    """Keep the allocator's heap small within the context. It works with glibc; elsewhere nothing happens.

    Without it, freed blocks of up to 32 MiB stay in the heap, between others that are in use. Within it, each freed
    block of 1 MiB or more returns to the system at once. The system clears its pages at the next use, which takes time.
    """
    if _OPTION is None or any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        yield
        return
    _set_thresholds(1 << 20)
    try:
        yield
    finally:
        # The allocator raises its own threshold up to this one.
        _set_thresholds(32 << 20)


def _set_thresholds(nbytes: int) -> None:
    """Set the size from which a block has pages of its own, and twice it for the free bytes at the heap's end."""
    assert _OPTION is not None
    _OPTION(_M_MMAP_THRESHOLD, nbytes)
    _OPTION(_M_TRIM_THRESHOLD, 2 * nbytes)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``malloc.h``."""

_OPTION = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
_PAGE = resource.getpagesize()
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _lines(path: Path) -> list[str]:
    """The lines of one of the kernel's files. Empty if this system does not have it."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None
