"""Sums see every changed word and rows that changed places, and are the same however the bytes come."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.devices import sums


def bytes_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40_000), st.data())
def test_one_changed_bit_is_seen(n: int, data: st.DataObject) -> None:
    x = bytes_of(n)
    before = sums.compute_sum(x)
    x[data.draw(st.integers(0, n - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert sums.compute_sum(x) != before


def test_rows_that_changed_places_are_seen() -> None:
    x = bytes_of(sums.ROW_BYTES * 3)
    y = torch.cat([x[sums.ROW_BYTES : 2 * sums.ROW_BYTES], x[: sums.ROW_BYTES], x[2 * sums.ROW_BYTES :]])
    assert sums.compute_sum(x)[0] == sums.compute_sum(y)[0]
    assert sums.compute_sum(x)[1] != sums.compute_sum(y)[1]


def test_piece_by_piece_is_the_same() -> None:
    x = bytes_of(sums.ROW_BYTES * 5 + 77)
    running = sums.RunningSum()
    running.add(x[: sums.ROW_BYTES * 2])
    running.add(x[sums.ROW_BYTES * 2 :])
    assert running.value() == sums.compute_sum(x)
    assert sums.compute_sum(x[1:]) == sums.compute_sum(x[1:].clone())
    assert sums.compute_sum(torch.empty(0)) == (0, 0)


def test_against_plain_arithmetic() -> None:
    x = bytes_of(sums.ROW_BYTES * 2 + 16)
    words = [int.from_bytes(bytes(x[i : i + 8].tolist()), "little") for i in range(0, x.numel(), 8)]
    rows = [sum(words[i : i + 1024]) for i in range(0, len(words), 1024)]
    expected = sum(rows) % 2**64, sum((i + 1) * row for i, row in enumerate(rows)) % 2**64
    assert sums.compute_sum(x) == expected
