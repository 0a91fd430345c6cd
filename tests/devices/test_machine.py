"""What bounds memory: the machine, its cgroups, ulimit. The kernel's files are fed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.scale import thinned

from safelight.devices import choice, machine, selftest
from safelight.models.attention import Kernels

GB = 1 << 30


def group(folder: Path, names: tuple[str, str], limit: int | str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{stat}\n")


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.fixture
def kernel(tmp_path: Path) -> tuple[Path, Path]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    cgroups.mkdir()
    return proc, cgroups


def test_version_2_the_tightest_of_all_levels(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    (proc / "cgroup").write_text("0::/a/b\n")
    group(cgroups / "a", V2, 4 * GB, 3 * GB, f"inactive_file {GB}")
    group(cgroups / "a/b", V2, "max", GB, "inactive_file 0")
    assert [bound.available for bound in machine.cgroup_limits(proc, cgroups)] == [2 * GB]
    assert "4.00 GB" in machine.tightest_limit(proc, cgroups).source


def test_version_1_and_containers_that_see_only_their_root(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    (proc / "cgroup").write_text("12:cpu,memory:/docker/abc\n3:cpuset:/x\n")
    group(cgroups / "memory", V1, 2 * GB, GB, f"total_inactive_file {GB // 2}")
    assert [bound.available for bound in machine.cgroup_limits(proc, cgroups)] == [3 * GB // 2]


def test_no_cgroups_and_no_limit(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    assert machine.cgroup_limits(proc, cgroups) == []
    (proc / "cgroup").write_text("0::/\n")
    group(cgroups, V2, "max", GB, "")
    assert machine.cgroup_limits(proc, cgroups) == []
    assert machine.tightest_limit(proc, cgroups).available > 0


def test_usage_over_the_limit_leaves_nothing(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    (proc / "cgroup").write_text("0::/\n")
    group(cgroups, V2, GB, 2 * GB, "")
    assert machine.tightest_limit(proc, cgroups).available == 0


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce these limits")
@pytest.mark.parametrize(("flag", "name"), [("-d", "ulimit -d"), ("-v", "ulimit -v")])
def test_ulimit(flag: str, name: str) -> None:
    code = "from safelight.devices.machine import tightest_limit; b = tightest_limit(); print(b.available, b.source)"
    command = f"ulimit {flag} 500000; {sys.executable} -c '{code}'"
    done = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True)
    available, source = done.stdout.split(" ", 1)
    assert name in source
    assert 0 < int(available) < 500_000 * 1024


def test_what_can_change_a_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac the chip and the system's build, which its GPU's driver is part of; elsewhere NVIDIA's driver."""
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    told = {"machdep.cpu.brand_string": "Apple M2 Pro\n", "kern.osversion": "24F74\n"}
    ran = SimpleNamespace(run=lambda command, **_: SimpleNamespace(stdout=told[command[-1]]))
    monkeypatch.setattr(machine, "subprocess", ran)
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    assert machine.processor(tmp_path / "none") == "Apple M2 Pro"
    assert machine.system() == "macOS 15.5 24F74"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30\n"
    )
    assert machine.nvidia_driver(tmp_path / "version") == "550.54.14"
    assert machine.nvidia_driver(tmp_path / "none") == ""


@pytest.mark.parametrize("part", thinned(["processor", "system"]))
def test_another_chip_or_system_is_tried_again(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device was trusted with was seen of another machine."""
    tries: list[str] = []
    right = selftest.run_test
    monkeypatch.setattr(selftest, "run_test", lambda device: tries.append(device.name) or right(device))
    device = choice.device("simulated")
    for value in ("one", "one", "other", "other", "one"):
        monkeypatch.setattr(machine, part, lambda value=value: value)
        selftest.copy_test_result(device, tmp_path)
        kernels = Kernels(choice.device("cpu"), tmp_path, nullcontext)
        assert value in kernels._machine
    assert len(tries) == 2


HEAP = """
import ctypes
from safelight.devices import machine

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def kept():
    before = machine.anonymous_bytes()
    blocks = [library.malloc(4 << 20) for _ in range(12)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in blocks:
        library.free(block)
    return machine.anonymous_bytes() - before

with machine.small_heap():
    print(kept())
print(kept())
"""


@pytest.mark.skipif(machine._OPTION is None, reason="glibc alone has this option")
def test_freed_blocks_return_to_the_system_while_the_heap_is_kept_small() -> None:
    printed = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True).stdout
    small, usual = map(int, printed.split())
    assert small < 8 << 20
    assert usual > 32 << 20
