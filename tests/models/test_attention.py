"""Kernels are tried before they are used: what computes wrongly is refused, by name and with the reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.scale import thinned
from torch.nn import functional as F

import safelight
from safelight.boundary import kernels as processors
from safelight.devices.cpu import CPU
from safelight.errors import SettingError
from safelight.models import attention
from safelight.models.attention import KernelResult, Kernels, Shape, check_kernels
from safelight.models.skeleton import SkeletonKey, build

HERE = torch.device("cpu")


@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("name", ["torch-sdp", "normal", "sliced"])
def test_attention_05_every_kernel_is_within_rounding_of_float64(name: str, dtype: torch.dtype) -> None:
    tried = check_kernels([name], dtype, HERE)[name]
    assert tried.passed, tried.why
    assert tried.seconds > 0


@pytest.mark.parametrize("size", thinned(["balanced", "3", "max", "1", "8"], 2))
def test_attention_01_every_slice_size_is_right(size: str) -> None:
    tried = check_kernels(["sliced"], torch.float32, HERE, size)["sliced"]
    assert tried.passed, tried.why


def junk(above: int):
    """A kernel that returns junk above so many tokens (ATTENTION 01, 05)."""
    sound = processors.AttnProcessor2_0.__call__

    def call(self, attn, hidden_states, *args, **kwargs):
        out = sound(self, attn, hidden_states, *args, **kwargs)
        return out.flip(1) if hidden_states.shape[1] > above else out

    return call


def uninitialised(self, attn, hidden_states, *args, **kwargs):
    """ATTENTION 03: something of a fresh buffer stays in the result."""
    return hidden_states + 0 * torch.empty_like(hidden_states)


def contiguous_only(self, attn, hidden_states, *args, **kwargs):
    """ATTENTION 02: what is not contiguous is read as if it were."""
    sound = torch.as_strided(hidden_states, hidden_states.shape, torch.empty(hidden_states.shape).stride())
    return processors.AttnProcessor()(attn, sound, *args, **kwargs)


@pytest.mark.parametrize(
    ("kernel", "says"),
    thinned(
        [
            (junk(1024), "1088 tokens"),
            (uninitialised, "off by nan"),
            (junk(4096), "4100 tokens"),
            (contiguous_only, "77 keys"),
        ],
        2,
        unpack=True,
    ),
    ids=["attention_01", "attention_03", "attention_04", "attention_02"],
)
def test_a_kernel_that_computes_wrongly_is_refused(
    kernel, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors.AttnProcessor2_0, "__call__", kernel)
    kernels = Kernels(CPU(), tmp_path, nullcontext)
    with pytest.raises(SettingError, match=says):
        kernels.choose("torch-sdp", torch.float32)
    assert kernels.choose("auto", torch.float32) in ("normal", "sliced")
    # What was seen is kept, for these versions.
    monkeypatch.undo()
    with pytest.raises(SettingError, match=says):
        Kernels(CPU(), tmp_path, nullcontext).choose("torch-sdp", torch.float32)


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_attention_07_without_free_memory_nothing_is_said_of_a_kernel(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, another program that fills the memory for a minute would choose the kernel for ever."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(processors.AttnProcessor2_0, "__call__", full)
    with pytest.raises(RuntimeError, match=message):
        Kernels(CPU(), tmp_path, nullcontext).choose("auto", torch.float32)
    monkeypatch.undo()
    assert Kernels(CPU(), tmp_path, nullcontext).choose("auto", torch.float32) == "torch-sdp"


def dispatched(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., torch.Tensor]) -> None:
    """Replace the kernel that diffusers' dispatcher calls."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.NATIVE, kernel)


@pytest.mark.skipif(not processors.has_dispatcher(), reason="this diffusers has no dispatcher")
@pytest.mark.parametrize("fault", thinned(["mask", "tokens"]))
def test_a_kernel_that_is_wrong_only_in_transformers_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: object
    ) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, None if fault == "mask" else attn_mask).transpose(1, 2)
        return out.flip(1) if fault == "tokens" and query.shape[1] > 4096 else out

    dispatched(monkeypatch, wrong)
    says = {"mask": "2 heads of 128, 320 tokens", "tokens": "1 heads of 128, 4100 tokens"}[fault]
    with pytest.raises(SettingError, match=f"of a transformer, {says}: off by"):
        Kernels(CPU(), tmp_path, nullcontext).choose("torch-sdp", torch.float32)


def test_auto_takes_the_first_that_passed_whatever_the_times_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two machines of the same kind, or two minutes of one, would compute other pixels."""
    wrong: set[str] = set()

    def fake_results(names: list[str], *_: object) -> dict[str, KernelResult]:
        seconds = {"torch-sdp": 1.0, "normal": 0.1}
        return {name: KernelResult(name not in wrong, "", seconds[name]) for name in names}

    monkeypatch.setattr(attention, "check_kernels", fake_results)
    assert Kernels(CPU(), tmp_path / "a", nullcontext).choose("auto", torch.float32) == "torch-sdp"
    wrong.add("torch-sdp")
    assert Kernels(CPU(), tmp_path / "a", nullcontext).choose("auto", torch.float32) == "torch-sdp"
    assert Kernels(CPU(), tmp_path / "b", nullcontext).choose("auto", torch.float32) == "normal"
    wrong.add("normal")
    with pytest.raises(SettingError, match="no kernel is correct in"):
        Kernels(CPU(), tmp_path / "c", nullcontext).choose("auto", torch.float32)


def test_attention_07_the_choice_does_not_depend_on_free_memory(tmp_path: Path) -> None:
    roomy = safelight.open_engine(tmp_path / "full", attention_type="auto")
    tight = safelight.open_engine(tmp_path / "small", attention_type="auto", max_cache_ram_gb=0.03)
    assert roomy.resources.run_settings.attention == tight.resources.run_settings.attention


def test_what_is_not_installed_is_refused_with_the_reason(root: Path) -> None:
    for name in ("xformers", "flash", "sage"):
        with pytest.raises(SettingError, match="needs CUDA"):
            safelight.open_engine(root, attention_type=name)


def test_a_model_and_a_base_can_have_their_own(root: Path, ask) -> None:
    engine = safelight.open_engine(root, attention_types={"sdxl": "sliced", "b": "normal"}, attention_slice_size="2")
    made = {name: next(engine.generate(ask(f"{name}.safetensors"))).metadata["run"] for name in ("a", "b", "xl")}
    assert [run["attention"] for run in made.values()] == ["torch-sdp", "normal", "sliced"]
    assert [run["attention_slice_size"] for run in made.values()] == ["auto", "auto", "2"]


def test_slices_are_of_the_size_that_is_asked_for() -> None:
    config = checkpoints.configs("sd1")["unet"]
    for size, expected in (("max", {1}), ("3", {3}), ("balanced", {1, 2, 4})):
        built = build(SkeletonKey("sd1", "unet", config, torch.float32, "sliced", HERE, size))
        assert {p.slice_size for p in built.attn_processors.values()} <= expected  # type: ignore[union-attr]


def test_a_kernel_that_is_a_function_computes_what_torchs_processor_computes() -> None:
    """What flash and sage are called by, bit for bit."""
    for shape in ({"query_dim": 320, "heads": 8, "dim_head": 40}, {"query_dim": 64, "heads": 1, "dim_head": 64}):
        more = {"norm_num_groups": 32, "residual_connection": True} if shape["heads"] == 1 else {}
        module = processors.Attention(**shape, **more)
        hidden = torch.randn(2, 64, 4, 4) if more else torch.randn(2, 9, 320)
        with torch.no_grad():
            module.set_processor(processors.AttnProcessor2_0())
            right = module(hidden)
            module.set_processor(processors.FunctionProcessor(F.scaled_dot_product_attention))
            assert torch.equal(module(hidden), right)


def test_shapes_go_beyond_what_is_known_to_break() -> None:
    assert max(shape.tokens for shape in attention.SHAPES) > 4096
    assert any(1024 < shape.tokens < 4096 for shape in attention.SHAPES)
    assert any(shape.strided for shape in attention.SHAPES)
    assert Shape(1, 512, 256) in attention.SHAPES
    of_transformers = [shape for shape in attention.SHAPES if shape.dispatched]
    assert {shape.head_size for shape in of_transformers} == {128}
    assert max(shape.tokens for shape in of_transformers) > 4096
    assert any(shape.hidden_keys for shape in of_transformers)
