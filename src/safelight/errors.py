"""Everything that Safelight raises on purpose.

::

    SafelightError
    ├── InputError                what was asked for cannot be done (exit code 2, HTTP 4xx)
    │   ├── RequestError          a field of a request: its name, its value, what is allowed
    │   ├── SettingError          a setting, and where its value came from
    │   ├── ModelNotFoundError    no such model; names the nearest
    │   ├── FileError             a file: its path and what is wrong with it
    │   │   ├── UnreadableFileError   not there, not a file, not allowed
    │   │   │   └── StorageError      a disk is full or cannot be written (exit code 1, HTTP 507)
    │   │   ├── CorruptFileError      the bytes are not what the format says
    │   │   ├── UnsafeFileError       a pickle that wants to run something
    │   │   └── UnsupportedModelError a sound file that is not (or not yet) a checkpoint
    │   └── IncompleteModelError  tensors missing, of another shape, or left over
    ├── IntegrityError            bytes differ from the manifest; the file changed or was spoiled
    ├── TransferError             bytes arrived on a device otherwise than they were sent, repeatedly
    ├── WorkerDiedError           the process that computes has ended
    ├── QueueFullError            too many jobs wait already (HTTP 429)
    ├── DeviceLostError           a device is gone: nothing on it can be had any more
    ├── AbsentTensorError         a module computed with a tensor that is not there
    ├── NotFiniteError            a model computed NaN or infinity
    ├── BindingError              a skeleton is bound already, or was used outside its binding
    ├── CanaryError               a model's known tiny image came out otherwise
    ├── StateLeftError            something was left on a model while it computed
    ├── OutOfMemoryError          what was needed, what there was, which setting would help
    └── Cancelled                 the user asked to stop
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def printable(text: str) -> str:
    """The text with what is no character to show (control characters, halves of surrogate pairs) as escapes: what a
    file says reaches terminals, logs and JSON."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class SafelightError(Exception):
    """Root of the tree. ``str()`` of it is one message for a person, printable whatever a file says."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(SafelightError):
    """What was asked for cannot be done; nothing was changed."""


class RequestError(InputError):
    """A field of a request has a value that is not allowed.

    ``field`` is the field's name in :class:`safelight.Request`, ``value`` what it held.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}")
        self.field = field
        self.value = value
        self.problem = problem


class SettingError(InputError):
    """A setting has a value that is not allowed. ``origin`` says where the value came from."""

    def __init__(self, name: str, value: object, origin: str, problem: str) -> None:
        super().__init__(f"setting {name}={value!r} (from {origin}): {problem}")
        self.name = name
        self.origin = origin


class ModelNotFoundError(InputError):
    """No model (or adapter, or VAE: ``what``) of that name. ``near`` holds the names that are most like it."""

    def __init__(self, name: str, near: Sequence[str], what: str = "model") -> None:
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        lists = f"`safelight {'model' if what == 'model' else 'adapter'}s list` shows all"
        also = " that have a file of their own; a model's name means its VAE" if what == "VAE" else ""
        super().__init__(f"no {what} named {name!r} in the library.{hint} {lists}{also}.")
        self.name = name
        self.near = tuple(near)


class FileError(InputError):
    """Something is wrong with a file. ``path`` is the file, ``problem`` the sentence without it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class UnreadableFileError(FileError):
    """Not there, not a regular file, or not allowed to be read."""


class StorageError(UnreadableFileError):
    """A disk is full, or cannot be written any more: nothing was lost, and it is tried again when there is room."""


class CorruptFileError(FileError):
    """The bytes are not what the format says: truncated, overlapping, not this format at all."""


class UnsafeFileError(FileError):
    """A pickle that wants to import or run something. ``wanted`` lists what."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        listed = ", ".join(wanted)
        super().__init__(path, f"refused: opening it would run {listed}. Ask its author for a .safetensors file.")
        self.wanted = tuple(wanted)


class UnsupportedModelError(FileError):
    """A sound file that is not a checkpoint which Safelight can run. The problem says what it is."""


class IncompleteModelError(InputError):
    """A checkpoint lacks tensors, has some of another shape, or has some that nothing uses."""

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
                ("of another shape", mismatched),
                ("that nothing uses", unexpected),
            )
            if names
        ]
        lacks = "a complete" if missing or mismatched else "just a"
        super().__init__(f"{path}: not {lacks} {what}; tensors " + "; ".join(parts) + ". Get it from its author again.")
        self.path = path
        self.what = what
        self.missing = tuple(missing)
        self.mismatched = tuple(mismatched)
        self.unexpected = tuple(unexpected)


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


class IntegrityError(SafelightError):
    """Bytes that were read differ from the manifest made when the model was added. ``tensor``: which, empty for all."""

    def __init__(self, path: Path, tensor: str, problem: str, remedy: str = "") -> None:
        where = f"{path}: tensor {tensor}" if tensor else f"{path}"
        super().__init__(f"{where}: {problem}. {remedy or _CHANGED}")
        self.path = path
        self.tensor = tensor


_CHANGED = "The file is not the one that was added: if that is meant, `safelight models add` it again."


class TransferError(SafelightError):
    """A copy to a device arrived otherwise than it was sent, and so did its repetition."""

    def __init__(self, what: str, device: str, nbytes: int) -> None:
        super().__init__(
            f"{what}: {nbytes} bytes arrived on {device} otherwise than they were sent, twice. The device's memory or "
            f"its driver is not to be trusted; --device cpu does without it."
        )
        self.what = what


class DeviceLostError(SafelightError):
    """A device is gone (unplugged, reset, its driver crashed): nothing on it can be had any more."""

    def __init__(self, device: str) -> None:
        super().__init__(f"the device {device} is gone; start again, or use --device cpu")
        self.device = device


class AbsentTensorError(SafelightError):
    """A module computed with a tensor that is not bound. ``tensor`` is its name."""

    def __init__(self, tensor: str, operation: str) -> None:
        super().__init__(f"{operation} was called with tensor {tensor}, which is not bound: no weights are there")
        self.tensor = tensor


class NotFiniteError(SafelightError):
    """A stage of a generation computed NaN or infinity; an image of it would be black."""

    def __init__(self, stage: str, dtype: str) -> None:
        hint = "" if dtype == "fp32" else " --precision fp32 has a wider range."
        super().__init__(f"{stage} gave NaN or infinity in {dtype}; there is no image.{hint}")
        self.stage = stage


class BindingError(SafelightError):
    """A skeleton is bound already, or weights do not fit it."""


class StateLeftError(SafelightError):
    """A model was changed while it computed (a hook, a processor, a flag): ``changed`` names what."""

    def __init__(self, role: str, changed: Sequence[str]) -> None:
        super().__init__(f"the {role} was changed while it computed: {shortened(changed)}")
        self.role = role
        self.changed = tuple(changed)


class CanaryError(SafelightError):
    """A model's canary is not the known one: ``difference`` says how far it is from it."""

    def __init__(self, model: str, difference: str) -> None:
        super().__init__(
            f"the canary of {model} came out otherwise than in a fresh process ({difference}); no image of it can be "
            "trusted now. `safelight doctor` looks for the cause"
        )
        self.model = model
        self.difference = difference


class OutOfMemoryError(SafelightError):
    """Memory for a model or for computing cannot be had. Sizes are bytes; ``needed`` is 0 when it is not known.

    ``final``: all that could be dropped was dropped already, so that trying again would not help.
    """

    def __init__(self, what: str, needed: int, available: int, hint: str, final: bool = False) -> None:
        sizes = f"needs {needed / 1e6:.1f} MB, {available / 1e6:.1f} MB can be had" if needed else "ran out of memory"
        super().__init__(f"{what} {sizes}. {hint}")
        self.needed = needed
        self.available = available
        self.final = final


class WorkerDiedError(SafelightError):
    """The process that computes has ended. ``how``: by a signal, or with which exit code."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the worker {how}")
        self.how = how


class QueueFullError(SafelightError):
    """``waiting`` jobs wait, and more are not taken."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} jobs are waiting, and no more are taken; try again later (max_queue_size)")


class Cancelled(SafelightError):
    """The user asked to stop; the job ends without a result."""
