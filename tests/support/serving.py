"""Starts a real server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from support import forking, postgres
from support.measured import give

READY_SECONDS = 60.0


@dataclass
class Server:
    """A running server. ``url``: without a slash at its end."""

    url: str
    process: subprocess.Popen[str]
    root: Path
    key: str | None = None

    def client(self, **more: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **more)

    def worker(self) -> int:
        """The pid of the worker: the first child of the server. The spare starts later."""
        return children(self.process.pid)[0]

    def ready(self) -> None:
        """Wait until the worker is ready."""
        until = time.monotonic() + READY_SECONDS
        with self.client() as client:
            while client.get("/api/v1/health").json()["worker"] != "ready":
                assert time.monotonic() < until
                time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that it started, the oldest first; not the one from which the tests have them forked."""
    found = [child for child in psutil.Process(pid).children() if child.name() != forking.NAME]
    return [child.pid for child in sorted(found, key=lambda child: (child.create_time(), child.pid))]


_databases: dict[Path, str] = {}


def database_of(root: Path) -> str | None:
    """The address of a root's database; None for SQLite. ``make postgres`` runs the tests of servers on PostgreSQL."""
    file = root / "safelight.yaml"
    if "SAFELIGHT_TEST_POSTGRES" not in os.environ or (file.exists() and "database_url" in file.read_text()):
        return None
    return _databases.setdefault(root, "") or _databases.update({root: postgres.cluster().new()}) or _databases[root]


PROGRAM = ("-m", "safelight.cli")


def start(
    root: Path,
    *options: str,
    key: str | None = None,
    spare: bool = False,
    says: Path | None = None,
    real: bool = False,
    program: Sequence[str] = PROGRAM,
) -> Server:
    """Start a server on a free port, and return when it answers. ``spare``: with a spare worker. ``says``: it and its
    worker write their messages there. ``real``: they are processes from their first instruction, as for users.
    ``program``: what Python runs."""
    root.mkdir(exist_ok=True)
    give(root)
    command = [sys.executable, *program, "serve", "--root", str(root), "--port", "0", *options]
    if key is not None:
        command += ["--api-key", key]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "SAFELIGHT_SPARE_WORKER": str(spare).lower()}
    if (url := database_of(root)) is not None:
        environment["SAFELIGHT_DATABASE_URL"] = url
    with says.open("w") if says is not None else contextlib.nullcontext() as messages:
        begin = forking.REAL if real else subprocess.Popen
        process = begin(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line
    server = Server(found[0], process, root, key)
    until = time.monotonic() + READY_SECONDS
    with server.client() as client:
        while True:
            try:
                client.get("/api/v1/health")
                return server
            except httpx.TransportError:
                assert process.poll() is None, process.returncode
                assert time.monotonic() < until
                time.sleep(0.05)


def stop(server: Server) -> int:
    """Stop the server by SIGTERM, as an operating system does. Returns its exit code."""
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(60)
    assert server.process.stdout is not None
    server.process.stdout.close()
    return code


@contextmanager
def serving(
    root: Path,
    *options: str,
    key: str | None = None,
    spare: bool = False,
    says: Path | None = None,
    real: bool = False,
    program: Sequence[str] = PROGRAM,
) -> Generator[Server]:
    server = start(root, *options, key=key, spare=spare, says=says, real=real, program=program)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            stop(server)


def ended(client: httpx.Client, job: str, seconds: float = 120.0, every: float = 0.03) -> dict[str, Any]:
    """Wait until the job has ended, and return it. ``every``: seconds between two looks."""
    until = time.monotonic() + seconds
    while True:
        found = client.get(f"/api/v1/jobs/{job}").json()
        if found["ended"] is not None:
            return found
        assert time.monotonic() < until, found
        time.sleep(every)


ASK = {"prompt": "red apple", "model": "starter-noto", "seed": 3, "steps": 2}
"""A small request."""


def make(http: httpx.Client, **more: object) -> dict[str, Any]:
    """Queue :data:`ASK` with other fields, and return the job."""
    answer = http.post("/api/v1/generate", json={**ASK, **more})
    assert answer.status_code == 202, answer.text
    return answer.json()


def still_there(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process still exists after ``seconds``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True
