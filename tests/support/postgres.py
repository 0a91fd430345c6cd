"""PostgreSQL for tests: a server of an ordinary user, in a temporary folder, and a new database for each test."""

from __future__ import annotations

import atexit
import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from functools import cache
from pathlib import Path

import psycopg
import pytest

USER = "nobody"
"""PostgreSQL refuses to run as root; then it runs as this user."""


@cache
def programs() -> Path | None:
    """The folder of initdb and postgres; None if there is none (Debian: postgresql)."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    there = shutil.which("initdb")
    return None if there is None else Path(there).parent


needs_postgres = pytest.mark.skipif(programs() is None, reason="needs PostgreSQL (Debian: postgresql)")


class Cluster:
    """A server of PostgreSQL that can be stopped and started again."""

    def __init__(self) -> None:
        found = programs()
        assert found is not None
        self._programs = found
        self.folder = Path(tempfile.mkdtemp(prefix="safelight-postgres-"))
        self._command: list[str] = []
        if os.getuid() == 0:
            user = pwd.getpwnam(USER)
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._command = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self.user = USER if os.getuid() == 0 else getpass.getuser()
        data = self.folder / "data"
        options = ["-D", str(data), "-A", "trust", "-N", "-E", "UTF8", "--no-locale"]
        self._run(str(self._programs / "initdb"), *options)
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            self.port = bound.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _run(self, *words: str) -> None:
        subprocess.run([*self._command, *words], cwd=self.folder, check=True, capture_output=True)

    def start(self) -> None:
        """Start the server, and return when it answers."""
        options = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder), "-h", "127.0.0.1"]
        # Nothing of a test must survive a power cut.
        options += ["-c", "fsync=off", "-c", "max_connections=200", "-c", "shared_buffers=16MB"]
        command = [*self._command, str(self._programs / "postgres"), *options]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while True:
            try:
                with psycopg.connect(self.address("postgres")):
                    return
            except psycopg.OperationalError:
                assert self._process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server at once: clients lose their connections."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        """Stop the server and remove its files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder.parent / f"{self.folder.name}.log").unlink(missing_ok=True)

    def address(self, name: str) -> str:
        """The address of a database."""
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/{name}"

    def new(self) -> str:
        """Make an empty database, and return its address."""
        name = f"db_{uuid.uuid4().hex}"
        with psycopg.connect(self.address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # pyright: ignore[reportArgumentType, reportCallIssue]
        return self.address(name)


@cache
def cluster() -> Cluster:
    """The server of this process of the tests; it ends with the process."""
    made = Cluster()
    atexit.register(made.close)
    return made
