"""Decides, from resident pieces, needed pieces and a budget, which pieces to keep, load, stream or evict.

:func:`plan` is a pure function, without torch and without I/O. It gives a reason for each action. It decides where
bytes are, and never how results are computed.

A component that fits is loaded whole. A component that does not fit is loaded in part: some pieces are resident, and
the others are *streamed*, which means that they are copied into a slot of a small ring each time they are used.

Pieces that the component does not need are evicted in this order:

1. pieces that no known job wants, the least recently used first;
2. pieces that the rest of the job or the queue wants, those needed furthest in the future first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ActionName = Literal["keep", "load", "stream", "drop"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment as the planner sees it: ``nbytes`` bytes, at position ``index`` in its component's order of use.

    ``component_key``: see :func:`safelight.memory.segments.component_key`.
    """

    component_key: str
    index: int
    nbytes: int

    def is_of(self, digests: Collection[str] | None) -> bool:
        """Whether the piece belongs to a component with one of ``digests``. None means every component."""
        return digests is None or any(f" {digest[:16]} " in self.component_key for digest in digests)


@dataclass(frozen=True, slots=True)
class Resident:
    """A piece in memory.

    ``last_used``: when it was last used: a counter, not a time.
    ``held``: another lease holds it.
    """

    piece: Piece
    last_used: int = 0
    held: bool = False


@dataclass(frozen=True, slots=True)
class PlanInput:
    """The planner's input.

    ``budget``: bytes for weights, including the resident pieces.
    ``residents``: all pieces in memory.
    ``needed``: the pieces of one component in the order of use. Empty: only make room.
    ``forward_passes``: how often the needed pieces are used.
    ``upcoming``: the components wanted after this one, the soonest first.
    ``partial``: whether the component may be resident in part.
    ``ahead``: how many pieces are read ahead while another is used.
    """

    budget: int
    residents: tuple[Resident, ...]
    needed: tuple[Piece, ...]
    forward_passes: int = 1
    upcoming: tuple[str, ...] = ()
    partial: bool = True
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Action:
    """What to do with ``piece``. ``reason`` is the rule that decided it."""

    name: ActionName
    piece: Piece
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The planner's decision.

    ``actions``: drops (evictions) first, then the needed pieces in the order of use.
    ``slots``: number of ring slots, 0 if nothing is streamed.
    ``slot_bytes``: bytes of each slot.
    """

    actions: tuple[Action, ...]
    slots: int = 0
    slot_bytes: int = 0

    def pieces(self, name: ActionName) -> tuple[Piece, ...]:
        return tuple(action.piece for action in self.actions if action.name == name)

    @property
    def staying(self) -> set[int]:
        """The indices of the segments that are resident after the plan is carried out."""
        return {piece.index for name in ("keep", "load") for piece in self.pieces(name)}

    def nbytes(self, name: ActionName) -> int:
        return sum(piece.nbytes for piece in self.pieces(name))

    def moved(self, forward_passes: int) -> int:
        """Bytes that the plan moves in ``forward_passes`` passes: each load once, each streamed piece at each pass."""
        return self.nbytes("load") + forward_passes * self.nbytes("stream")

    def describe(self) -> list[dict[str, Any]]:
        """Return the actions as plain values: action, segment, bytes, reason."""
        return [
            {
                "action": action.name,
                "segment": f"{action.piece.component_key} {action.piece.index}",
                "nbytes": action.piece.nbytes,
                "reason": action.reason,
            }
            for action in self.actions
        ]


@dataclass(frozen=True, slots=True)
class Refusal:
    """No plan is possible, because of ``reason``.

    ``least``: the smallest number of bytes that would do.
    ``available``: bytes left beside the held pieces.
    """

    least: int
    available: int
    reason: str


def plan(plan_input: PlanInput) -> Plan | Refusal:
    """Plan the actions, or return why no plan is possible. The same input always gives the same plan."""
    in_memory = {resident.piece: resident for resident in plan_input.residents}
    needed = set(plan_input.needed)
    held_bytes = sum(r.piece.nbytes for r in plan_input.residents if r.held and r.piece not in needed)
    available = plan_input.budget - held_bytes
    total = sum(piece.nbytes for piece in plan_input.needed)
    slots, slot_bytes = 0, 0
    if total <= available or not plan_input.needed:
        staying = set(plan_input.needed)
    else:
        slots, slot_bytes = plan_input.ahead + 1, max(piece.nbytes for piece in plan_input.needed)
        fixed = [piece for piece in plan_input.needed if piece in in_memory and in_memory[piece].held]
        least = slots * slot_bytes + sum(piece.nbytes for piece in fixed)
        refusal = _refusal(plan_input, total, available, least)
        if refusal is not None:
            return refusal
        # Pieces that are resident already cost nothing to keep. The others follow in the order of use.
        ranked = sorted(needed.difference(fixed), key=lambda piece: (piece not in in_memory, piece.index))
        staying = {*fixed, *_fitting(ranked, available - least)}
    room = available - slots * slot_bytes - sum(piece.nbytes for piece in staying)
    others = [r for r in plan_input.residents if not r.held and r.piece not in needed]
    staying_others = set(_fitting(_by_worth(others, plan_input.upcoming), room))
    actions = [
        Action("drop", r.piece, _why_dropped(r, plan_input.upcoming))
        for r in sorted(others, key=lambda r: (r.piece.component_key, r.piece.index))
        if r.piece not in staying_others
    ]
    actions += [
        Action("drop", piece, "does not fit beside the pieces used before it")
        for piece in plan_input.needed
        if piece in in_memory and piece not in staying
    ]
    actions += [_use(piece, in_memory, staying, total, available) for piece in plan_input.needed]
    return Plan(tuple(actions), slots, slot_bytes)


def _refusal(plan_input: PlanInput, total: int, available: int, least: int) -> Refusal | None:
    if not plan_input.partial:
        return Refusal(total, available, "partial loading is off, and the whole component must be in memory")
    if least > available:
        return Refusal(
            least, available, "even streaming needs memory for the ring's slots, each as large as the largest segment"
        )
    return None


def _fitting(ranked: Iterable[Piece], room: int) -> list[Piece]:
    """The longest prefix of ``ranked`` that fits.

    Pieces after the first that does not fit are left out, so that more room never gives fewer pieces.
    """
    chosen: list[Piece] = []
    for piece in ranked:
        room -= piece.nbytes
        if room < 0:
            break
        chosen.append(piece)
    return chosen


def _by_worth(residents: Sequence[Resident], upcoming: Sequence[str]) -> list[Piece]:
    """Sort residents: wanted soonest first, then most recently used, then by the order of use in their component."""
    place = {component: number for number, component in reversed(list(enumerate(upcoming)))}
    never = len(upcoming)

    def worth(resident: Resident) -> tuple[int, int, str, int]:
        piece = resident.piece
        return place.get(piece.component_key, never), -resident.last_used, piece.component_key, piece.index

    return [resident.piece for resident in sorted(residents, key=worth)]


def _why_dropped(resident: Resident, upcoming: Sequence[str]) -> str:
    if resident.piece.component_key in upcoming:
        earlier = upcoming.index(resident.piece.component_key)
        return f"evicted to make room; {earlier} other components are wanted before it"
    return "evicted to make room; no known job wants it"


def _use(piece: Piece, in_memory: Mapping[Piece, Resident], staying: set[Piece], total: int, available: int) -> Action:
    if piece not in staying:
        return Action("stream", piece, f"the component's {total} bytes exceed the {available} available bytes")
    if piece in in_memory:
        return Action("keep", piece, "is already in memory")
    return Action("load", piece, "is needed and fits")
