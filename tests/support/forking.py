"""Processes that begin as forks of one that has imported everything: importing takes longer than most tests.

A *nursery* has imported everything and has no threads. It is a child of the process that wants others, and what it
forks is a child of that process as well, not its own: waiting, killing and ends are those of any child. A program that
was forked has a nursery of its own, so the worker of a server is forked, too.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import platform
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine(), 0) if sys.platform == "linux" else 0
"""The number of the system call; 0 where nothing is forked here: each process imports for itself then."""

NAME = "nursery"
"""What a nursery is called in a list of processes."""

IMPORTED = (
    "uvicorn",
    "safelight.assembly.worker_main",
    "safelight.assembly.zygote",
    "safelight.cli.main",
    "safelight.server.app",
    "safelight.server.connections",
    "safelight.server.page.routes",
)
"""What servers and workers need beside what computes."""

CLONE_PARENT, CLONE_CHILD_SETTID = 0x8000, 0x1000000
PR_GET_TID_ADDRESS = 40
LARGEST = 1 << 17
"""Bytes of a message."""

ENVIRONMENT = dict(os.environ)
"""Variables of the first nursery. They are read here, so that no test's packages (PYTHONPATH) are among them."""

START = """
import sys
sys.path.insert(0, sys.argv[2])
from support import forking
sys.path.remove(sys.argv[2])
forking.begin(int(sys.argv[1]))
"""

REAL = subprocess.Popen
_ARGUMENTS = list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]  # type: ignore[attr-defined]
_nursery: dict[int, socket.socket] = {}
"""By the process that it serves: what a process forks itself is not its nursery's to serve."""
_asking = threading.Lock()


def begin(number: int) -> None:
    """Import everything and be a nursery, which is asked at the socket of that number."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from safelight.assembly import importing

    importing.import_engine()
    for name in IMPORTED:
        importlib.import_module(name)
    _make_first_image()
    gc.collect()
    gc.freeze()
    # Before a fork the libraries end the threads which they began when they were imported; a bare clone tells nobody.
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert len(_numbers("/proc/self/task")) == 1
    _serve(socket.socket(fileno=number))


def _make_first_image() -> None:
    """Make an image by a starter: what is built and read only once is there in what is forked."""
    import pytest
    import torch
    from support.extensions import forget
    from support.lighter import make_lighter

    from safelight.assembly import engine
    from safelight.request.schema import Request
    from safelight.settings_sources import load_settings

    make_lighter(pytest.MonkeyPatch())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # A thread of torch's would not be there in what is forked.
    with tempfile.TemporaryDirectory() as root:
        opened = engine.open_engine(load_settings(Path(root)))
        for _ in opened.generate(Request("red apple", "starter-noto", steps=1)):
            pass
        opened.close()
    torch.set_num_threads(threads)
    # What is forked may have other packages.
    forget()


def _serve(asked: socket.socket) -> NoReturn:
    """Fork for whoever asks, until nobody does."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)
    while True:
        data, files, *_ = socket.recv_fds(asked, LARGEST, 16)
        if not data:
            os._exit(0)
        child = _clone()
        if child == 0:
            _program(json.loads(data), files)
        for file in files:
            os.close(file)
        with contextlib.suppress(OSError):
            asked.send(str(child).encode())


def _clone() -> int:
    """As :func:`os.fork`, but the child is one of this process's parent."""
    libc, python = ctypes.PyDLL(None, use_errno=True), ctypes.pythonapi
    # Where the C library keeps the number of this thread, which is another one in the child.
    kept = ctypes.c_void_p()
    flags, at = signal.SIGCHLD | CLONE_PARENT, 0
    if libc.prctl(PR_GET_TID_ADDRESS, ctypes.byref(kept), 0, 0, 0) == 0 and kept.value:
        flags, at = flags | CLONE_CHILD_SETTID, kept.value
    last = (at, 0) if platform.machine() == "x86_64" else (0, at)
    numbers = [ctypes.c_long(number) for number in (CLONE, flags, 0, 0, *last)]
    libc.syscall.restype = ctypes.c_long
    python.PyOS_BeforeFork()
    child = libc.syscall(*numbers)
    if child == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if child < 0:
        raise OSError(ctypes.get_errno(), "nothing was forked")
    return child


def _program(asked: dict[str, Any], files: list[int]) -> NoReturn:
    """Be the program that is asked for."""
    code, nursery, own = 1, 0, 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked["session"]:
            os.setsid()
        Path("/proc/self/comm").write_text("python")
        wanted = dict(zip(asked["files"], files, strict=True))
        # What computes for others starts no processes that are worth it.
        if not any(part.startswith("safelight.assembly.") for part in asked["command"][1:2]):
            nursery, own = _own(max(*wanted, *files, 2) + 1)
            forks_ours()
        _placed(wanted, own)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering="PYTHONUNBUFFERED" in os.environ)  # type: ignore[union-attr]
        sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        code = _run(*asked["command"])
    except BaseException:  # noqa: BLE001 - whatever it was, it ends here
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if nursery:
        _nursery[os.getpid()].shutdown(socket.SHUT_RDWR)
        os.waitpid(nursery, 0)
    os._exit(code)


def _own(above: int) -> tuple[int, int]:
    """Fork a nursery for this program: its process, and the number of the socket to it, which is at least ``above``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nursery = os.fork()
    if nursery == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _only({theirs.fileno()})
        _serve(theirs)
    number = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, above)
    ours.close()
    theirs.close()
    _nursery[os.getpid()] = socket.socket(fileno=number)
    return nursery, number


def _numbers(folder: str) -> list[int]:
    return [int(path.name) for path in Path(folder).iterdir()]


def _only(kept: set[int]) -> None:
    """Close all files but those of these numbers; the first three lead nowhere."""
    for number in _numbers("/proc/self/fd"):
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):
                os.close(number)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _placed(wanted: Mapping[int, int], kept: int) -> None:
    """Give files the numbers that they are to have, and close all others but ``kept``."""
    above = max(*wanted, *wanted.values(), kept) + 1
    high = {number: fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for number, file in wanted.items()}
    for number in _numbers("/proc/self/fd"):
        if number not in (kept, *high.values()) or number in (0, 1, 2):
            with contextlib.suppress(OSError):
                os.close(number)
    for number, file in high.items():
        os.dup2(file, number)
        os.close(file)


def _run(program: str, *arguments: str) -> int:
    """The exit code of what is asked for by the words behind ``python``."""
    sys.argv = [program, *arguments]
    try:
        if program == "-m":
            sys.argv = list(arguments)
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif program == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(program).absolute().parent))
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 0


def _asked() -> socket.socket:
    """The nursery of this process, started when it is first wanted."""
    if os.getpid() not in _nursery:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-W", "ignore", "-c", START, str(theirs.fileno()), str(Path(__file__).parents[1])]
        with theirs:
            process = REAL(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=ENVIRONMENT)
        _nursery[os.getpid()] = ours
        atexit.register(_ended, ours, process)
    return _nursery[os.getpid()]


def _ended(nursery: socket.socket, process: subprocess.Popen[Any]) -> None:
    nursery.shutdown(socket.SHUT_RDWR)
    process.wait()


class Forked(subprocess.Popen[Any]):
    """``python ...``, forked from a process that has imported everything; else it is a process like any other."""

    def _execute_child(self, *given: Any) -> None:
        asked = dict(zip(_ARGUMENTS, given, strict=True))
        files = {0: asked["p2cread"], 1: asked["c2pwrite"], 2: asked["errwrite"]}
        files = {number: number if file == -1 else file for number, file in files.items()}
        files |= {number: number for number in asked["pass_fds"]}
        environment = os.environ if asked["env"] is None else asked["env"]
        message = {
            "command": _words(asked["args"]),
            "cwd": os.fspath(asked["cwd"] or Path.cwd()),
            "environment": dict(environment),
            "files": list(files),
            "session": asked["start_new_session"],
        }
        with _asking:
            nursery = _asked()
            socket.send_fds(nursery, [json.dumps(message).encode()], list(files.values()))
            self.pid = int(nursery.recv(LARGEST))
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))  # type: ignore[attr-defined]


class Chosen(Forked):
    """Forked if it is a program of Safelight's, ``python -m safelight...``; any other is started as always, and so is
    one that is to be prepared before its first instruction."""

    def _execute_child(self, *given: Any) -> None:
        asked = dict(zip(_ARGUMENTS, given, strict=True))
        words = _words(asked["args"])
        ours = words[:1] == ["-m"] and words[1].startswith("safelight.") and asked["preexec_fn"] is None
        (super() if ours else super(Forked, self))._execute_child(*given)  # type: ignore[misc]


def forks_ours() -> None:
    """From now on this process forks Safelight's programs when it starts them."""
    subprocess.Popen = Chosen


def _words(command: Any) -> list[str]:
    """What is behind ``python`` and its options for the interpreter; nothing if it is another program."""
    if isinstance(command, str | bytes | os.PathLike):
        return []
    first, *words = [os.fspath(word) for word in command]
    if first != sys.executable:
        return []
    while words and words[0] in ("-P", "-W"):
        words = words[2 if words[0] == "-W" else 1 :]
    return words


def started(command: Sequence[str], **more: Any) -> subprocess.Popen[str]:
    """As :class:`subprocess.Popen` does with ``python ...``, but everything is imported before the program begins."""
    return (Forked if CLONE else REAL)(command, **more)


def python(
    *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python *command`` to its end.

    command: a program's path, ``-m MODULE`` or ``-c CODE``, followed by arguments.

    Before the program starts, the process has already imported everything that Safelight computes with. For a program
    that needs a fresh interpreter, use :mod:`subprocess`.
    """
    with started(
        [sys.executable, *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
    ) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)
