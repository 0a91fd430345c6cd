"""Runs a command of ``safelight`` for clients of the server, in a process of its own. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safelight.errors import InputError

SAFELIGHT = (sys.executable, "-P", "-m", "safelight.cli")


@dataclass(frozen=True, slots=True)
class CommandState:
    """What is known of the last run of a command.

    ``about``: what it was asked for.
    ``started``, ``ended``: in seconds since 1970.
    ``report``: what it printed with ``--json``; None until it ended.
    ``problem``: why there is no report.
    """

    state: Literal["never", "running", "done", "failed"] = "never"
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    started: float | None = None
    ended: float | None = None
    report: Mapping[str, Any] | None = None
    problem: str = ""


class CommandRun:
    """Runs a command, one time after the other.

    ``tell``: called after each change.
    """

    def __init__(self, root: Path, tell: Callable[[], None]) -> None:
        self._root, self._tell = root, tell
        self._lock = threading.Lock()
        self._state = CommandState()
        self._process: subprocess.Popen[str] | None = None

    @property
    def state(self) -> CommandState:
        return self._state

    def start(self, *arguments: str, about: Mapping[str, Any] | None = None) -> CommandState:
        """Begin a run. Raises InputError if one is running.

        ``arguments``: of the command, without ``--json``.
        """
        with self._lock:
            if self._state.state == "running":
                raise InputError(f"another `safelight {arguments[0]}` is running; wait until it has ended")
            self._state = CommandState("running", about or {}, time.time())
            self._process = subprocess.Popen(
                [*SAFELIGHT, "--root", str(self._root), *arguments, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            threading.Thread(target=self._wait, args=(self._process,), name="safelight-command", daemon=True).start()
        self._tell()
        return self._state

    def stop(self) -> None:
        """End the run, because the server stops."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()

    def _wait(self, process: subprocess.Popen[str]) -> None:
        printed, said = process.communicate()
        try:
            # Exit code 1 of the doctor says that something is wrong; the report has it.
            report = json.loads(printed)
            ended = replace(self._state, state="done", report=report)
        except ValueError:
            lines = said.strip().splitlines() or [f"it ended with code {process.returncode}"]
            ended = replace(self._state, state="failed", problem=lines[-1])
        self._state = replace(ended, ended=time.time())
        self._tell()
