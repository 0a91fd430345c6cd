"""Triton's functions for GPUs, run by its interpreter on the CPU, where Triton is installed.

``make gpu DEVICE=cuda`` compares the compiled ones (docs/gpu.md, section ``forms``).
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from safelight.logs import Log
from safelight.weights import compiled_decoding
from safelight.weights.block_decoding import DEVICE_CHUNK_ELEMENTS, _decode_in_chunks, decoding_of
from safelight.weights.compiled_decoding import FORMS, compiled_for

PROGRAM = """
import torch
from safelight.weights.compiled_decoding import FORMS
from safelight.weights.cuda_decoding_kernels import first_difference
print({form: first_difference(form, torch.device("cpu")) for form in FORMS["cuda"]})
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="torch has no Triton here")
def test_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(dict.fromkeys(FORMS["cuda"], ""))


@pytest.mark.parametrize("why", ["RuntimeError: no C compiler", "3 of 8 numbers are different"])
def test_without_a_working_triton_the_other_functions_compute(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        @staticmethod
        def decode(*_: object) -> None: ...

        @staticmethod
        def first_difference(*_: object) -> str:
            if why.startswith("RuntimeError"):
                raise RuntimeError(why.removeprefix("RuntimeError: "))
            return why

    said: list[str] = []
    monkeypatch.setattr(compiled_decoding, "find_spec", lambda _: "there")
    monkeypatch.setitem(sys.modules, "safelight.weights.cuda_decoding_kernels", Kernels)
    monkeypatch.setattr(Log, "warning", lambda *_, why, **__: said.append(why))
    compiled_for.cache_clear()
    try:
        assert compiled_for("Q4_K", "cuda") is None
        assert compiled_for("Q4_K", "cuda") is None
        assert said == [why]
        assert compiled_for("IQ4_XS", "cuda") is None
    finally:
        compiled_for.cache_clear()


def test_larger_chunks_have_the_same_numbers() -> None:
    decoding = decoding_of("Q8_0", None)
    assert decoding is not None
    raw = torch.randint(0, 100, (34 * 50_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = [torch.empty(32 * 50_000) for _ in range(2)]
    for out, chunk in zip(made, (1 << 19, DEVICE_CHUNK_ELEMENTS), strict=True):
        _decode_in_chunks(decoding, raw, raw[:0], out, 0, 50_000, chunk)
    assert torch.equal(*made)
