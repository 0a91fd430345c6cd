"""All errors that Safelight raises on purpose. :data:`ANSWERS` has the exit code and the HTTP status of each.

::

    SafelightError
    ├── InputError                the request cannot be fulfilled
    │   ├── RequestError          a field of a request: its name, its value, what is allowed
    │   ├── SettingError          a setting: its name, its value, the source of the value
    │   ├── ExtensionError        what an installed package adds does not work: the package, the group, the name
    │   ├── MissingExtraError     packages are not installed: the extra that has them, the command that installs it
    │   ├── ModelNotFoundError    unknown model; lists the nearest names
    │   ├── DownloadError         a source that cannot be downloaded: what it is, and why
    │   ├── FileError             a file: its path and what is wrong with it
    │   │   ├── UnreadableFileError   does not exist, is not a regular file, or has no permission
    │   │   │   └── StorageError      a disk is full or cannot be written
    │   │   ├── CorruptFileError      the bytes violate the file's format
    │   │   ├── UnsafeFileError       a pickle that would run code
    │   │   └── UnsupportedModelError an intact file that is not a supported checkpoint
    │   └── IncompleteModelError  tensors are missing, have a wrong shape, or are unknown
    ├── IntegrityError            a file changed since it was added, or bytes were corrupted
    ├── TransferError             bytes were corrupted twice while being copied to a device
    ├── WorkerDiedError           the worker process ended
    ├── QueueFullError            too many jobs are waiting
    ├── DeviceLostError           a device is gone, with everything in its memory
    ├── AbsentTensorError         a module computed with a tensor that is not bound
    ├── NotFiniteError            a model computed NaN or infinity
    ├── BindingError              a skeleton is bound already, or was used outside its binding
    ├── CanaryError               a model's canary image differs from the known one
    ├── ModuleModifiedError       a model was changed while it computed
    ├── OutOfMemoryError          needed memory, available memory, and the setting that helps
    └── Cancelled                 the user asked to stop
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


def printable(text: str) -> str:
    """Return the text with escapes for characters that cannot be shown (control characters, lone surrogates).

    Texts from files reach terminals, logs and JSON, so they must be printable.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class SafelightError(Exception):
    """Base class of all errors of Safelight. ``str()`` returns a message for users, which is always printable."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(SafelightError):
    """The request cannot be fulfilled. Nothing was changed."""


class RequestError(InputError):
    """A field of a request has a value that is not allowed.

    ``field``: the field's name in :class:`safelight.Request`.
    ``value``: the field's value.
    ``problem``: the message without field and value.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}")
        self.field = field
        self.value = value
        self.problem = problem


class SettingError(InputError):
    """A setting has a value that is not allowed. ``origin``: the source of the value."""

    def __init__(self, name: str, value: object, origin: str, problem: str) -> None:
        super().__init__(f"setting {name}={value!r} (from {origin}): {problem}")
        self.name = name
        self.origin = origin


class ExtensionError(InputError):
    """What an installed package adds cannot be used.

    ``group``, ``name``: of the package's entry point.
    ``package``: the package with its version.
    """

    def __init__(self, group: str, name: str, package: str, problem: str) -> None:
        super().__init__(f"{name!r} (group {group}) of the package {package}: {problem}")
        self.group = group
        self.name = name
        self.package = package


class MissingExtraError(InputError):
    """Packages that only some commands need are not installed.

    ``what``: what needs them.
    ``extra``: the extra of Safelight's package that has them.
    ``missing``: the modules that are missing.
    ``command``: installs the extra.
    """

    def __init__(self, what: str, extra: str, missing: Sequence[str], command: str) -> None:
        super().__init__(f"{what} needs the extra {extra!r} (missing: {', '.join(missing)}). Run: {command}")
        self.extra = extra
        self.missing = tuple(missing)


_EMPTY = "the library has no model; add one with `safelight models add FILE`"
_VAES = "the VAEs that have a file of their own; the name of a model selects that model's VAE"


class ModelNotFoundError(InputError):
    """No model, adapter or VAE (``what``) has this name. ``near``: the most similar names.

    ``name``: None if no name was asked for, and the library has no model.
    """

    def __init__(self, name: str | None, near: Sequence[str], what: str = "model") -> None:
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        lists = f"`safelight {'model' if what == 'model' else 'adapter'}s list`"
        shown = _VAES if what == "VAE" else "all"
        missing = f"no {what} named {name!r} in the library.{hint} {lists} shows {shown}."
        super().__init__(_EMPTY if name is None else missing)
        self.name = name or ""
        self.near = tuple(near)


class FileError(InputError):
    """A file has a problem. ``path``: the file. ``problem``: the message without the path."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class UnreadableFileError(FileError):
    """A file does not exist, is not a regular file, or cannot be read or written."""


class StorageError(UnreadableFileError):
    """A disk is full or cannot be written. Nothing is lost; the server tries again when there is room."""


class CorruptFileError(FileError):
    """The bytes violate the file's format: they are truncated, overlap, or have another format."""


class UnsafeFileError(FileError):
    """A pickle would import or run code. ``wanted``: the names that it would import."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        listed = ", ".join(wanted)
        super().__init__(path, f"is unsafe: opening it would run {listed}. Ask its author for a .safetensors file.")
        self.wanted = tuple(wanted)


class UnsupportedModelError(FileError):
    """An intact file is not a checkpoint that Safelight supports. The problem says what it is."""


class DownloadError(InputError):
    """A source cannot be downloaded. ``source``: what the user or a redirect named. ``problem``: without the source."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


class IncompleteModelError(InputError):
    """A checkpoint lacks tensors, or has tensors of a wrong shape or unknown ones.

    Another download can help if tensors are missing or have a wrong shape. It cannot help if the file only has tensors
    that Safelight does not know.

    ``missing``, ``mismatched``, ``unexpected``: the names of these tensors.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        missing: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        unexpected: Sequence[str] = (),
    ) -> None:
        parts = [
            f"{label}: {len(names)} ({shortened(names)})"
            for label, names in (
                ("missing", missing),
                ("of a wrong shape", mismatched),
                ("unknown", unexpected),
            )
            if names
        ]
        problem = f"not a complete {what}; tensors {'; '.join(parts)}. Download it again."
        if not missing and not mismatched:
            problem = (
                f"this {what} has unknown tensors: {len(unexpected)} ({shortened(unexpected)}). Safelight leaves no "
                "tensor out, so it does not support the file; look for a version without these tensors."
            )
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.what = what
        self.missing = tuple(missing)
        self.mismatched = tuple(mismatched)
        self.unexpected = tuple(unexpected)


def shortened(names: Sequence[str], most: int = 5) -> str:
    """Join the first ``most`` names, and add how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


class IntegrityError(SafelightError):
    """Bytes are not the expected ones: a file changed since it was added, or memory was corrupted.

    ``tensor``: the name of the tensor; empty for the whole file.
    ``remedy``: a sentence that tells the user what to do.
    """

    def __init__(self, path: Path, tensor: str, problem: str, remedy: str) -> None:
        where = f"{path}: tensor {tensor}" if tensor else f"{path}"
        super().__init__(f"{where}: {problem}. {remedy}")
        self.path = path
        self.tensor = tensor


class TransferError(SafelightError):
    """Bytes were corrupted while being copied to a device, and again at the second attempt."""

    def __init__(self, what: str, device: str, nbytes: int) -> None:
        super().__init__(
            f"{what}: {nbytes} bytes were corrupted while being copied to {device}, twice. The device's memory or its "
            f"driver is unreliable; use --device cpu to work without it."
        )
        self.what = what


class DeviceLostError(SafelightError):
    """A device is gone (unplugged, reset, or its driver crashed), with everything in its memory.

    ``why``: what the driver says, "" if it says nothing.
    """

    def __init__(self, device: str, why: str = "") -> None:
        reason = f" ({why})" if why else ""
        super().__init__(f"the device {device} is gone{reason}; restart Safelight, or use --device cpu")
        self.device = device


class AbsentTensorError(SafelightError):
    """A module computed with a tensor that is not bound. ``tensor``: its name."""

    def __init__(self, tensor: str, operation: str) -> None:
        super().__init__(f"{operation} was called with tensor {tensor}, which is not bound: it has no weights")
        self.tensor = tensor


class NotFiniteError(SafelightError):
    """A stage of a generation computed NaN or infinity. The image would be black."""

    def __init__(self, stage: str, dtype: str) -> None:
        hint = "" if dtype == "fp32" else " Try --precision fp32, which has a wider range."
        super().__init__(f"{stage} computed NaN or infinity in {dtype}, so there is no image.{hint}")
        self.stage = stage


class BindingError(SafelightError):
    """A skeleton is bound already, or weights do not fit it."""


class ModuleModifiedError(SafelightError):
    """Code changed a module while it computed, and left it changed, so the result cannot be trusted.

    ``changed``: the hooks, processors or flags that differ from those of the newly built module.
    """

    def __init__(self, role: str, changed: Sequence[str]) -> None:
        super().__init__(f"the {role} was changed while it computed: {shortened(changed)}")
        self.role = role
        self.changed = tuple(changed)


class CanaryError(SafelightError):
    """A model's canary image differs from the known one. ``difference``: by how much."""

    def __init__(self, model: str, difference: str) -> None:
        super().__init__(
            f"the canary image of {model} differs from the one of a fresh process ({difference}), so no image of this "
            "model can be trusted now. Run `safelight doctor` to find the cause"
        )
        self.model = model
        self.difference = difference


class OutOfMemoryError(SafelightError):
    """There is not enough memory for a model or for computing.

    ``what``: the subject of the message, such as "Loading the unet".
    ``needed``: bytes; 0 if unknown.
    ``available``: bytes; None if unknown.
    ``final``: everything that could be evicted was evicted, so another attempt would not help.
    """

    def __init__(self, what: str, needed: int, available: int | None, hint: str, final: bool = False) -> None:
        free = "less is free" if available is None else f"{available / 1e6:.1f} MB are free"
        sizes = f"needs {needed / 1e6:.1f} MB, but {free}" if needed else "ran out of memory"
        super().__init__(f"{what} {sizes}. {hint}")
        self.needed = needed
        self.available = available
        self.final = final


class WorkerDiedError(SafelightError):
    """The worker process ended. ``how``: the signal or the exit code."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the worker {how}")
        self.how = how


class QueueFullError(SafelightError):
    """The queue is full. ``waiting``: the number of waiting jobs. ``most``: of a person, if theirs are too many."""

    def __init__(self, waiting: int, most: int | None = None) -> None:
        super().__init__(
            f"the queue is full: {waiting} jobs are waiting; try again later (setting max_queue_size)"
            if most is None
            else f"{waiting} jobs of yours wait, and at most {most} may; wait until some have ended"
        )


class Cancelled(SafelightError):
    """The user cancelled the job, which ends without a result."""


class ErrorAnswer(NamedTuple):
    """How Safelight answers an error.

    ``exit_code``: the exit code of a command.
    ``status``: the HTTP status.
    ``kind``: the word in an HTTP response that names the kind of error.
    """

    exit_code: int
    status: int
    kind: str


ANSWERS: Mapping[type[SafelightError], ErrorAnswer] = {
    SafelightError: ErrorAnswer(1, 500, "failed"),
    InputError: ErrorAnswer(2, 422, "invalid_request"),
    RequestError: ErrorAnswer(2, 422, "invalid_request"),
    SettingError: ErrorAnswer(2, 422, "invalid_setting"),
    ExtensionError: ErrorAnswer(2, 422, "bad_extension"),
    MissingExtraError: ErrorAnswer(2, 422, "missing_extra"),
    ModelNotFoundError: ErrorAnswer(2, 404, "model_not_found"),
    FileError: ErrorAnswer(2, 422, "bad_file"),
    UnreadableFileError: ErrorAnswer(2, 422, "bad_file"),
    StorageError: ErrorAnswer(1, 507, "storage"),
    CorruptFileError: ErrorAnswer(2, 422, "bad_file"),
    UnsafeFileError: ErrorAnswer(2, 422, "bad_file"),
    UnsupportedModelError: ErrorAnswer(2, 422, "bad_file"),
    DownloadError: ErrorAnswer(2, 422, "bad_source"),
    IncompleteModelError: ErrorAnswer(2, 422, "bad_file"),
    IntegrityError: ErrorAnswer(1, 409, "integrity"),
    TransferError: ErrorAnswer(1, 500, "failed"),
    WorkerDiedError: ErrorAnswer(1, 503, "worker_not_ready"),
    QueueFullError: ErrorAnswer(1, 429, "queue_full"),
    DeviceLostError: ErrorAnswer(1, 503, "device_lost"),
    AbsentTensorError: ErrorAnswer(1, 500, "failed"),
    NotFiniteError: ErrorAnswer(1, 500, "failed"),
    BindingError: ErrorAnswer(1, 500, "failed"),
    CanaryError: ErrorAnswer(1, 500, "failed"),
    ModuleModifiedError: ErrorAnswer(1, 500, "failed"),
    OutOfMemoryError: ErrorAnswer(1, 409, "out_of_memory"),
    Cancelled: ErrorAnswer(130, 409, "cancelled"),
}
"""How the command line and the server answer each error. Both read this table alone."""


def answer_to(error: type[SafelightError]) -> ErrorAnswer:
    """Return the answer to a class of errors: its own, or that of the nearest class above it."""
    return next(ANSWERS[above] for above in error.__mro__ if above in ANSWERS)
