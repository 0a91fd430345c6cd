"""What moves where: from what is resident, what is needed and how much may be used, to steps with reasons.

A pure function of its arguments, without torch and without I/O. It decides where bytes are, never how sums are done.

A component that fits is made resident whole. One that does not is resident in part: some pieces stay, the others are
*streamed*: brought into one of a few slots of a ring each time they are used. Among what is not needed now, that is
dropped which will be wanted last: first what nothing is known to want, the longest unused first; then what the rest of
the job and the queue want, the latest first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["keep", "load", "stream", "drop"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment as the planner sees it: number ``index`` in the order of use of ``component``, ``nbytes`` bytes."""

    component: str
    index: int
    nbytes: int

    def is_of(self, digests: Collection[str] | None) -> bool:
        """Whether it belongs to one of the components of those digests; None means all."""
        return digests is None or any(f" {digest[:16]} " in self.component for digest in digests)


@dataclass(frozen=True, slots=True)
class Resident:
    """A piece that is there. ``used``: a clock's count when it was last used. ``held``: leased by somebody else."""

    piece: Piece
    used: int = 0
    held: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """What a plan is made from.

    ``budget``: bytes for weights, all that is resident included. ``needed``: the pieces of one component in the order
    of use, used ``passes`` times; none, to make room only. ``upcoming``: components in the order in which they will be
    wanted after it. ``partial``: whether it may be resident in part. ``ahead``: pieces brought while another is used.
    """

    budget: int
    residents: tuple[Resident, ...]
    needed: tuple[Piece, ...]
    passes: int = 1
    upcoming: tuple[str, ...] = ()
    partial: bool = True
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """``action`` for ``piece``, and the rule that said so."""

    action: Action
    piece: Piece
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """``steps``: drops first, then what stays, is loaded or streamed, in the order of use. ``slots`` of
    ``slot_bytes`` bytes each make the ring, none when nothing is streamed."""

    steps: tuple[Step, ...]
    slots: int = 0
    slot_bytes: int = 0

    def pieces(self, action: Action) -> tuple[Piece, ...]:
        return tuple(step.piece for step in self.steps if step.action == action)

    @property
    def staying(self) -> set[int]:
        """The numbers of the segments that are resident once the plan is carried out."""
        return {piece.index for action in ("keep", "load") for piece in self.pieces(action)}

    def nbytes(self, action: Action) -> int:
        return sum(piece.nbytes for piece in self.pieces(action))

    def moved(self, passes: int) -> int:
        """Bytes that the plan moves: each load once, each streamed piece at every pass."""
        return self.nbytes("load") + passes * self.nbytes("stream")

    def described(self) -> list[dict[str, Any]]:
        """The steps as plain values: action, segment, bytes, reason."""
        return [
            {
                "action": step.action,
                "segment": f"{step.piece.component} {step.piece.index}",
                "nbytes": step.piece.nbytes,
                "reason": step.reason,
            }
            for step in self.steps
        ]


@dataclass(frozen=True, slots=True)
class Refusal:
    """No plan: at least ``least`` bytes are needed, ``available`` can be had beside what is held. Why: ``reason``."""

    least: int
    available: int
    reason: str


def plan(given: Situation) -> Plan | Refusal:
    """The steps, or why there are none. The same situation always gives the same plan."""
    here = {resident.piece: resident for resident in given.residents}
    wanted = set(given.needed)
    held = sum(r.piece.nbytes for r in given.residents if r.held and r.piece not in wanted)
    available = given.budget - held
    total = sum(piece.nbytes for piece in given.needed)
    slots, slot_bytes = 0, 0
    if total <= available or not given.needed:
        staying = set(given.needed)
    else:
        slots, slot_bytes = given.ahead + 1, max(piece.nbytes for piece in given.needed)
        fixed = [piece for piece in given.needed if piece in here and here[piece].held]
        least = slots * slot_bytes + sum(piece.nbytes for piece in fixed)
        refusal = _refusal(given, total, available, least)
        if refusal is not None:
            return refusal
        # What is there already costs nothing to keep; of the rest, what is used first.
        ranked = sorted(set(given.needed).difference(fixed), key=lambda piece: (piece not in here, piece.index))
        staying = {*fixed, *_that_fit(ranked, available - least)}
    room = available - slots * slot_bytes - sum(piece.nbytes for piece in staying)
    others = [r for r in given.residents if not r.held and r.piece not in wanted]
    kept_others = set(_that_fit(_by_worth(others, given.upcoming), room))
    steps = [
        Step("drop", r.piece, _why_dropped(r, given.upcoming))
        for r in sorted(others, key=lambda r: (r.piece.component, r.piece.index))
        if r.piece not in kept_others
    ]
    steps += [
        Step("drop", piece, "does not fit beside the pieces used before it")
        for piece in given.needed
        if piece in here and piece not in staying
    ]
    steps += [_use(piece, here, staying, total, available) for piece in given.needed]
    return Plan(tuple(steps), slots, slot_bytes)


def _refusal(given: Situation, total: int, available: int, least: int) -> Refusal | None:
    if not given.partial:
        return Refusal(total, available, "partial loading is off, so it must be resident whole")
    if least > available:
        return Refusal(least, available, "weights are streamed in pieces, and the largest one needs this much")
    return None


def _that_fit(ranked: Iterable[Piece], room: int) -> list[Piece]:
    """The first pieces that fit together; none behind the first that does not, so that more room never means less."""
    chosen: list[Piece] = []
    for piece in ranked:
        room -= piece.nbytes
        if room < 0:
            break
        chosen.append(piece)
    return chosen


def _by_worth(residents: Sequence[Resident], upcoming: Sequence[str]) -> list[Piece]:
    """The most worthy first: wanted soonest, else used last; of one component, what is used first."""
    place = {component: number for number, component in reversed(list(enumerate(upcoming)))}
    never = len(upcoming)

    def worth(resident: Resident) -> tuple[int, int, str, int]:
        piece = resident.piece
        return place.get(piece.component, never), -resident.used, piece.component, piece.index

    return [resident.piece for resident in sorted(residents, key=worth)]


def _why_dropped(resident: Resident, upcoming: Sequence[str]) -> str:
    if resident.piece.component in upcoming:
        return f"makes room; it is wanted again only after {upcoming.index(resident.piece.component)} others"
    return "makes room; nothing that is known will want it"


def _use(piece: Piece, here: Mapping[Piece, Resident], staying: set[Piece], total: int, available: int) -> Step:
    if piece not in staying:
        return Step("stream", piece, f"the component's {total} bytes are over the {available} that can be had")
    if piece in here:
        return Step("keep", piece, "is there")
    return Step("load", piece, "is needed and fits")
