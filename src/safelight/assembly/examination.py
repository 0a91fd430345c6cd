"""Runs ``safelight doctor`` for clients of the server, in a process of its own. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safelight.errors import InputError

DOCTOR = (sys.executable, "-P", "-m", "safelight.cli")


@dataclass(frozen=True, slots=True)
class ExaminationState:
    """What is known of the last examination.

    ``started``, ``ended``: in seconds since 1970.
    ``report``: the report of the doctor, as ``--json`` prints it; None until it ended.
    ``problem``: why there is no report.
    """

    state: Literal["never", "running", "done", "failed"] = "never"
    started: float | None = None
    ended: float | None = None
    report: Mapping[str, Any] | None = None
    problem: str = ""


class Examinations:
    """Examines the machine, one time after the other.

    ``tell``: called after each change.
    """

    def __init__(self, root: Path, tell: Callable[[], None]) -> None:
        self._root, self._tell = root, tell
        self._lock = threading.Lock()
        self._state = ExaminationState()
        self._process: subprocess.Popen[str] | None = None

    @property
    def state(self) -> ExaminationState:
        return self._state

    def start(self) -> ExaminationState:
        """Begin an examination of all models. Raises InputError if one is running."""
        with self._lock:
            if self._state.state == "running":
                raise InputError("an examination is running; wait until it has ended")
            self._state = ExaminationState("running", time.time())
            self._process = subprocess.Popen(
                [*DOCTOR, "--root", str(self._root), "doctor", "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            threading.Thread(target=self._wait, args=(self._process,), name="safelight-doctor", daemon=True).start()
        self._tell()
        return self._state

    def stop(self) -> None:
        """End a running examination, because the server stops."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()

    def _wait(self, process: subprocess.Popen[str]) -> None:
        printed, said = process.communicate()
        try:
            # Exit code 1 says that something is wrong; the report has it.
            report = json.loads(printed)
            ended = replace(self._state, state="done", report=report)
        except ValueError:
            lines = said.strip().splitlines() or [f"it ended with code {process.returncode}"]
            ended = replace(self._state, state="failed", problem=lines[-1])
        self._state = replace(ended, ended=time.time())
        self._tell()
