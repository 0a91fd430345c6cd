"""A Ray cluster of several nodes on this machine, each with a folder of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from safelight.cluster.node_slot import ROOT

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


class Machines:
    """The head of a Ray cluster, which offers no slot, and nodes that offer one each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def root(self, name: str) -> Path:
        """The folder of a node."""
        return self.folder / name

    def add(self, name: str, **more: Any) -> None:
        """Start a node."""
        self.root(name).mkdir(exist_ok=True)
        variables = {**os.environ, ROOT: str(self.root(name)), "SAFELIGHT_SPARE_WORKER": "false", **more}
        self.nodes[name] = self.cluster.add_node(
            num_cpus=1, resources={"safelight": 1}, object_store_memory=100 << 20, env_vars=variables
        )

    def processes(self, name: str) -> list[psutil.Process]:
        """The raylet of a node, and all that it started."""
        raylet = self.nodes[name].all_processes["raylet"][0].process.pid
        found = psutil.Process(raylet)
        return [found, *found.children(recursive=True)]

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to every process of a node, also to its workers, whose parent may be another."""
        for process in self.everything(name):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def everything(self, name: str) -> list[psutil.Process]:
        """All processes of a node: those below its raylet, and those that have its folder in their environment."""
        root, found = str(self.root(name)), {one.pid: one for one in self.processes(name)}
        for process in psutil.process_iter():
            try:
                if process.environ().get(ROOT) == root:
                    found[process.pid] = process
            except (psutil.Error, OSError):
                continue
        return list(found.values())

    def close(self) -> None:
        """End all nodes."""
        for name in list(self.nodes):
            self.signal(name, signal.SIGCONT)
        self.cluster.shutdown()
        until = time.monotonic() + 10
        while time.monotonic() < until and any(self.everything_left()):
            time.sleep(0.2)
        for process in self.everything_left():
            process.kill()

    def everything_left(self) -> list[psutil.Process]:
        """Processes of any node that are still there."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(ROOT, "").startswith(str(self.folder)):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found
