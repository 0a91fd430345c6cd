"""A slot on a machine of the cluster: a Ray actor with a worker process of its own. No torch in this process."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from filelock import FileLock, Timeout
from platformdirs import user_data_path

from safelight.cluster.needed import Needed
from safelight.cluster.node_files import NodeFiles
from safelight.devices.gpus import VISIBLE, nvidia_gpus
from safelight.errors import FileError, SafelightError, StorageError, WorkerDiedError
from safelight.request.schema import Request
from safelight.settings import Settings
from safelight.settings_sources import load_settings
from safelight.workers.isolation import ForkingRunner
from safelight.workers.messages import Command, Ended, FromWorker, Generate
from safelight.workers.supervisor import Supervisor

ROOT = "SAFELIGHT_NODE_ROOT"
"""The variable with the folder for a machine's cache and records. `ray start` must have it."""

ALIVE_SECONDS = 1.0
"""Seconds between two signs of life while a job runs."""

TOGETHER_SECONDS = 0.1
"""Messages wait so long, at most, for others of their job."""

COMPARED = (
    *("safelight", "torch", "diffusers", "transformers", "numpy", "scipy", "safetensors"),
    *("pillow", "opencv-python-headless", "torchsde"),
)
"""Packages whose versions must be those of the server: others may compute other pixels."""

OF_NODE = ("max_cache_ram_gb", "max_cache_vram_gb", "device", "threads", "cluster_cache_gb", "spare_worker")
"""Settings that a machine has for itself, from its own file and variables."""

MAY_BE_FILES = ("input", "failed")
"""The kinds of failures that a damaged file may have caused."""

GB = 1 << 30


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of the packages that compute."""
    found: dict[str, str] = {}
    for name in COMPARED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return MappingProxyType(found)


class NodeSlot:
    """A slot of a machine. Ray makes one for each that the machine offers.

    ``settings``: the server's. ``own``: names and values of the machine's own settings that were set.
    ``worker``, ``zygote``: the commands of the processes that compute.
    ``url``, ``token``, ``authority``: of the server's files; ``authority``: the file that signs its certificate.
    """

    def __init__(
        self,
        settings: Settings,
        worker: Sequence[str],
        zygote: Sequence[str],
        url: str,
        token: str,
        authority: str | None,
    ) -> None:
        root = Path(os.environ.get(ROOT) or user_data_path("safelight-node", appauthor=False))
        root.mkdir(parents=True, exist_ok=True)
        # Several slots of a machine share its records and its cache, and each takes another device.
        self._lock, number = _claim(root)
        self.name = f"{socket.gethostname()}:{number}"
        here = load_settings(root)
        own = {name: value for name in OF_NODE if (value := getattr(here, name)) is not None}
        gpus = nvidia_gpus()
        device = {"device": "cuda"} if number < len(gpus) else {}
        self._settings = settings.model_copy(update={**own, "root": root, **device})
        client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
            verify=authority or True,
            trust_env=False,
        )
        budget = int(self._settings.cluster_cache_gb * GB)
        self._files = NodeFiles(root, client, budget, settings.cluster_shared_files)
        visible = {VISIBLE: gpus[number]} if number < len(gpus) else {}
        self._supervisor = Supervisor(worker, self._settings, self._settings.spare_worker, visible)
        self._isolated = ForkingRunner(zygote, self._settings)
        # A stream that the server left early goes on until the next step. The next job must not read its messages.
        self._one_at_a_time = threading.Lock()
        self._attempts: set[str] = set()
        self._cancelled: set[str] = set()
        self._running: tuple[str, Generate] | None = None

    def about(self) -> dict[str, Any]:
        """Say which slot this is, and with which versions it computes."""
        return {"name": self.name, "versions": dict(versions()), "pid": os.getpid(), "root": str(self._settings.root)}

    def ready(self) -> Mapping[str, Any] | None:
        """Return the run settings of the worker; None until it is ready."""
        found = self._supervisor.run_settings(0.0)
        return None if found is None else dict(found)

    def run(self, attempt: str, generate: Generate, needed: Needed) -> Generator[list[FromWorker]]:
        """Run a job, and yield the worker's messages; an empty list is a sign of life.

        ``attempt``: names this call: a job may come once more. Ray passes each list through several processes, so those
        of a short time go together.
        """
        self._attempts.add(attempt)
        messages: queue.SimpleQueue[FromWorker | BaseException] = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(attempt, generate, needed, messages), daemon=True)
        thread.start()
        ended = False
        while not ended:
            found, error = _arrived(messages)
            ended = any(isinstance(message, Ended) for message in found)
            if found or error is None:
                yield found
            if error is not None:
                raise error

    def _work(
        self,
        attempt: str,
        generate: Generate,
        needed: Needed,
        messages: queue.SimpleQueue[FromWorker | BaseException],
    ) -> None:
        try:
            self._files.ensure(needed)
            with self._one_at_a_time:
                self._running = attempt, generate
                try:
                    for message in self._messages(attempt, generate, needed):
                        messages.put(message)
                finally:
                    self._running = None
        except StorageError as error:
            messages.put(Ended(generate.job_id, "storage", str(error), ()))
        except FileError as error:
            messages.put(WorkerDiedError(f"on {self.name} cannot get its files: {error}"))
        except BaseException as error:  # noqa: BLE001 - the server must learn of any error
            messages.put(error)
        finally:
            self._attempts.discard(attempt)
            self._cancelled.discard(attempt)

    def _messages(self, attempt: str, generate: Generate, needed: Needed) -> Generator[FromWorker]:
        """Run a job. Raises WorkerDiedError if its files are damaged here."""
        runner = self._isolated if generate.job.request.isolate else self._supervisor
        for message in runner.run(generate, lambda: attempt in self._cancelled):
            if isinstance(message, Ended) and message.kind in MAY_BE_FILES and self._files.is_damaged(needed):
                self._files.distrust(needed)
                raise WorkerDiedError(f"on {self.name} cannot use its files: {message.problem}")
            yield message

    def cancel(self, attempt: str) -> None:
        """Stop an attempt at a job at its next step, or before it begins."""
        if attempt not in self._attempts:
            return
        self._cancelled.add(attempt)
        running = self._running
        if running is not None and running[0] == attempt:
            self._supervisor.cancel(running[1].job_id)
            self._isolated.cancel(running[1].job_id)

    def ask(self, command: Command, model: str, request: Request | None) -> Any:
        """See :meth:`safelight.workers.supervisor.Supervisor.ask`."""
        return self._supervisor.ask(command, model, request).result()

    def kill(self) -> None:
        """Replace the process of the running job."""
        running = self._running
        if running is not None and running[1].job.request.isolate:
            self._isolated.kill()
        else:
            self._supervisor.kill()

    def close(self) -> None:
        """End the processes, and let another slot have the device."""
        self._supervisor.close()
        self._isolated.close()
        self._lock.release()


def _arrived(
    messages: queue.SimpleQueue[FromWorker | BaseException],
) -> tuple[list[FromWorker], BaseException | None]:
    """Return the messages of a short time, none if all is silent, and the error that followed them."""
    found: list[FromWorker] = []
    until = time.monotonic() + ALIVE_SECONDS
    with contextlib.suppress(queue.Empty):
        while not found or not isinstance(found[-1], Ended):
            message = messages.get(timeout=max(0.0, until - time.monotonic()))
            if isinstance(message, BaseException):
                return found, message
            until = until if found else time.monotonic() + TOGETHER_SECONDS
            found.append(message)
    return found, None


def _claim(root: Path) -> tuple[FileLock, int]:
    """Return the number of a slot of this machine that no other process has, and the lock that holds it."""
    for number in range(1000):
        lock = FileLock(root / f".slot-{number}")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return lock, number
    raise SafelightError("this machine has too many slots")
