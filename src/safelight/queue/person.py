"""The people who use a server, and what each may see. No torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["admin", "member", "guest"]
"""What a person may do.

``admin``: everything, also models, settings and people.
``member``: make images, add models.
``guest``: make images within limits.
"""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who uses the server.

    ``name``: "" for the one user of a server that knows no people.
    ``weight``: the share of computing time, relative to other people who wait.
    ``created``: in seconds since 1970.
    """

    name: str
    role: Role = "admin"
    weight: float = 1.0
    created: float = 0.0

    @property
    def sees_all(self) -> bool:
        """Whether the person sees what belongs to others."""
        return self.role == "admin"

    def may(self, role: Role) -> bool:
        """Return whether the person may do what a role may."""
        return ROLES.index(self.role) <= ROLES.index(role)

    def owns(self, owner: str) -> bool:
        """Return whether something of ``owner`` is the person's to see and change."""
        return self.sees_all or owner == self.name


LOCAL = Person("")
"""The user of a server that knows no people, and the server itself."""
