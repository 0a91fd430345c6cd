"""The adapters that a user has: ``ROOT/adapters/NAME.json`` is the record of one; its file stays where it is.

A pickle is converted once, into ``ROOT/adapters/converted``.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from dataclasses import replace
from pathlib import Path

from safelight.errors import (
    FileError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    UnreadableFileError,
    UnsupportedModelError,
)
from safelight.files import settle, written
from safelight.formats import adapter as files
from safelight.formats.identify import identify, read_header
from safelight.library import convert, paths, records, starters
from safelight.library.lock import alone
from safelight.library.model import Adapter, Origin
from safelight.weights.digest import named
from safelight.weights.manifest import FileHint, Manifest, measure, moved

PICKLES = (".pt", ".bin", ".pth", ".ckpt")

CONVERTED = "converted"
"""Below the records: what pickles were converted to."""


class Adapters:
    """The adapters under ``root``, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records = root / "adapters"

    def all(self) -> list[Adapter]:
        """By name, the user's own before the starters. Damaged records are left out."""
        found: list[Adapter] = []
        for path in sorted(self._records.glob("*.json")):
            with contextlib.suppress(FileError):
                found.append(records.read_adapter(path))
        names = {adapter.name for adapter in found}
        return [*found, *(adapter for adapter in starters.adapters() if adapter.name not in names)]

    def get(self, name: str) -> Adapter:
        """The adapter of that name. Raises ModelNotFoundError, which names the nearest."""
        path = self._records / f"{name}.json"
        if paths.NAME.fullmatch(name) and path.exists():
            return records.read_adapter(path)
        starter = next((adapter for adapter in starters.adapters() if adapter.name == name), None)
        if starter is not None:
            return starter
        known = [adapter.name for adapter in self.all()]
        raise ModelNotFoundError(name, difflib.get_close_matches(name, known, 3, 0.4), "adapter")

    def resolve(self, name_or_path: str) -> Adapter:
        """An adapter by its name, else by a path; a file used by its path is read and hashed the first time."""
        path = paths.user_path(name_or_path)
        if "/" not in name_or_path and path.suffix not in (".safetensors", *PICKLES):
            return self.get(name_or_path)
        path = path.absolute()
        if not os.path.lexists(path):
            raise UnreadableFileError(path, f"does not exist{paths.beside(path)}")
        seen = self.root / "seen" / "adapters" / f"{named(str(path))}.json"
        with contextlib.suppress(FileError):
            known = records.read_adapter(seen)
            if not known.manifest.changed():
                return known
        found = self._describe(path, paths.stem(path), "path")
        with alone(self.root):
            records.write(seen, found)
        return found

    def find(self, name: str, digest: str, by_path: bool = True) -> Adapter:
        """The adapter of that name (or path if ``by_path``) with that content, or another of the same content. Raises
        IntegrityError when there is none."""
        with contextlib.suppress(InputError):
            found = self.resolve(name) if by_path else self.get(name)
            if found.digest == digest:
                return self.checked(found)
        same = next((adapter for adapter in self.all() if adapter.digest == digest), None)
        if same is not None:
            return self.checked(same)
        raise IntegrityError(Path(name), "", f"no adapter has the content {digest[:10]} that was asked for")

    def add(self, path: Path, name: str | None = None, base: str = "") -> Adapter:
        """Identify an adapter, read and hash all of it, and keep its record. The file stays where it is.

        ``base`` is the user's word for what it belongs to, and goes above what the file says.

        Raises InputError when the name is taken by another file or not allowed, FileError for a bad file.
        """
        path = paths.user_path(str(path)).absolute()
        chosen = paths.chosen(name, path)
        found = self._describe(path, chosen, "added", base)
        with alone(self.root):
            taken = next((adapter for adapter in self.all() if adapter.name == chosen), None)
            if taken is not None and taken.path != path:
                raise InputError(f"the name {chosen!r} is taken by {taken.path}; give another with --name")
            records.write(self._records / f"{chosen}.json", found)
        return found

    def remove(self, name: str) -> None:
        """Forget an adapter, also one whose record is damaged. Its file stays. Starters cannot be removed."""
        path = self._records / f"{name}.json"
        if not (paths.NAME.fullmatch(name) and path.exists()):
            starter = self.get(name)
            raise InputError(f"{starter.name!r} is a starter, part of the installation; it cannot be removed")
        with alone(self.root):
            path.unlink(missing_ok=True)
            kept = {f"{adapter.digest}.safetensors" for adapter in self.all()}
            for file in (self._records / CONVERTED).glob("*.safetensors"):
                if file.name not in kept:
                    file.unlink(missing_ok=True)

    def checked(self, adapter: Adapter) -> Adapter:
        """The adapter, if its file is as it was; when its hint differs, it is read again. Raises IntegrityError."""
        return adapter if not adapter.manifest.changed() else self.verify(adapter)

    def verify(self, adapter: Adapter) -> Adapter:
        """Read and hash all of it again. Raises IntegrityError when its content is another."""
        try:
            told = adapter.base if adapter.told else ""
            fresh = self._describe(adapter.path, adapter.name, adapter.origin, told)
        except FileError as error:
            raise IntegrityError(error.path, "", error.problem, "Put the right file back, or add it again.") from error
        if fresh.digest != adapter.digest:
            raise IntegrityError(adapter.path, "", "its content changed", "Add it again if that was meant.")
        if adapter.origin == "added":
            with alone(self.root):
                records.write(self._records / f"{adapter.name}.json", fresh)
        return replace(fresh, name=adapter.name)

    def _describe(self, path: Path, name: str, origin: Origin, told: str = "") -> Adapter:
        found = identify(path)
        if found.kind not in files.KINDS:
            todo = "; `safelight models add` takes it" if found.kind == "checkpoint" else ""
            raise UnsupportedModelError(path, f"is a {found.kind} ({found.rule}), not an adapter{todo}")
        if found.format == "pickle":
            manifest = self._converted(path, found.kind)
        else:
            manifest = measure((files.layout(read_header(path), found.kind),))
        base, rule = told or found.base or "", f"{found.rule}; for {told} by the user's word" if told else found.rule
        return Adapter(name, path, found.kind, base, found.dtype, found.format, origin, rule, manifest, bool(told))

    def _converted(self, path: Path, kind: str) -> Manifest:
        """Of what a pickle was converted to, once, under the name of its content; it watches over the pickle too."""
        home = self._records / CONVERTED
        with written(home) as (file, temporary):
            convert.to_safetensors(files.read_tensors(read_header(path), kind), file)
            settle(file, temporary)
            with convert.blamed(path, temporary):
                manifest = measure((files.layout(read_header(temporary), kind),))
            place = home / f"{manifest.digest}.safetensors"
            os.replace(temporary, place)
        manifest = moved(manifest, place)
        return replace(manifest, files=(*manifest.files, FileHint.of(path)))
