"""Finds the tensor of a wrong shape that misled the inference of a component's settings.

The settings follow from the shapes of a few tensors. If one of these is wrong, the settings are wrong, and all other
tensors seem to be of a wrong shape. The wrong tensor is the one with which, in another shape, most of the others agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow

Infer = Callable[[Shapes], Config]


class RecordedShapes(dict[str, tuple[int, ...]]):
    """Shapes that record which of them were read. ``read``: their names, in the order of the first reading."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.read: dict[str, None] = {}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        found = super().__getitem__(name)
        self.read[name] = None
        return found

    def get(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[name] if name in self else default  # noqa: SIM401  (it would call itself)


def count_mismatches(rows: Iterable[TensorRow], shapes: Shapes, most: int) -> int:
    """Count the tensors whose shape differs from the table's. It stops at ``most``."""
    count = 0
    for row in rows:
        source = next((source for source in row.sources if source.name in shapes), None)
        if source is not None and not source.fits(row.shape, shapes[source.name]):
            count += 1
            if count >= most:
                break
    return count


def find_misleading(infer: Infer, shapes: Shapes, wrong: Collection[str]) -> Config | None:
    """Return the settings that follow from all tensors but the one that misled ``infer``.

    ``wrong``: the names of the tensors that do not fit the settings that were inferred.
    Returns None if no other shape of a single tensor explains them.
    """
    recorded = RecordedShapes(shapes)
    tried = {infer(recorded)}
    # A tensor that explains a single misfit may be the wrong one itself.
    best, found = max(1, min(len(wrong) - 1, 2)), None
    # The tensors that do not fit have the right sizes; a number of heads is a quotient of them.
    sizes = {size for name in wrong for size in shapes[name]}
    quotients = {one // other for one in sizes for other in sizes if other and one % other == 0}
    for candidates in (sizes, quotients - sizes):
        for name in recorded.read:
            for shape in _variations(shapes[name], candidates):
                changed = {**shapes, name: shape}
                try:
                    config = infer(changed)
                    if config in tried:
                        continue
                    tried.add(config)
                    count = count_mismatches(config.rows(), changed, best)
                except (NotThisArchitecture, KeyError, ZeroDivisionError):
                    # These settings describe no module: a number of heads may be zero.
                    continue
                if count < best:
                    best, found = count, config
        if found is not None:
            return found
    return None


def _variations(shape: tuple[int, ...], sizes: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Yield the shapes that differ in one axis."""
    for axis, own in enumerate(shape):
        for size in sizes:
            if size != own:
                yield (*shape[:axis], size, *shape[axis + 1 :])
