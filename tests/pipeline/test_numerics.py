"""The process's numeric state: a job sets it, and puts back what it found."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from support.scale import thinned, times

from safelight.pipeline import numerics
from safelight.pipeline.numerics import attention_order, fp32, table
from safelight.pipeline.numerics.setting import NumericSetting

_C: Any = torch._C
THREADS = 2

OTHER: dict[str, Any] = {
    "threads": 1,
    "default_dtype": torch.float64,
    "flush_denormal": True,
    "cublas.fp16_reduction": (False, False),
    "cublas.bf16_reduction": (False, True),
    "cublas.fp16_accumulation": True,
    "cuda.sm_carveout": 3,
    "blas": _C._BlasBackend.Ck,
    "linalg": _C._LinalgBackend.Magma,  # This build's setter sets it, and then complains.
    "rocm_fa": _C._ROCmFABackend.Ck,
    "cudnn.enabled": False,
    "cudnn.benchmark": True,
    "cudnn.deterministic": True,
    "cudnn.depthwise_kernel": "native",
    "miopen.immediate": True,
    "mkldnn.enabled": False,
    "mkldnn.deterministic": True,
    "nnpack": False,
    "sdp.flash": False,
    "sdp.mem_efficient": False,
    "sdp.math": False,
    "sdp.cudnn": False,
    "sdp.overrideable": False,
    "sdp.fa3": True,
    "sdp.order": [0, 2, 1, 3, 4],
    "sdp.math.reduction": True,
    "mha.fastpath": False,
    "deterministic": (True, True),
    "deterministic.fill": False,
    "opt_einsum": True,
    "autocast.cache": False,
    **{f"autocast.{kind}": True for kind in table.AUTOCAST},
    **{f"autocast.{kind}.dtype": torch.float64 for kind in table.AUTOCAST},
    "opencv.optimized": False,
    "numpy.errors": {"divide": "raise", "over": "raise", "under": "raise", "invalid": "raise"},
}
"""What a host may have set; a row of numerics has one here, or is named below with the reason."""

ELSEWHERE = {
    "fp32_precision": "has tests of its own",
    "default_tensor_device": "needs CUDA",
    "cpu.fp16_reduction": "needs an ARM processor",
    "onednn.allow_tf32": "needs an Intel GPU",
    "cublas.tunable": "needs CUDA",
    "sdp.flash.implementation": "needs CUDA",
}

ROWS = {row.name: row for row in table.numeric_settings(THREADS)}


def test_every_row_is_tested_or_said_not_to_be() -> None:
    assert set(ROWS) <= set(OTHER) | set(ELSEWHERE)
    assert not [row.name for row in ROWS.values() if row.lacks]


@pytest.fixture(params=[name for name in ROWS if name in OTHER])
def changed(request: pytest.FixtureRequest) -> Iterator[NumericSetting]:
    """A row at which a host has set another value than a job wants."""
    row = ROWS[request.param]
    before = row.read()
    row.put(OTHER[row.name])
    yield row
    row.put(before)


def test_a_job_has_what_it_wants_and_the_host_has_its_own_again(changed: NumericSetting) -> None:
    theirs = changed.read()
    assert theirs == OTHER[changed.name] != changed.wanted_value(theirs)
    with numerics.fixed(THREADS, 7):
        assert changed.read() == changed.wanted_value(theirs)
        assert numerics.record()["differs"] == {}
    assert changed.read() == theirs


def test_also_when_the_job_fails(changed: NumericSetting) -> None:
    theirs = changed.read()
    with pytest.raises(ZeroDivisionError), numerics.fixed(THREADS, 7):
        raise ZeroDivisionError
    assert changed.read() == theirs


def test_also_when_a_library_within_sets_it(changed: NumericSetting) -> None:
    theirs = changed.read()
    with numerics.fixed(THREADS, 7):
        changed.put(theirs)
        if changed.name in numerics.record()["differs"]:
            assert numerics.record()["differs"][changed.name] == str(theirs)
    assert changed.read() == theirs


def test_what_cannot_be_entered_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("no")

    before = [row.read() for row in ROWS.values()]
    row = NumericSetting("broken", lambda: 0, fails, 1)
    monkeypatch.setattr(numerics, "numeric_settings", lambda threads, device: [*ROWS.values(), row])
    with pytest.raises(RuntimeError, match="broken cannot be set to 1"), numerics.fixed(1, 7):
        pytest.fail("entered")
    assert [row.read() for row in ROWS.values()] == before


# --- torch's own choices ----------------------------------------------------------------------------------------------

FLASH_FIRST, CUDNN_FIRST = [1, 2, 0, 3, 4], [3, 1, 2, 0, 4]


class Hopper:
    """Stands for a GPU: at its first attention, torch puts cuDNN first, and overwrites what is set."""

    torch = torch.device("cuda", 0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cudnn: int = 9_19_00) -> None:
        self.has_chosen = False
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(attention_order.torch, "zeros", lambda *shape, **_: torch.ones(shape))
        monkeypatch.setattr(attention_order.F, "scaled_dot_product_attention", self.attention)

    def attention(self, *_: object) -> list[int]:
        """Compute attention. Returns torch's order, as it is then."""
        if not self.has_chosen:
            self.has_chosen = True
            _C._set_sdp_priority_order(CUDNN_FIRST)
        return _C._get_sdp_priority_order()


@pytest.fixture
def kept_order() -> Iterator[None]:
    before = _C._get_sdp_priority_order()
    attention_order.let_torch_choose.cache_clear()
    yield
    attention_order.let_torch_choose.cache_clear()
    _C._set_sdp_priority_order(before)


@pytest.mark.usefixtures("kept_order")
@pytest.mark.parametrize(
    ("cudnn", "variable", "order"),
    [
        (9_19_00, {}, CUDNN_FIRST),
        (9_10_00, {}, FLASH_FIRST),
        (9_19_00, {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}, FLASH_FIRST),
    ],
)
def test_attention_10_the_first_image_of_a_process_has_the_kernel_of_all_others(
    cudnn: int, variable: dict[str, str], order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Hopper(monkeypatch, cudnn)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    used: list[list[int]] = []
    for _ in range(2):
        with numerics.fixed(THREADS, 7, gpu.torch):
            used.append(gpu.attention())
            assert numerics.record()["differs"] == {}
    assert used == [order] * 2


@pytest.mark.usefixtures("kept_order")
def test_attention_10_a_host_s_order_changes_nothing_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Hopper(monkeypatch)
    gpu.attention()
    _C._set_sdp_priority_order(theirs := [0, 2, 1, 3, 4])
    with numerics.fixed(THREADS, 7, gpu.torch):
        assert gpu.attention() == CUDNN_FIRST
    assert _C._get_sdp_priority_order() == theirs


@pytest.mark.usefixtures("kept_order")
def test_attention_10_a_job_on_the_cpu_does_not_touch_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    gpu = Hopper(monkeypatch)
    with numerics.fixed(THREADS, 7, torch.device("cpu")):
        assert not gpu.has_chosen
        assert _C._get_sdp_priority_order() == FLASH_FIRST


# --- an older or newer torch ------------------------------------------------------------------------------------------


def test_what_this_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_C, "_set_sdp_use_fa3")
    numerics._warned.clear()
    with capture_logs() as told, numerics.fixed(THREADS, 7):
        assert numerics.record()["not_set"] == ["sdp.fa3"]
    assert (told[0]["setting"], told[0]["lacks"]) == ("sdp.fa3", ("torch._C._set_sdp_use_fa3",))


def test_without_what_a_job_needs_none_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_C, "_set_fp32_precision_setter")
    with pytest.raises(RuntimeError, match=r"has no torch\._C\._set_fp32_precision_setter"), numerics.fixed(THREADS, 7):
        pytest.fail("entered")


# --- fp32 precision: each case in a process of its own, for its state cannot all be put back --------------------------


def old(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError as error:
        return f"raises: {str(error)[:60]}"


def observable() -> dict[str, Any]:
    """All that a host can see."""
    keys = (fp32._TOP, *fp32._BACKENDS, *fp32._OPS)
    return {".".join(key): _C._get_fp32_precision_getter(*key) for key in keys} | {
        "matmul": old(torch.get_float32_matmul_precision),
        "cublas": old(lambda: torch.backends.cuda.matmul.allow_tf32),
        "cudnn": old(lambda: torch.backends.cudnn.allow_tf32),
    }


def _new(*key: str) -> dict[str, Callable[[], Any]]:
    values = ("none", "ieee", "tf32") if key[0] == "cuda" else ("none", "ieee", "tf32", "bf16")
    return {f"{'.'.join(key)}={v}": lambda v=v: _C._set_fp32_precision_setter(*key, v) for v in values}


STEPS: dict[str, Callable[[], Any]] = {
    **{k: v for key in (fp32._TOP, *fp32._BACKENDS, *fp32._OPS) for k, v in _new(*key).items()},
    **{f"set_{v}": lambda v=v: torch.set_float32_matmul_precision(v) for v in ("highest", "high", "medium")},
    **{f"cublas_{v}": lambda v=v: setattr(torch.backends.cuda.matmul, "allow_tf32", v) for v in (True, False)},
    **{f"cudnn_{v}": lambda v=v: setattr(torch.backends.cudnn, "allow_tf32", v) for v in (True, False)},
    "mkldnn_property=tf32": lambda: setattr(torch.backends.mkldnn, "fp32_precision", "tf32"),
}


def alone(job: bool, before: tuple[str, ...], after: tuple[str, ...]) -> list[Any]:
    """What a host sees that takes these steps, with or without a job between them, in a fork."""
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        seen: list[Any] = []
        try:
            for step in before:
                STEPS[step]()
            seen.append(observable())
            if job:
                with numerics.fixed(1, 7):
                    stored = fp32.Fp32Access.read()
                    assert numerics.record()["fp32"] == "ieee", "fp32"
                    assert numerics.record()["differs"] == {}, "differs"
                    assert torch.get_float32_matmul_precision() == "highest"
                    assert torch.backends.cuda.matmul.allow_tf32 is False
                    if not fp32._pristine(stored.stored):
                        assert torch.backends.cudnn.allow_tf32 is False
            seen.append(observable())
            for step in after:
                STEPS[step]()
                seen.append(observable())
        except BaseException as error:  # noqa: BLE001 - the fork tells it, and ends
            seen.append(repr(error))
        os.write(theirs, json.dumps(seen).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told)


def histories() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    draw = random.Random(1)
    steps = list(STEPS)
    # What shows whether a value is inherited or a process is as new: parents set afterwards.
    probe = ("generic.all=ieee", "generic.all=tf32", "cuda.all=ieee", "cuda.all=tf32", "generic.all=none")
    short = [(before, probe) for n in (0, 1) for before in itertools.product(steps, repeat=n)]
    long = [(tuple(draw.choices(steps, k=draw.randint(2, 6))), tuple(draw.choices(steps, k=3))) for _ in range(250)]
    return short + long


HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
"""For programs that import this file."""

_PRISTINE = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.mark.full
@_PRISTINE
def test_a_host_cannot_tell_that_a_job_has_run() -> None:
    """In a new interpreter: its state is as torch starts."""
    program = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program], capture_output=True, text=True, check=False, env=HERE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["wrong"] == []
    assert told["histories"] > times(80, 250)
    assert told["raising"] > times(16, 50)  # Of the hosts, so many could not have read the old interface themselves.


def _main() -> None:
    wrong: list[Any] = []
    raising = 0
    for before, after in (every := histories()[:: times(3, 1)]):
        without, with_job = alone(False, before, after), alone(True, before, after)
        raising += "raises" in str(without[0])
        if without != with_job:
            wrong.append([before, after, [(a, b) for a, b in zip(without, with_job, strict=False) if a != b][:1]])
    print(json.dumps({"wrong": wrong[:5], "failed": len(wrong), "histories": len(every), "raising": raising}))


@pytest.mark.full
@pytest.mark.parametrize(
    "step", thinned(["generic.all=tf32", "cuda.matmul=tf32", "mkldnn.matmul=bf16", "cuda.conv=ieee"])
)
def test_a_generation_runs_in_a_program_that_uses_the_new_settings(step: str) -> None:
    """The known fault: torch's old getters raise there."""
    code = (
        f"import test_numerics as t; from safelight.pipeline import numerics as n\nt.STEPS[{step!r}]()\n"
        "seen = t.observable(); assert 'raises' in str(seen)\n"
        "with n.fixed(1, 7): print(n.record()['fp32'])\n"
        "assert t.observable() == seen"
    )
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=here, env=HERE)
    assert (done.returncode, done.stdout) == (0, "ieee\n"), done.stderr


def test_frozen_flags_do_not_stop_a_job() -> None:
    code = (
        "import torch; from safelight.pipeline import numerics as n\ntorch.backends.disable_global_flags()\n"
        "torch._C._set_cudnn_benchmark(True)\n"
        "with n.fixed(1, 7): assert not torch.backends.cudnn.benchmark\n"
        "assert torch.backends.cudnn.benchmark"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


# --- modes, threads, generators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["set", "with"])
def test_no_default_device_of_the_hosts(how: str) -> None:
    context = torch.device("meta") if how == "with" else None
    if context is None:
        torch.set_default_device("meta")
        was = torch._GLOBAL_DEVICE_CONTEXT.device_context
    try:
        if context is not None:
            context.__enter__()
        with numerics.fixed(1, 7):
            assert torch.get_default_device() == torch.zeros(1).device == torch.device("cpu")
            with torch.device("meta"):
                assert torch.zeros(1).is_meta
        assert torch.get_default_device() == torch.zeros(1).device == torch.device("meta")
        if context is None:
            assert torch._GLOBAL_DEVICE_CONTEXT.device_context is was
    finally:
        if context is not None:
            context.__exit__(None, None, None)
        torch.set_default_device(None)
    assert torch.zeros(1).device == torch.device("cpu")
    assert _C._len_torch_function_stack() == 0


def test_no_mode_of_the_hosts() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            return made.double() if isinstance(made, torch.Tensor) else made

    with Doubles(), FakeTensorMode(), torch.inference_mode(), _C.DisableTorchFunction():
        with numerics.fixed(1, 7):
            one = torch.zeros(1)
            assert (type(one), one.dtype, one.is_inference()) == (torch.Tensor, torch.float32, False)
            assert not torch.is_grad_enabled()
        assert type(torch.zeros(1)).__name__ == "FakeTensor"
        assert torch.is_inference_mode_enabled()
        assert _C._len_torch_function_stack() == 1
    assert _C._len_torch_dispatch_stack() == _C._len_torch_function_stack() == 0


def test_workers_that_flush_are_told() -> None:
    """A thread's workers keep what held when they began; nothing that torch offers changes them."""
    told: list[Any] = []

    def host() -> None:
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)
        table.flushed_share(2)
        with numerics.fixed(2, 7):
            told.append(numerics.record()["differs"])
        told.append(table.flushes_denormals())
        torch.set_flush_denormal(False)

    thread = threading.Thread(target=host)
    thread.start()
    thread.join()
    assert told == [{"flush_denormal.workers": 0.5}, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("flushes", [True, False])
def test_denormals_are_as_before_whatever_the_default_dtype(dtype: torch.dtype, flushes: bool) -> None:
    torch.set_default_dtype(dtype)
    torch.set_flush_denormal(flushes)
    try:
        with numerics.fixed(1, 7):
            assert not table.flushes_denormals()
        assert table.flushes_denormals() is flushes
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)


def drawn() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.PCG64])
def test_what_a_library_draws_repeats_and_others_draw_on_as_if_nothing_had_been(bits: Any) -> None:
    with numerics.fixed(1, 7):
        within = drawn()
    first = np.random.get_bit_generator()
    try:
        outside: list[Any] = []
        for job in (False, True):
            np.random.set_bit_generator(bits(1))
            random.seed(1)
            torch.manual_seed(1)
            one = drawn()
            if job:
                with numerics.fixed(1, 7):
                    assert drawn() == within
            outside.append([one, drawn()])
        assert outside[0] == outside[1]
    finally:
        np.random.set_bit_generator(first)
    with numerics.fixed(1, 8):
        assert all(a != b for a, b in zip(drawn(), within, strict=True))


if __name__ == "__main__":
    _main()
