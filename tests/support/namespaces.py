"""Machines of a network of their own, as namespaces of Linux: each has its own address, processes, name, and home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import psutil

BRIDGE = "safelight-test"
_COMMANDS = ("ip", "unshare", "nsenter", "mount")


def missing() -> str | None:
    """Return why no namespaces can be made here; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need Linux and root"
    if absent := [name for name in _COMMANDS if which(name) is None]:
        return f"namespaces need {', '.join(absent)}"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else f"namespaces cannot be made here: {tried.stderr.decode().strip()}"


class Machine:
    """One machine. Its home and ``/tmp/ray`` are in ``folder``; folders in ``hidden`` are empty there."""

    def __init__(self, name: str, address: str, folder: Path, hidden: tuple[Path, ...] = ()) -> None:
        self.name, self.address, self.home = name, address, folder / "home"
        ray = folder / "ray"
        self.home.mkdir(parents=True)
        ray.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        lines = [f"hostname {name}", "mount -t tmpfs none /dev/shm", f"mount --bind {ray} /tmp/ray"]
        lines += [f"mount -t tmpfs none {path}" for path in hidden]
        script = " && ".join([*lines, "echo ready", "exec sleep infinity"])
        flags = ("--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
        self._holder = subprocess.Popen(["unshare", *flags, "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        self._end = f"sl-{name}"[:15]
        self._inside = 0

    def connect(self) -> None:
        """Wait until it is there, and connect it to the switch."""
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        [first] = psutil.Process(self._holder.pid).children()
        self._inside = first.pid
        _ip("link", "add", self._end, "type", "veth", "peer", "name", "eth0", "netns", str(self._inside))
        _ip("link", "set", self._end, "master", BRIDGE, "up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.run(f"ip {command}").check_returncode()
        self.run(f"ip route add default via {self.address} dev eth0").check_returncode()

    def start(self, command: str, **more: str) -> subprocess.Popen[str]:
        """Start a command line. ``more``: variables of its environment."""
        enter = ["nsenter", "--target", str(self._inside), "--net", "--pid", "--mount", "--uts", "--ipc", "--"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFELIGHT_")}
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**kept, "HOME": str(self.home), "PATH": programs, "PYTHONUNBUFFERED": "1", **more}
        return subprocess.Popen(
            [*enter, "sh", "-c", f"exec {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def run(self, command: str, seconds: float = 120.0, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command line to its end."""
        process = self.start(command, **more)
        said, _ = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(command, process.returncode, said)

    def cut(self) -> None:
        """Pull the network cable."""
        _ip("link", "set", self._end, "down")

    def close(self) -> None:
        """End all of its processes, and take it off the switch."""
        subprocess.run(["ip", "link", "del", self._end], capture_output=True, check=False)
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()


class Network:
    """A switch that machines are connected to. The tests' own process has no address there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._machines = folder, list[Machine]()
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")

    def add(self, name: str, address: str, hidden: tuple[Path, ...] = ()) -> Machine:
        """Connect a new machine."""
        self._machines.append(made := Machine(name, address, self._folder / name, hidden))
        made.connect()
        return made

    def close(self) -> None:
        """Remove all machines."""
        for machine in self._machines:
            machine.close()
        _ip("link", "del", BRIDGE)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
