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
class FieldDeclaration:
    """The description of a field besides its name, type and default. The command line, the API, the page and the
    documentation read it.

    ``help``: what the field does, in a sentence or two.
    ``group``: the heading under which it is shown.
    ``label``: its name on the page; "": derive it from the field's name.
    ``minimum``, ``maximum``: inclusive bounds of a number. ``maximum`` of a list: the largest number of items.
    ``exclusive_minimum``: an exclusive lower bound.
    ``multiple``: a whole number must be a multiple of this.
    ``values``: allowed strings, if the type is not a Literal. An ``Extensible`` if packages can add values.
    ``needs``: names of fields; this field has an effect only if at least one of them is set.
    ``a1111``, ``openai``: the field's name in those APIs; "" if they lack it.
    ``option``: command-line flags, separated by spaces. "": derive the flag from the field's name. None: no flag.
    ``since``: the version of stored requests that first had it (:data:`safelight.request.schema.VERSION`).
    ``old_defaults``: defaults of earlier request versions: maps the last version that used a default to that default.
    """

    help: str
    group: str = ""
    label: str = ""
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    multiple: int = 1
    values: Collection[str] = ()
    needs: tuple[str, ...] = ()
    a1111: str = ""
    openai: str = ""
    option: str | None = ""
    since: int = 1
    old_defaults: Mapping[int, Any] = dataclasses.field(default_factory=dict[int, Any])


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a dataclass whose annotations contain a :class:`FieldDeclaration`.

    ``type``: without None and without the declaration.
    ``allowed``: the allowed strings; () if any string is allowed.
    """

    name: str
    type: Any
    optional: bool
    required: bool
    default: Any
    declared: FieldDeclaration
    allowed: Collection[str] = ()

    @property
    def builtin(self) -> Collection[str]:
        """The allowed strings without those of installed packages, which take time to read."""
        return self.allowed.builtin if isinstance(self.allowed, Extensible) else self.allowed

    @property
    def label(self) -> str:
        """Its name on the page."""
        return self.declared.label or self.name.replace("_", " ").capitalize()

    @property
    def help(self) -> str:
        """What it does, and which built-in strings are allowed."""
        words = ", ".join(word for word in self.builtin if word)
        return f"{self.declared.help} One of {words}." if words else self.declared.help

    @property
    def options(self) -> tuple[str, ...]:
        """Its command-line flags; () if it has none."""
        if self.declared.option is None:
            return ()
        return tuple(self.declared.option.split()) or (f"--{self.name.replace('_', '-')}",)

    def default_in(self, version: int) -> Any:
        """Return its default in stored requests of that version."""
        return next(
            (value for upto, value in sorted(self.declared.old_defaults.items()) if version <= upto), self.default
        )

    def check(self, value: Any, field_name: str = "", what: str = "") -> None:
        """Check a str, int, float or bool value; other types are checked by their own classes.

        ``field_name``, ``what``: for a nested field (such as ``controls[].weight``), the outer field's name and the
        inner field's name in the error.
        Raises RequestError when the value is not allowed.
        """
        name, declared = field_name or self.name, self.declared
        if value is None and self.optional:
            return
        if self.allowed:
            checks.one_of(name, value, self.allowed, what)
        elif self.type is str:
            checks.text(name, value)
        elif self.type is bool:
            checks.boolean(name, value)
        elif self.type is int:
            checks.within(name, value, int(declared.minimum or 0), int(declared.maximum or 0), declared.multiple)
        elif self.type is float and declared.exclusive_minimum is not None:
            checks.above(name, value, declared.exclusive_minimum, declared.maximum or 0, what)
        elif self.type is float:
            checks.number(name, value, declared.minimum or 0, declared.maximum or 0, what)


@lru_cache
def fields_of(kind: type) -> Mapping[str, Field]:
    """Return the fields of a dataclass, by name, in their order.

    Raises TypeError for a field that is not declared, or a number without bounds.
    """
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, Field] = {}
    for one in dataclasses.fields(kind):
        declared = next(
            (extra for extra in getattr(hints[one.name], "__metadata__", ()) if isinstance(extra, FieldDeclaration)),
            None,
        )
        if declared is None:
            raise TypeError(f"{kind.__name__}.{one.name} has no FieldDeclaration")
        plain = get_args(hints[one.name])[0]
        kinds = get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)
        [own] = [each for each in kinds if each is not NoneType]
        if own in (int, float) and (
            declared.maximum is None or (declared.minimum is None and declared.exclusive_minimum is None)
        ):
            raise TypeError(f"{kind.__name__}.{one.name} is a number without bounds")
        required = one.default is dataclasses.MISSING
        default = None if required else one.default
        # Found once, because every request checks every field.
        allowed = get_args(own) if get_origin(own) is Literal else declared.values
        found[one.name] = Field(one.name, own, NoneType in kinds, required, default, declared, allowed)
    return found
