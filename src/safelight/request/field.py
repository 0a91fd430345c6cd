"""How a field of a request is declared, and what follows from a declaration: its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from safelight.extensions import Extensible
from safelight.request import checks


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What is known of a field beside its name, type and default. Everything that shows a field reads it here: the
    command line, the API, the page, the documentation.

    ``help``: what the field does, in a sentence or two. ``group``: under which heading it is shown.
    ``label``: how the page calls it, where that is not the name.
    ``least``, ``most``: bounds of a number, both allowed. ``above``: a bound that is not allowed itself.
    ``most`` of a list: how many items it may have.
    ``multiple``: a whole number is a multiple of this.
    ``values``: the words that a text may be, where its type does not list them; a table if packages can add some.
    ``needs``: names of fields; this field has an effect only if at least one of them is set.
    ``a1111``, ``openai``: the field's name in those APIs; "" if they lack it.
    ``option``: how the command line calls it, several names with a space between them; "" for its own name; None where
    the command line does not have it.
    ``since``: the version of stored requests that first had it (:data:`safelight.request.schema.VERSION`).
    ``earlier``: old defaults: {the last version of stored requests that had it: the default}.
    """

    help: str
    group: str = ""
    label: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    multiple: int = 1
    values: Collection[str] = ()
    needs: tuple[str, ...] = ()
    a1111: str = ""
    openai: str = ""
    option: str | None = ""
    since: int = 1
    earlier: Mapping[int, Any] = dataclasses.field(default_factory=dict[int, Any])


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a dataclass whose annotations carry a :class:`Declared`. ``type``: without None and without the
    declaration."""

    name: str
    type: Any
    optional: bool
    required: bool
    default: Any
    declared: Declared

    @property
    def allowed(self) -> Collection[str]:
        """The words that a text may be, () for any."""
        return get_args(self.type) if get_origin(self.type) is Literal else self.declared.values

    @property
    def builtin(self) -> Collection[str]:
        """The allowed words without those of installed packages, which take time to read."""
        return self.allowed.builtin if isinstance(self.allowed, Extensible) else self.allowed

    @property
    def label(self) -> str:
        """How the page calls it."""
        return self.declared.label or self.name.replace("_", " ").capitalize()

    @property
    def help(self) -> str:
        """What it does, and which built-in words are allowed."""
        words = ", ".join(word for word in self.builtin if word)
        return f"{self.declared.help} One of {words}." if words else self.declared.help

    @property
    def options(self) -> tuple[str, ...]:
        """How the command line calls it, () where it does not have it."""
        if self.declared.option is None:
            return ()
        return tuple(self.declared.option.split()) or (f"--{self.name.replace('_', '-')}",)

    def default_in(self, version: int) -> Any:
        """Its default in stored requests of that version."""
        return next((value for upto, value in sorted(self.declared.earlier.items()) if version <= upto), self.default)

    def check(self, value: Any, field_name: str = "", what: str = "") -> None:
        """Raise RequestError when the value is not allowed; fields of other types than texts, numbers and switches are
        checked where they are read. ``field_name``, ``what``: how the error names it, where the field is a part of
        another one."""
        name, said = field_name or self.name, self.declared
        if value is None and self.optional:
            return
        if self.allowed:
            checks.one_of(name, value, self.allowed, what)
        elif self.type is str:
            checks.text(name, value)
        elif self.type is bool:
            checks.boolean(name, value)
        elif self.type is int:
            checks.within(name, value, int(said.least or 0), int(said.most or 0), said.multiple)
        elif self.type is float and said.above is not None:
            checks.above(name, value, said.above, said.most or 0, what)
        elif self.type is float:
            checks.number(name, value, said.least or 0, said.most or 0, what)


@lru_cache
def fields_of(kind: type) -> Mapping[str, Field]:
    """The fields of a dataclass, by name, in their order.

    Raises TypeError for a field that is not declared, or a number without bounds.
    """
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, Field] = {}
    for one in dataclasses.fields(kind):
        declared = next(
            (extra for extra in getattr(hints[one.name], "__metadata__", ()) if isinstance(extra, Declared)), None
        )
        if declared is None:
            raise TypeError(f"{kind.__name__}.{one.name} has no Declared")
        plain = get_args(hints[one.name])[0]
        kinds = get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)
        [own] = [each for each in kinds if each is not NoneType]
        if own in (int, float) and (declared.most is None or (declared.least is None and declared.above is None)):
            raise TypeError(f"{kind.__name__}.{one.name} is a number without bounds")
        required = one.default is dataclasses.MISSING
        found[one.name] = Field(one.name, own, NoneType in kinds, required, None if required else one.default, declared)
    return found
