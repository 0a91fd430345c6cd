"""How long each person's jobs have computed, so that people take turns. No torch, no I/O.

This is start-time fair queueing: a person who had no work for a while comes back with the share of the least served of
those who have work. Nobody saves up turns, and nobody is punished for earlier work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection


class Shares:
    """The seconds that each person's jobs have computed, divided by the person's weight.

    ``weight``: of a person; two people with weights 1 and 2 get one and two thirds of the time.
    """

    def __init__(self, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        self._weight = weight
        self._served: dict[str, float] = {}

    def leads(self, people: Collection[str]) -> dict[str, float]:
        """Return how many seconds each of these people is ahead of the least served.

        ``people``: those whose jobs wait or run. All others are forgotten.
        """
        present = {person: served for person, served in self._served.items() if person in people}
        least = min(present.values(), default=0.0)
        self._served = {person: present.get(person, least) for person in people}
        return {person: served - least for person, served in self._served.items()}

    def charge(self, person: str, seconds: float) -> None:
        """Add seconds of computing to a person's share; negative ones correct a prediction."""
        self._served[person] = self._served.get(person, 0.0) + seconds / self._weight(person)
