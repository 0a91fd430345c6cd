"""Joins a Ray cluster, and makes its slots."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from safelight.catalog.catalog import Catalog
from safelight.cluster.file_server import AUTHORITY, FileServer, tls
from safelight.cluster.needed import Needed, Packer
from safelight.cluster.node_slot import NodeSlot
from safelight.cluster.remote_supervisor import RemoteSupervisor
from safelight.errors import InputError
from safelight.logs import Log
from safelight.request.job import Job
from safelight.settings import Settings

_log = Log(__name__)

RESOURCE = "safelight"
"""Ray's name for a slot: `ray start --resources '{"safelight": 1}'` offers one."""

AT_ONCE = 16
"""Calls that an actor answers at the same time: a job, questions and cancellations."""

LOOK_SECONDS = 2.0
"""Seconds between two questions how many slots the cluster offers."""

CONNECT_SECONDS = 5.0
"""Seconds until an address without an answer is refused."""


class Cluster:
    """A Ray cluster, whose slots a server uses.

    ``address``: of Ray's head; ``auto`` for the cluster of this machine.
    ``worker``, ``zygote``: the commands of the processes that compute.

    Raises InputError if there is no such cluster.
    """

    def __init__(
        self, address: str, settings: Settings, catalog: Catalog, worker: Sequence[str], zygote: Sequence[str]
    ) -> None:
        self._settings, self._packer, self._programs = settings, Packer(catalog), (tuple(worker), tuple(zygote))
        _require_answer(address)
        try:
            # Ray's own logs of workers say nothing that the server's do not.
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="safelight")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--cluster {address}: no Ray cluster answers there ({error})") from error
        self._token = secrets.token_urlsafe(32)
        self._files = FileServer(ray.util.get_node_ip_address(), self._token)
        self._stopping = threading.Event()

    def offered(self) -> int:
        """Return the number of slots that the machines of the cluster offer now."""
        return int(ray.cluster_resources().get(RESOURCE, 0))

    def open_supervisor(self, changed: Callable[[], None]) -> RemoteSupervisor:
        """Return the supervisor of one more slot, which Ray places. ``changed``: called when it becomes available."""
        settings = self._settings
        return RemoteSupervisor(
            self._start, self._needed, settings.cluster_lease_seconds, settings.cluster_other_versions, changed
        )

    def watch(self, known: int, more: Callable[[], None]) -> None:
        """Call ``more`` for each further slot that machines offer later, until the cluster is left.

        ``known``: the slots that are open already.
        """

        def look() -> None:
            opened = known
            while not self._stopping.wait(LOOK_SECONDS):
                try:
                    offered = self.offered()
                except RayError as error:
                    _log.warning("the cluster does not say what it offers", why=str(error))
                    continue
                while opened < offered:
                    opened += 1
                    more()

        threading.Thread(target=look, name="safelight-cluster", daemon=True).start()

    def leave(self) -> None:
        """Stop serving files, and end the connection."""
        self._stopping.set()
        self._files.stop()
        ray.shutdown()

    def _start(self) -> Any:
        actor: Any = ray.remote(NodeSlot)
        options = actor.options(
            num_cpus=0, resources={RESOURCE: 1}, max_restarts=-1, max_task_retries=0, max_concurrency=AT_ONCE
        )
        authority = os.environ.get(AUTHORITY) if tls() else None
        return options.remote(self._settings, *self._programs, self._files.url, self._token, authority)

    def _needed(self, job: Job) -> Needed:
        needed = self._packer.needed_for(job)
        self._files.allow(file.path for record in needed.records for file in record.files)
        return needed


def _require_answer(address: str) -> None:
    """Raise InputError if nothing answers at an address. Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise InputError(f"--cluster {address}: no Ray cluster answers there ({error})") from error
