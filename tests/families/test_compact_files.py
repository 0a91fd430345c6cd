"""Quantised files draw the pixels of the same numbers stored in fp32, in every form: whole and streamed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import adapters, checkpoints, gguf_files
from support.compact_files import FP8, SCALED, Tensors, add, write_both, write_compact
from support.families import tiny_families
from support.packed_files import LISTED, PACKERS
from support.scale import thinned

import safelight
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.catalog.model import Model
from safelight.errors import CorruptFileError, IncompleteModelError, SafelightError, UnsupportedModelError
from safelight.files.blocks import BLOCKS
from safelight.memory.planner import Planner
from safelight.memory.segments import split_into_segments
from safelight.weights.overlay import with_overlays

SEED = 5
if not {"z-image", "flux", "qwen-image", "krea-2"} <= set(tiny_families()):
    pytest.skip("the installed libraries lack some of these models", allow_module_level=True)

FORMS = (
    *("Q4_K", "Q8_0", "scaled fp8, older names", "fp8 e4m3", "nf4, nested", "int8, rotated", "nvfp4", "mxfp8"),
    *(*BLOCKS, *FP8, *SCALED, *PACKERS, "F16"),
)
FIRST = ("z-image", "flux", "qwen-image", "krea-2", "flux", "z-image", "qwen-image", "krea-2")
CASES = [
    (form, label)
    for number, form in enumerate(dict.fromkeys(FORMS))
    for label in sorted(tiny_families(), key=lambda one: one != FIRST[number % len(FIRST)])
]
"""Each form with each family; first one family for each of the first forms."""

CASES.sort(key=lambda case: case not in list(zip(FORMS, FIRST, strict=False)))

NAMES = {"F16": "fp16", "fp8 e5m2": "fp8_e5m2", **{form: form.lower() for form in BLOCKS}}
NAMES |= {form: LISTED.get(form, re.split("[ ,]", form)[0]) for form in PACKERS}
"""What `models list` calls a form."""


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library measures which kernel of attention is the fastest, and two may choose differently."""
    monkeypatch.setenv("SAFELIGHT_ATTENTION_TYPE", "torch-sdp")


def least_memory(engine: Any, model: Model) -> float:
    """Return the gigabytes that the components need at least, while they stream and their weights stay quantised."""
    least = engine.resources.residency.planner.min_weight_bytes
    parts = [replace(part, compact=compact) for part in model.manifest.components for compact in (False, True)]
    return max(least(part, torch.bfloat16) for part in parts) / 2**30


def resident_bytes(engine: Any) -> int:
    [place] = engine.memory()["places"].values()
    return sum(one["nbytes"] for one in place["resident"])


@pytest.mark.parametrize(("form", "label"), thinned(CASES, 4, unpack=True))
def test_quant_03_and_05_pixels_are_those_of_the_numbers(
    form: str, label: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_family = tiny_families()[label]
    tiny_family.make_references_small(monkeypatch)
    files = write_both(tiny_family, tmp_path, form, SEED)
    models = {name: add(root / name, tiny_family, some) for name, some in files.items()}
    assert models["fp32"].digest != models[form].digest
    assert models[form].dtype == NAMES.get(form, "fp8_e4m3")
    for precision in ("fp32", "bf16"):
        request = tiny_family.ask("tiny", precision=precision)
        right = next(safelight.open_engine(root / "fp32").generate(request)).pixels_sha256
        engine = safelight.open_engine(root / form)
        assert next(engine.generate(request)).pixels_sha256 == right, precision
    dequantised = resident_bytes(engine)
    engine.close()
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "most_weight_bytes", lambda *_: 0)
        quantised = safelight.open_engine(root / form)
        assert next(quantised.generate(request)).pixels_sha256 == right
    assert form == "F16" or resident_bytes(quantised) < 0.9 * dequantised
    quantised.close()
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "most_weight_bytes", lambda *_: 0)
        device = safelight.open_engine(root / form, device="simulated")
        assert next(device.generate(request)).pixels_sha256 == right
    device.close()
    little = safelight.open_engine(root / form, max_cache_ram_gb=least_memory(engine, models[form]))
    assert next(little.generate(request)).pixels_sha256 == right


OTHERS = [form for form in BLOCKS if form != "Q4_K"]


@pytest.fixture(params=thinned(["Q4_K", *PACKERS, SCALED[0], *FP8, SCALED[1], *OTHERS], 2))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Return a quantised checkpoint of Stable Diffusion and one with the same numbers in fp32, each in one file.

    Convolutions are quantised, too.
    """
    path = checkpoints.write_single(tmp_path / "tiny.safetensors", "sd1", seed=SEED)
    tensors = {name: one for name, one in load_file(path).items() if one.is_floating_point()}
    compact, numbers = write_compact(tmp_path / "compact.safetensors", tensors, request.param)
    save_file(dict(numbers), tmp_path / "numbers.safetensors")
    return compact, tmp_path / "numbers.safetensors"


@pytest.mark.parametrize(
    ("kept", "device"), thinned([(True, "cpu"), (True, "simulated"), (False, "cpu"), (False, "simulated")], 1, True)
)
def test_quant_01_and_02_adapters_over_quantised_weights(
    kept: bool, device: str, pair: tuple[Path, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On, off and on again; also at a small strength. The weight's numbers are never quantised again.

    ``kept``: quantised weights stay so in memory. Then adapters are computed at each use. The others are computed when
    segments arrive on the device, and the host has no results.
    """
    if kept:
        monkeypatch.setattr(Planner, "most_weight_bytes", lambda *_: 0)
    engine: Any = safelight.open_engine(root, device=device)
    compact, numbers = (engine.library.add(path).name for path in pair)
    Catalog.under(root).adapters.add(adapters.write(tmp_path / "style.safetensors"))
    Catalog.under(root).adapters.add(write_lokr(tmp_path / "krone.safetensors"))
    Catalog.under(root).adapters.add(write_dora(tmp_path / "size.safetensors"))

    def drawn(model: str, prompt: str) -> str:
        request = safelight.Request(prompt, model, seed=3, steps=2, width=64, height=64, precision="bf16")
        return next(engine.generate(request)).pixels_sha256

    texts = [
        f"a red apple{one}"
        for one in ("", " <lora:style:0.8>", "", " <lora:style:0.02>", " <lora:krone:1>", " <lora:size:0.7>")
    ]
    texts += [texts[1], texts[0]]
    right = {text: drawn(numbers, text) for text in dict.fromkeys(texts)}
    assert len(set(right.values())) == len(right)
    engine.loaded.unload(None)
    assert [drawn(compact, text) for text in texts] == [right[text] for text in texts]
    for name, place in engine.memory()["places"].items():
        results = [one["component"] for one in place["resident"] if " +" in one["component"]]
        if kept:
            # A form may leave small matrices as they were.
            assert all(" quantised +" in one for one in results), results
        else:
            assert bool(results) == (name == device.replace("cpu", "host")), (name, results)


def test_a_component_with_adapters_shares_segments_with_the_one_without(
    pair: tuple[Path, Path], root: Path, tmp_path: Path
) -> None:
    """A weight that stays quantised is the same in memory with an adapter. A dequantised one is not."""
    component = Catalog.under(root).library.add(pair[0]).manifest.component("unet")
    names = frozenset(tensor.name for tensor in component.tensors if ".attn2.to_q." in tensor.name)
    for plain in (component, replace(component, compact=True), replace(component, compact=True, widened=names)):
        overlaid = with_overlays(plain, "digest", names, contextlib.nullcontext, 0)  # type: ignore[arg-type]
        assert overlaid.underlying == plain
        one, other = (split_into_segments(part, torch.bfloat16) for part in (plain, overlaid))
        assert [segment.tensors for segment in one] == [segment.tensors for segment in other]
        assert [segment.nbytes for segment in one] == [segment.nbytes for segment in other]
        changed = [first.piece != second.piece for first, second in zip(one, other, strict=True)]
        arrive = [any(map(overlaid.arrives_with_overlay, segment.tensors)) for segment in other]
        assert changed == arrive
        assert any(changed) == overlaid.computes_at_use ^ True


def projections() -> Iterator[tuple[str, int, int]]:
    """Yield the start of the names of an adapter's tensors, rows and columns of each projection of the attentions."""
    for role, module, (rows, columns, *kernel) in adapters.modules("sd1"):
        if role == "unet" and not kernel and module.endswith("to_q"):
            yield adapters.kohya(role, module, "alpha").removesuffix("alpha"), rows, columns


def write_lokr(path: Path) -> Path:
    generator = torch.Generator().manual_seed(4)
    made: dict[str, torch.Tensor] = {}
    for stem, rows, columns in projections():
        made[f"{stem}lokr_w1"] = torch.randn(4, 4, generator=generator)
        made[f"{stem}lokr_w2"] = torch.randn(rows // 4, columns // 4, generator=generator) * 0.2
        made[f"{stem}alpha"] = torch.tensor(4.0)
    save_file(made, path)
    return path


def write_dora(path: Path) -> Path:
    """Write a DoRA. Its magnitudes are those of rows that the weights and the low-rank pairs have together."""
    generator = torch.Generator().manual_seed(6)
    made: dict[str, torch.Tensor] = {}
    for stem, rows, columns in projections():
        made[f"{stem}lora_down.weight"] = torch.randn(4, columns, generator=generator)
        made[f"{stem}lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
        made[f"{stem}dora_scale"] = 0.5 + torch.rand(rows, 1, generator=generator)
        made[f"{stem}alpha"] = torch.tensor(4.0)
    save_file(made, path)
    return path


@pytest.mark.parametrize("architecture", ["pig", "sd1"])
def test_quant_04_the_name_of_the_architecture_decides_nothing(architecture: str, root: Path, tmp_path: Path) -> None:
    path = tiny_families()["flux"].write_files(tmp_path, SEED)["transformer"]
    generator = np.random.default_rng(1)
    stored = {name: gguf_files.stored("Q8_0", one, generator) for name, one in load_file(path).items()}
    gguf_files.write(tmp_path / "any.gguf", stored, architecture=architecture)
    found = identify(tmp_path / "any.gguf", variant="dev")
    assert (found.base, found.dtype, found.format) == ("flux", "q8_0", "gguf")


def names_of_llama_cpp(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of a Qwen3 under llama.cpp's names."""
    ends = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    ends |= {f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"}
    ends |= {f"self_attn.{one}_norm": f"attn_{one}_norm" for one in "qk"}
    ends |= {f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if short.startswith("layers."):
            _, number, rest = short.split(".", 2)
            module, _, kind = rest.rpartition(".")
            found[f"blk.{number}.{ends[module]}.{kind}"] = tensor
        else:
            found[{"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[short]] = tensor
    return found


def t5_names_of_llama_cpp(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of a T5 encoder under llama.cpp's names."""
    ends = {"layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm"}
    ends |= {f"layer.0.SelfAttention.{one}": f"attn_{one}" for one in "qkvo"}
    ends["layer.0.SelfAttention.relative_attention_bias"] = "attn_rel_b"
    ends |= {f"layer.1.DenseReluDense.{theirs}": f"ffn_{ours}" for theirs, ours in _T5_MLP.items()}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("encoder.block."):
            _, _, number, rest = name.split(".", 3)
            found[f"enc.blk.{number}.{ends[rest.removesuffix('.weight')]}.weight"] = tensor
        elif name == "encoder.final_layer_norm.weight":
            found["enc.output_norm.weight"] = tensor
        else:
            found["token_embd.weight"] = tensor
    return found


_T5_MLP = {"wi_0": "gate", "wi_1": "up", "wo": "down"}


@pytest.mark.parametrize(
    ("label", "role", "rename"),
    thinned(
        [("flux", "text_encoder_2", t5_names_of_llama_cpp), ("z-image", "text_encoder", names_of_llama_cpp)], 2, True
    ),
)
def test_text_encoders_with_the_names_of_llama_cpp(
    label: str, role: str, rename: Callable[[Tensors], dict[str, torch.Tensor]], root: Path, tmp_path: Path
) -> None:
    """In fp32 it is the same component as in a safetensors file."""
    path = tiny_families()[label].write_files(tmp_path, SEED)[role]
    renamed = rename(load_file(path))
    generator = np.random.default_rng(1)
    file = tmp_path / "encoder.gguf"
    gguf_files.write(file, {name: gguf_files.stored("F32", one, generator) for name, one in renamed.items()})
    added = Catalog.under(root).adapters
    first, second = added.add(path, "theirs"), added.add(file, "llama")
    assert first.manifest.components[0].digest == second.manifest.components[0].digest


def test_language_models_that_cannot_be_used_are_named(root: Path, tmp_path: Path) -> None:
    tiny_family = tiny_families()["z-image"]
    renamed = names_of_llama_cpp(load_file(tiny_family.write_files(tmp_path, SEED)["text_encoder"]))
    generator = np.random.default_rng(1)
    stored = {name: gguf_files.stored("F32", one, generator) for name, one in renamed.items()}
    llama = {name: one for name, one in stored.items() if "_norm.weight" not in name or "attn_norm" in name}
    gguf_files.write(tmp_path / "llama.gguf", llama)
    gguf_files.write(tmp_path / "vl.gguf", stored, architecture="qwen3vl")
    added = Catalog.under(root).adapters
    for name, says in (("llama", "Llama and Mistral"), ("vl", "a Qwen3-VL as llama.cpp stores it")):
        with pytest.raises(UnsupportedModelError, match=says):
            added.add(tmp_path / f"{name}.gguf")


def change(**tensors: torch.Tensor) -> Callable[[dict[str, torch.Tensor], str], None]:
    """Return a function that puts tensors beside a weight. ``tensors``: by the end of their names."""

    def put(written: dict[str, torch.Tensor], stem: str) -> None:
        written.update({stem + end: tensor for end, tensor in tensors.items()})

    return put


def json_bytes(form: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


FAULTS: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "scale_weight is nan": change(scale_weight=torch.tensor(float("nan"))),
    "scale_weight is 0.0; a scale is positive": change(scale_weight=torch.zeros(())),
    "needs 512 bytes of F8_E4M3 or U8": change(
        weight=torch.zeros(64, 16, dtype=torch.uint8), weight_scale_2=torch.ones(())
    ),
    "One scale for .*SelfAttention.q.weight, for each row, or for each 128": change(scale_weight=torch.ones(4, 2)),
    "has two scales": change(weight_scale=torch.ones(())),
    "says 'nvfp4', and the weight is F8_E4M3": change(comfy_quant=json_bytes("nvfp4")),
    "comfy_quant is no JSON": change(comfy_quant=torch.zeros(3, dtype=torch.uint8)),
    "a scale is F32, F16 or BF16": change(scale_weight=torch.ones((), dtype=torch.int32)),
    "holds NaN": lambda written, stem: written[f"{stem}weight"].view(torch.uint8).fill_(0xFF),
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the tensors of a T5 in scaled fp8."""
    path = tiny_families()["flux"].write_files(tmp_path_factory.mktemp("scaled"), SEED)["text_encoder_2"]
    write_compact(path, load_file(path), SCALED[0])
    return load_file(path)


@pytest.mark.parametrize("says", FAULTS)
def test_faults_of_scales_are_named(says: str, scaled: dict[str, torch.Tensor], root: Path, tmp_path: Path) -> None:
    written = {name: tensor.clone() for name, tensor in scaled.items()}
    FAULTS[says](written, "encoder.block.0.layer.0.SelfAttention.q.")
    save_file(written, tmp_path / "faulty.safetensors")
    with pytest.raises((CorruptFileError, UnsupportedModelError), match=says):
        Catalog.under(root).adapters.add(tmp_path / "faulty.safetensors")


@pytest.mark.parametrize("form", ["int8, rotated", "nf4, nested"])
def test_a_pickle_is_the_same_component(form: str, root: Path, tmp_path: Path) -> None:
    """A pickle is converted, with all the tensors beside its weights."""
    path = tiny_families()["flux"].write_files(tmp_path, SEED)["text_encoder_2"]
    write_compact(path, load_file(path), form)
    torch.save(load_file(path), tmp_path / "encoder.pt")
    added = Catalog.under(root).adapters
    first, second = added.add(path, "safe"), added.add(tmp_path / "encoder.pt", "pickle")
    assert first.manifest.components[0].digest == second.manifest.components[0].digest


def test_a_lora_with_a_scale_is_refused(root: Path, tmp_path: Path) -> None:
    path = adapters.write(tmp_path / "style.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {f"{name}_scale": torch.tensor(0.5)}, path)
    with pytest.raises(UnsupportedModelError, match="has a scale, which is not read here"):
        Catalog.under(root).adapters.add(path)


def test_a_scale_of_a_weight_that_is_not_read_is_allowed(
    scaled: dict[str, torch.Tensor], root: Path, tmp_path: Path
) -> None:
    path, written = tmp_path / "t5.safetensors", scaled
    same = {f"shared.{end}": written[f"encoder.embed_tokens.{end}"].clone() for end in ("weight", "scale_weight")}
    save_file(written | same, path)
    Catalog.under(root).adapters.add(path)
    save_file({**written, "encoder.strange.scale_weight": torch.ones(())}, path)
    with pytest.raises(IncompleteModelError, match=r"encoder\.strange\.scale_weight"):
        Catalog.under(root).adapters.add(path, "again")


def test_an_export_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    from safelight.assembly import export

    path = checkpoints.write_single(tmp_path / "tiny.safetensors", "sd1", seed=SEED)
    tensors = {name: one for name, one in load_file(path).items() if one.is_floating_point()}
    compact, _ = write_compact(tmp_path / "compact.safetensors", tensors, "fp8 e4m3")
    model = Catalog.under(root).library.add(compact)
    with pytest.raises(SafelightError, match="quantised models are not written as a folder yet"):
        export.to_diffusers(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
