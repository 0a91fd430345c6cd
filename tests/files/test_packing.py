"""Packed weights are found by the tensors beside them, and what does not fit together is named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.packed_files import PACKERS, as_json, pack
from support.scale import times

from safelight.errors import CorruptFileError, FileError, UnsupportedModelError
from safelight.files import safetensors
from safelight.files.header import TensorInfo
from safelight.files.packing import METADATA, find_packed, merge_metadata, weight_of

Written = dict[str, torch.Tensor]


def weight(form: str) -> Written:
    packed = pack("layer.weight", torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), form)
    assert packed is not None
    return {name.removeprefix("layer."): tensor for name, tensor in packed[0].items()}


def found(path: Path, written: Written, **metadata: object) -> dict[str, TensorInfo]:
    file = path / "packed.safetensors"
    # A tensor of a scalar's view is not stored twice.
    tensors = {f"layer.{name}": tensor.clone().contiguous() for name, tensor in written.items()}
    save_file(tensors, file, {name: json.dumps(value) for name, value in metadata.items()})
    return dict(find_packed(safetensors.read_header(file)).tensors)


DTYPES = {"int8": "INT8", "nvfp4": "NVFP4", "mxfp8": "MXFP8", "nf4": "NF4", "fp4": "FP4", "fp8": "F8_E4M3"}


@pytest.mark.parametrize("form", PACKERS)
def test_a_weight_and_the_tensors_beside_it_are_one(form: str, tmp_path: Path) -> None:
    tensors = found(tmp_path, {**weight(form), "bias": torch.zeros(64)})
    assert tensors.keys() == {"layer.weight", "layer.bias"}
    info = tensors["layer.weight"]
    assert (info.dtype, info.shape) == (DTYPES[form.replace(",", "").split()[0]], (64, 128))


def without(*ends: str) -> Callable[[Written], object]:
    return lambda written: [written.pop(end) for end in ends]


def change(**tensors: torch.Tensor) -> Callable[[Written], object]:
    return lambda written: written.update(tensors)


def settings(**some: object) -> Callable[[Written], object]:
    return change(comfy_quant=as_json(**some))


def state(**some: object) -> Callable[[Written], object]:
    def changed(written: Written) -> None:
        name = "weight.quant_state.bitsandbytes__nf4"
        written[name] = as_json(**{**json.loads(bytes(written[name].tolist())), **some})

    return changed


FAULTS: list[tuple[str, str, Callable[[Written], object]]] = [
    ("int8", "has no scale", without("weight_scale")),
    ("int8", "weight_scale is nan; a scale is positive", change(weight_scale=torch.tensor(float("nan")))),
    ("int8", r"is F32 \[3\]\. One scale for layer\.weight, for each row", change(weight_scale=torch.ones(3))),
    ("int8", "says 'convrot_w4a4', which is not read", settings(format="convrot_w4a4")),
    ("int8", "says 'nvfp4', and the weight is I8", settings(format="nvfp4")),
    ("int8", "has the setting 'smooth', which is not read", settings(format="int8_tensorwise", smooth=1)),
    ("int8", "is no JSON with a format", settings(form="int8_tensorwise")),
    ("int8", "is no JSON with a format", change(comfy_quant=torch.zeros(4, dtype=torch.uint8))),
    ("int8", "too many for its purpose", change(comfy_quant=torch.zeros(70_000, dtype=torch.uint8))),
    *(
        (
            "int8, rotated",
            f"rotated in groups of {size!r}",
            settings(format="int8_tensorwise", convrot=True, convrot_groupsize=size),
        )
        for size in (3, 32, 256, 0, -4, "16")
    ),
    ("nvfp4", "is nvfp4 and has no weight_scale_2", without("weight_scale_2")),
    ("nvfp4", "has no scales beside it", without("weight_scale")),
    ("nvfp4", "needs 1024 bytes of F8_E4M3 or U8", change(weight_scale=torch.ones(4, 4, dtype=torch.uint8))),
    ("nvfp4", "weight_scale_2 is 0.0; a scale is positive", change(weight_scale_2=torch.zeros(()))),
    ("nvfp4", "only matrices have this form", change(weight=torch.zeros(4, 4, 4, dtype=torch.uint8))),
    ("mxfp8", "needs 512 bytes of F8_E8M0 or U8", change(weight_scale=torch.ones(4, 4, dtype=torch.uint8))),
    ("nf4", "not quant_map", without("weight.quant_map")),
    ("nf4", "not one quant_state", without("weight.quant_state.bitsandbytes__nf4")),
    ("nf4", "is not a quant_state", change(**{"weight.quant_state.bitsandbytes__nf4": as_json(shape=[4])})),
    ("nf4", "is bitsandbytes' 'int3'", state(quant_type="int3")),
    ("nf4", r"says \[64, 64\] in blocks of 64", state(shape=[64, 64])),
    ("nf4", "in blocks of 0", state(blocksize=0)),
    ("nf4", "is not a quant_state", state(blocksize=float("inf"))),
    ("nf4", "is not a quant_state", state(shape=[1e400, 1])),
    ("int8", "is no JSON", change(comfy_quant=torch.full((60_000,), ord("["), dtype=torch.uint8))),
    ("int8", "is no JSON", change(comfy_quant=torch.tensor(list(b"[1]"), dtype=torch.uint8))),
    ("nf4", "in blocks of -2", state(blocksize=-2)),
    ("nf4", "128 blocks need one each", change(**{"weight.absmax": torch.ones(127)})),
    ("nf4", r"quant_map is F32 \[15\]; 16 F32 are needed", change(**{"weight.quant_map": torch.ones(15)})),
    ("nf4, nested", "nested_absmax is missing", without("weight.nested_absmax")),
    ("nf4, nested", "in blocks of 64", state(nested_offset=float("inf"))),
    ("nf4, nested", "1 F32 are needed", change(**{"weight.nested_absmax": torch.ones(2)})),
    ("int8 of bitsandbytes", "has an F32 for each row", change(SCB=torch.ones(63))),
    ("int8 of bitsandbytes", "has weight_format 2", change(weight_format=torch.tensor(2, dtype=torch.uint8))),
    ("int8", r"pre_quant_scale is F32 \[5\]; layer\.weight has 128 columns", change(pre_quant_scale=torch.ones(5))),
    ("nvfp4", r"is NVFP4 .*, rotated", settings(format="nvfp4", convrot=True)),
    ("mxfp8", r"is MXFP8 .*, rotated", settings(format="mxfp8", convrot=True)),
    ("int8", "has the setting 'params'", settings(format="int8_tensorwise", params={"scale": 2.0})),
    ("int8", "has layer.weight_scale_2 beside it", change(weight_scale_2=torch.ones(()))),
    ("int8 of bitsandbytes", "has layer.pre_quant_scale beside it", change(pre_quant_scale=torch.ones(128))),
    ("nf4", "has layer.pre_quant_scale beside it", change(pre_quant_scale=torch.ones(128))),
    ("nf4", "has layer.SCB beside it", change(SCB=torch.ones(64))),
    ("nf4", "in blocks of 8192", state(blocksize=8192)),
    ("int8", "nothing says in which form", change(weight=torch.zeros(4, 4, dtype=torch.int32))),
]


@pytest.mark.parametrize(("form", "says", "fault"), FAULTS)
def test_faults_are_named(form: str, says: str, fault: Callable[[Written], object], tmp_path: Path) -> None:
    written = weight(form)
    if "nothing says" in says:
        del written["comfy_quant"]
    fault(written)
    with pytest.raises((CorruptFileError, UnsupportedModelError), match=says):
        found(tmp_path, written)


def test_a_metadata_entry_says_the_form(tmp_path: Path) -> None:
    """ComfyUI's older files have the settings of all layers in the metadata, without the prefix of the names."""
    written = weight("int8, rotated")
    said = json.loads(bytes(written.pop("comfy_quant").tolist()))
    file = tmp_path / "some.safetensors"
    save_file(
        {f"model.diffusion_model.layer.{name}": one for name, one in written.items()},
        file,
        {METADATA: json.dumps({"format_version": "1.0", "layers": {"layer": said, "absent": said}})},
    )
    [info] = find_packed(safetensors.read_header(file)).tensors.values()
    assert info.packing is not None
    assert (info.dtype, info.packing.group) == ("INT8", 16)


PAIRS = '{"layers": {"layer": [["format", "int8_tensorwise"]]}}'


@pytest.mark.parametrize("text", ['{"layers": 3}', "no JSON", '{"layers": {"layer": {"form": 1}}}', "[]", PAIRS])
def test_metadata_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    written = weight("int8, rows")
    file = tmp_path / "some.safetensors"
    save_file({f"layer.{name}": one for name, one in written.items()}, file, {METADATA: text})
    with pytest.raises(CorruptFileError, match=METADATA):
        find_packed(safetensors.read_header(file))


def test_a_prefix_of_the_metadata_is_one_for_the_whole_file(tmp_path: Path) -> None:
    """A block's ``proj_out`` does not get the settings of the last ``proj_out``."""
    plain = {"weight": torch.zeros(64, 128, dtype=torch.int8), "weight_scale": torch.ones(())}
    said = json.loads(bytes(weight("int8, rotated")["comfy_quant"].tolist()))
    file = tmp_path / "some.safetensors"
    names = ("model.proj_out", "model.blocks.0.proj_out")
    save_file(
        {f"{name}.{end}": one.clone() for name in names for end, one in plain.items()},
        file,
        {METADATA: json.dumps({"layers": {"proj_out": said}})},
    )
    infos = find_packed(safetensors.read_header(file)).tensors
    groups = [info.packing.group for name in names if (info := infos[f"{name}.weight"]).packing is not None]
    assert groups == [16, 0]


def test_settings_of_the_file_and_of_a_weight_must_agree(tmp_path: Path) -> None:
    layers = {"layers": {"layer": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}}}
    with pytest.raises(UnsupportedModelError, match="has other settings in"):
        found(tmp_path, weight("int8"), **{METADATA: layers})


def test_shards_have_the_settings_of_their_own_layers(tmp_path: Path) -> None:
    one, two = ({METADATA: json.dumps({"layers": {name: {"format": name}}}), "x": name} for name in ("a", "b"))
    merged = merge_metadata(tmp_path, [one, {}, two])
    assert json.loads(merged[METADATA]) == {"layers": {"a": {"format": "a"}, "b": {"format": "b"}}}
    assert merged["x"] == "b"
    other = {METADATA: json.dumps({"layers": {"a": {"format": "b"}}})}
    with pytest.raises(CorruptFileError, match="different settings for a"):
        merge_metadata(tmp_path, [one, other])


def test_a_tensor_beside_a_weight_belongs_to_it() -> None:
    names = ("a.weight_scale", "a.comfy_quant", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "a.SCB")
    assert {weight_of(name) for name in names} == {"a.weight"}
    assert [weight_of(name) for name in ("a.weight", "a.bias", "absmax")] == [None, None, None]


def test_fp8_may_be_stored_as_bytes(tmp_path: Path) -> None:
    stored = torch.randn(64, 128).to(torch.float8_e4m3fn).view(torch.uint8)
    written = {"weight": stored, "weight_scale": torch.tensor(0.5), "comfy_quant": as_json(format="float8_e4m3fn")}
    info = found(tmp_path, written)["layer.weight"]
    assert info.packing is not None
    assert (info.dtype, info.packing.scale) == ("F8_E4M3", 0.5)


def test_mutations_give_only_clean_errors(tmp_path: Path) -> None:
    """Bytes of the header and of the settings are changed."""
    chance = random.Random(3)
    file = tmp_path / "mutated.safetensors"
    originals: list[tuple[bytes, list[tuple[int, int]]]] = []
    for form in PACKERS:
        save_file({f"layer.{name}": one.clone() for name, one in weight(form).items()}, file)
        tensors = safetensors.read_header(file).tensors.values()
        data = file.read_bytes()
        small = [(one.offset, one.nbytes) for one in tensors if one.nbytes < 512]
        originals.append((data, [(8, min(one.offset for one in tensors)), *small]))
    refused = 0
    for _ in range(times(600, 20_000)):
        data, places = chance.choice(originals)
        changed = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            at, nbytes = chance.choice(places)
            changed[at + chance.randrange(nbytes)] = chance.choice(b'0123456789-,.:"[]{}nF8I\x00\xff')
        file.write_bytes(changed)
        try:
            find_packed(safetensors.read_header(file))
        except FileError:
            refused += 1
    assert refused > times(200, 7000)
