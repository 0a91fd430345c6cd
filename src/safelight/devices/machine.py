"""How much memory this process can have on the host, and what bounds it. No torch.

Four things can bound it: the machine's free memory, the limits of its cgroups (containers), ``ulimit -d`` and
``ulimit -v``. What a cgroup counts includes pages of files, which the kernel takes back when it must: they are free.
"""

from __future__ import annotations

import ctypes
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Bound:
    """``available`` bytes can be had beside what is in use now, by the rule that ``source`` names."""

    available: int
    source: str


def tightest(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> Bound:
    """The bound that leaves least. The folders are the kernel's, and may be others in a test."""
    found = [Bound(psutil.virtual_memory().available, "the machine's free memory")]
    found += cgroup_bounds(proc, cgroups)
    found += limit_bounds(proc)
    return min(found, key=lambda bound: bound.available)


def cgroup_bounds(proc: Path, cgroups: Path) -> list[Bound]:
    """What this process's cgroups leave, of version 2 and version 1, from the innermost to the root.

    Nothing where there are no cgroups, or none has a limit.
    """
    bounds: list[Bound] = []
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
        # In a container the path is the host's, and the container's own limits lie at the root that it sees.
        for group in (inner, *inner.parents) if inner.is_dir() else (home,):
            if group == home.parent:
                break
            bounds += _cgroup_bound(group, *files)
    return bounds


def _cgroup_bound(group: Path, limit_file: str, usage_file: str, reclaimable: str) -> list[Bound]:
    limit, usage = _number(group / limit_file), _number(group / usage_file)
    if limit is None or usage is None or limit >= 1 << 60:
        return []
    files = 0
    for line in _lines(group / "memory.stat"):
        if line.startswith(f"{reclaimable} "):
            files = int(line.split()[1])
    return [Bound(max(0, limit - usage + files), f"the cgroup's limit of {limit / 2**30:.2f} GB ({group})")]


def limit_bounds(proc: Path) -> list[Bound]:
    """What ``ulimit -d`` and ``ulimit -v`` leave beside what this process has mapped."""
    status = {line.split(":")[0]: line for line in _lines(proc / "status")}
    bounds: list[Bound] = []
    for kind, field, name in (
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit == resource.RLIM_INFINITY:
            continue
        used = int(status[field].split()[1]) * 1024 if field in status else 0
        bounds.append(Bound(max(0, limit - used), f"{name} of {limit / 2**30:.2f} GB"))
    return bounds


def anonymous_bytes() -> int:
    """Bytes of this process in memory that no file backs: what its tensors and objects take.

    On macOS the whole resident size, as the system tells no better to a process without privileges.
    """
    try:
        fields = Path("/proc/self/statm").read_bytes().split()
    except OSError:
        return psutil.Process().memory_info().rss
    return (int(fields[1]) - int(fields[2])) * _PAGE


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name: on a Mac the chip's (``Apple M2 Pro``), as :mod:`platform` says "arm" for all of them."""
    for line in _lines(cpuinfo):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def system() -> str:
    """The operating system where its build changes what a device computes: on a Mac, whose GPU's driver is part of it
    (``macOS 15.5 24F74``); "" elsewhere."""
    if sys.platform != "darwin":
        return ""
    return f"macOS {platform.mac_ver()[0]} {sysctl('kern.osversion')}".strip()


def sysctl(name: str) -> str:
    """A value of a Mac's kernel, "" where there is none."""
    if sys.platform != "darwin":
        return ""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def nvidia_driver(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's driver, "" where it does not say."""
    for line in _lines(version):
        found = re.search(r"\s([0-9]+(?:\.[0-9]+)+)\s", line)
        if found is not None:
            return found[1]
    return ""


def give_back() -> None:
    """Let the allocator return what it keeps of freed memory to the system (glibc; elsewhere nothing happens)."""
    if _TRIM is not None:
        _TRIM(0)


_PAGE = resource.getpagesize()
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _lines(path: Path) -> list[str]:
    """The lines of one of the kernel's files; none where this system does not have it."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None
