"""What files are, and the rule that said so."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from support import checkpoints
from support.scale import thinned

from safelight.catalog.adapters import Adapters
from safelight.catalog.identify import identify
from safelight.errors import CorruptFileError, IncompleteModelError, InputError, UnsupportedModelError
from safelight.families.rules import lines_of, rule

BASES = ("sd1", "sd2", "sdxl", "sdxl-refiner")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", thinned(["ldm", "folder", "bin", "diffusers", "fp16", "sharded"], 3))
def test_every_base_in_every_form(base: str, form: str, tmp_path: Path) -> None:
    if form in ("ldm", "diffusers"):
        path = checkpoints.write_single(tmp_path / "m.safetensors", base, layout=form)
    elif form == "fp16":
        path = checkpoints.write_folder(tmp_path / "m", base, variant="fp16")
    elif form == "sharded":
        path = checkpoints.write_folder(tmp_path / "m", base, max_shard_size="1MB")
        assert len(list((path / "unet").glob("*.safetensors"))) > 1
    elif form == "bin":
        path = checkpoints.write_folder(tmp_path / "m", base)
        checkpoints.as_pickles(path)
    else:
        path = checkpoints.write_folder(tmp_path / "m", base)
    start = time.perf_counter()
    found = identify(path)
    assert time.perf_counter() - start < 2
    assert (found.kind, found.base, found.variant, found.dtype) == ("checkpoint", base, "text-to-image", "fp32")
    assert found.layout is not None
    assert found.rule


def test_text_encoders_with_and_without_prefix(tmp_path: Path) -> None:
    path = checkpoints.write_folder(tmp_path / "m", "sd1")
    file = path / "text_encoder/model.safetensors"
    tensors = load_file(file)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for spelling in (bare, {f"text_model.{name}": tensor for name, tensor in bare.items()}):
        save_torch(spelling, file)
        assert identify(path).layout is not None


@pytest.mark.parametrize(
    ("metadata", "extra", "prediction", "snr"),
    [
        ({}, {}, "epsilon", False),
        ({"modelspec.prediction_type": "v"}, {}, "v_prediction", False),
        ({"modelspec.prediction_type": "epsilon"}, {"v_pred": torch.zeros(0)}, "v_prediction", False),
        ({}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "v_prediction", True),
    ],
)
def test_load_01_prediction_type_by_markers(
    metadata: dict[str, str], extra: dict[str, torch.Tensor], prediction: str, snr: bool, tmp_path: Path
) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sdxl", metadata=metadata or None, extra=extra)
    found = identify(path)
    assert (found.prediction_type, found.zero_terminal_snr) == (prediction, snr)


def test_load_01_prediction_type_by_rule_word_and_settings(tiny: Path, tmp_path: Path) -> None:
    assert identify(tiny / "v2.safetensors").prediction_type == "v_prediction"
    assert identify(tiny / "v2.safetensors", "epsilon").prediction_type == "epsilon"
    assert "user set epsilon" in identify(tiny / "v2.safetensors", "epsilon").rule
    folder = checkpoints.write_folder(tmp_path / "m", "sd1", prediction_type="v_prediction")
    assert identify(folder).prediction_type == "v_prediction"
    marked = checkpoints.write_single(
        tmp_path / "512.safetensors", "sd2", metadata={"modelspec.architecture": "stable-diffusion-v2-512"}
    )
    assert identify(marked).prediction_type == "epsilon"


def test_load_01_what_is_stated_and_not_known_is_refused(tmp_path: Path) -> None:
    flow = checkpoints.write_single(tmp_path / "m.safetensors", "sdxl", metadata={"modelspec.prediction_type": "flow"})
    edm = checkpoints.write_single(tmp_path / "e.safetensors", "sdxl", extra={"edm_mean": torch.zeros(4)})
    folder = checkpoints.write_folder(tmp_path / "f", "sd1", prediction_type="sample")
    for path in (flow, edm, folder):
        with pytest.raises(UnsupportedModelError, match="is not supported"):
            identify(path)


def test_load_02_inpainting_is_told_from_plain(tiny: Path) -> None:
    assert identify(tiny / "inpaint.safetensors").variant == "inpainting"


KINDS = {
    "lora kohya": (["lora_unet_down_blocks_0_attn2_to_k.lora_down.weight"], "lora"),
    "lora peft": (["unet.down_blocks.0.attn2.to_k.lora_A.weight"], "lora"),
    "lora diffusers": (["unet.down.attn2.processor.to_k_lora.down.weight"], "lora"),
    "loha": (["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"], "loha"),
    "lokr": (["lora_unet_x.lokr_w1"], "lokr"),
    "full": (["lora_unet_x.diff"], "full_difference"),
    "controlnet ldm": (["control_model.input_blocks.0.0.weight"], "controlnet"),
    "controlnet": (["controlnet_cond_embedding.conv_in.weight"], "controlnet"),
    "inversion": (["emb_params"], "textual_inversion"),
    "inversion xl": (["clip_l", "clip_g"], "textual_inversion"),
    "vae": (["encoder.conv_in.weight", "decoder.conv_in.weight"], "vae"),
    "unet": (["model.diffusion_model.input_blocks.0.0.weight"], "unet"),
    "upscaler": (["model.1.sub.0.RDB1.conv1.0.weight"], "upscaler"),
    "sd3": (["model.diffusion_model.joint_blocks.0.x"], "checkpoint"),
    "flux2": (["double_stream_modulation_img.lin.weight", "guidance_in.in_layer.weight"], "checkpoint"),
    "svdquant": (["blocks.0.qkv.qweight", "blocks.0.qkv.proj_down", "blocks.0.qkv.wscales"], "checkpoint"),
    "awq": (["model.layers.0.q_proj.qweight", "model.layers.0.q_proj.qzeros"], "checkpoint"),
    "sdnq": (["layers.0.attention.to_q.weight", "layers.0.attention.to_q.zero_point"], "checkpoint"),
    "cosmos-predict2": (
        ["net.x_embedder.proj.1.weight", "net.blocks.0.adaln_modulation_cross_attn.1.weight"],
        "checkpoint",
    ),
    "anima's lora": (["diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj.lora_A.weight"], "lora"),
    "ip adapter": (["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "ip_adapter"),
}


@pytest.mark.parametrize("label", KINDS)
def test_other_kinds_are_named_for_what_they_are(label: str, tmp_path: Path) -> None:
    names, kind = KINDS[label]
    path = tmp_path / "other.safetensors"
    save_file({name: np.zeros((4, 768), np.float16) for name in names}, path)
    found = identify(path)
    assert found.kind == kind
    assert found.layout is None
    if label.startswith("lora"):
        assert found.base == "sd1"


def test_what_is_nothing_known(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weights": np.zeros(3, np.float32)}, path)
    with pytest.raises(UnsupportedModelError, match="unknown kind of model"):
        identify(path)


@pytest.mark.parametrize("base", thinned(["sd1", "sdxl"]))
def test_a_checkpoint_without_one_of_its_tensors_is_refused(base: str, tmp_path: Path) -> None:
    whole = load_file(checkpoints.write_single(tmp_path / "whole.safetensors", base, dtype=torch.float16))
    path = tmp_path / "part.safetensors"
    names = [name for name in whole if name not in ("betas", "model_ema.decay")]
    for name in names[:: max(1, len(names) // 40)]:
        save_torch({key: tensor for key, tensor in whole.items() if key != name}, path)
        with pytest.raises(IncompleteModelError, match=r"missing|of a wrong shape|unknown"):
            identify(path)


def test_missing_tensors_are_those_that_are_missing_in_the_files_own_names(tmp_path: Path) -> None:
    """Also where the tensor from which settings are read is among them."""
    whole = load_file(checkpoints.write_single(tmp_path / "whole.safetensors", "sd1", dtype=torch.float16))
    path = tmp_path / "part.safetensors"
    unet, vae = "model.diffusion_model.", "first_stage_model."
    for absent in (
        {f"{unet}input_blocks.1.0.in_layers.2.weight"},
        {f"{unet}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", f"{unet}out.2.weight"},
        {f"{vae}decoder.conv_in.weight", f"{vae}decoder.conv_in.bias"},
    ):
        save_torch({key: tensor for key, tensor in whole.items() if key not in absent}, path)
        with pytest.raises(IncompleteModelError) as caught:
            identify(path)
        assert {name.partition(" (")[0] for name in caught.value.missing} >= absent
    # Of the tiny UNet all other tensors of the published one are missing too, but never one that is there.
    save_torch({key: tensor for key, tensor in whole.items() if "conv_in" not in key}, path)
    with pytest.raises(IncompleteModelError) as caught:
        identify(path)
    assert not {name.partition(" (")[0] for name in caught.value.missing} & set(whole) - {
        key for key in whole if "conv_in" in key
    }


def test_names_are_escaped_on_their_way_to_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    name = "\\ud800 \\u001b[31m"
    header = f'{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UnsupportedModelError) as caught:
        identify(path)
    assert r"\ud800 \x1b[31m" in str(caught.value)
    str(caught.value).encode()


BASES_OF_ADAPTERS = [
    ({"a_attn2_to_k.lora_down.weight": (4, 768)}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sd1"),
    ({"a_attn2_to_k.lora_down.weight": (4, 2048)}, {"modelspec.architecture": "stable-diffusion-v1/lora"}, "sdxl"),
    ({"lora_te2_x.lora_down.weight": (4, 4)}, {}, "sdxl"),
    ({"lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight": (4, 4)}, {}, "sdxl"),
    ({"lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": (4, 4)}, {}, None),
    ({"transformer.transformer_blocks.1.attn.to_q.lora_A.weight": (4, 4)}, {}, None),
    # Chroma has the same blocks.
    ({"transformer.transformer_blocks.1.ff_context.net.2.lora_A.weight": (4, 4)}, {}, None),
    ({"transformer.transformer_blocks.1.norm1_context.linear.lora_A.weight": (4, 4)}, {}, "flux"),
    ({"single_blocks.1.processor.qkv_lora.down.weight": (4, 4)}, {}, "flux"),
    ({"lora_unet_layers_0_adaLN_modulation_0.lora_down.weight": (4, 4)}, {}, "z-image"),
    ({"lora_unet_x.lora_down.weight": (4, 4)}, {"ss_base_model_version": "sd_xl_base_v1.0"}, None),
    ({"lora_unet_x.lora_down.weight": (4, 4)}, {"ss_base_model_version": "my v2 of v1"}, None),
    ({"lora_unet_x.lora_down.weight": (4, 4)}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    ({"lora_unet_x.lora_down.weight": (4, 4)}, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
]


@pytest.mark.parametrize(("shapes", "metadata", "base"), BASES_OF_ADAPTERS)
def test_the_base_of_an_adapter_is_that_of_its_shapes(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], base: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path, metadata)
    assert identify(path).base == base


@pytest.mark.parametrize(
    ("label", "names", "says"),
    [
        ("vae", ["encoder.conv_in.weight", "decoder.conv_in.weight"], "not a complete VAE"),
        ("controlnet", ["control_model.input_blocks.0.0.weight"], "not a complete ControlNet"),
        ("control lora", ["lora_controlnet", "input_blocks.0.0.up", "x.lora_down"], "is a control_lora"),
        ("union", ["task_embedding", "controlnet_cond_embedding.conv_in.weight"], "is a controlnet_union"),
    ],
)
def test_broken_parts_are_named_for_what_they_are(label: str, names: list[str], says: str, tmp_path: Path) -> None:
    path = tmp_path / f"{label}.safetensors"
    save_file({name: np.zeros((4, 768), np.float16) for name in names}, path)
    with pytest.raises(InputError, match=says):
        Adapters(tmp_path / "root").add(path)


def test_wrong_shapes_and_strangers_are_named(tmp_path: Path) -> None:
    whole = load_file(checkpoints.write_single(tmp_path / "whole.safetensors", "sd1", dtype=torch.float16))
    path = tmp_path / "odd.safetensors"
    odd = "model.diffusion_model.out.2.bias"
    save_torch({**whole, odd: torch.zeros(5).half()}, path)
    with pytest.raises(
        IncompleteModelError,
        match=r"model\.diffusion_model\.out\.2\.bias \(unet\.conv_out\.bias\): \[5\] instead of \[4\]",
    ):
        identify(path)
    save_torch({**whole, "model.diffusion_model.extra": torch.zeros(5).half()}, path)
    with pytest.raises(IncompleteModelError, match="unknown"):
        identify(path)
    save_torch({**whole, odd: torch.zeros(4, dtype=torch.int32)}, path)
    with pytest.raises(UnsupportedModelError, match="is I32; BF16, F16, F32"):
        identify(path)


SD1_TEXT = "cond_stage_model.transformer.text_model.embeddings"
DISCORD = {
    "tokens": ({f"{SD1_TEXT}.token_embedding.weight": (1000, 64)}, "1000 tokens"),
    "positions": ({f"{SD1_TEXT}.position_embedding.weight": (20, 64)}, "20 positions"),
    "blocks": ({}, r"missing: [0-9]+ \(first_stage_model\.encoder\.down\.0\.block\.0\.norm1\.weight"),
}


@pytest.mark.parametrize("label", DISCORD)
def test_parts_that_do_not_go_together_are_refused(label: str, tmp_path: Path) -> None:
    shapes, message = DISCORD[label]
    whole = load_file(checkpoints.write_single(tmp_path / "whole.safetensors", "sd1", dtype=torch.float16))
    changed = {**whole, **{name: torch.zeros(shape).half() for name, shape in shapes.items()}}
    if label == "blocks":
        changed = {name: tensor for name, tensor in changed.items() if "encoder.down." not in name}
    save_torch(changed, tmp_path / "odd.safetensors")
    with pytest.raises((IncompleteModelError, UnsupportedModelError), match=message):
        identify(tmp_path / "odd.safetensors")


def test_a_unet_for_another_text_encoder_is_refused(tmp_path: Path) -> None:
    whole = load_file(checkpoints.write_single(tmp_path / "whole.safetensors", "sd1", dtype=torch.float16))
    reads = (".attn2.to_k.weight", ".attn2.to_v.weight")
    changed = {n: torch.zeros(len(t), 96).half() if n.endswith(reads) else t for n, t in whole.items()}
    save_torch(changed, tmp_path / "odd.safetensors")
    with pytest.raises(UnsupportedModelError, match="reads text 96 wide, its text encoders return 64"):
        identify(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("number", ["²", "9" * 5000])
def test_odd_numbers_in_names_are_only_names(number: str, tmp_path: Path) -> None:
    extra = {f"model.diffusion_model.input_blocks.{number}.x": torch.zeros(1)}
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", extra=extra)
    with pytest.raises(IncompleteModelError, match="unknown"):
        identify(path)


@pytest.mark.parametrize(("text", "pixels"), [("768x512", 768), ("513x513", None), ("²", None), ("9" * 5000, None)])
def test_resolution(text: str, pixels: int | None, tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", metadata={"modelspec.resolution": text})
    assert identify(path).resolution == pixels


def test_folders_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"without model_index\.json"):
        identify(tmp_path)
    folder = checkpoints.write_folder(tmp_path / "m", "sd1")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="holds no weights"):
        identify(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))
    with pytest.raises(CorruptFileError, match="names no vae"):
        identify(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(CorruptFileError, match="not an object"):
        identify(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedModelError, match="FluxPipeline"):
        identify(folder)


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [("vae", "scaling_factor", 0.5), ("unet", "attention_head_dim", 4), ("text_encoder", "hidden_act", "gelu")],
)
def test_settings_that_shapes_do_not_tell_are_not_ignored(role: str, name: str, value: object, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path / "m", "sd1")
    file = folder / role / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(UnsupportedModelError, match=f"{name} = {value}"):
        identify(folder)


def test_shards_may_not_leave_their_folder(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path / "m", "sd1", max_shard_size="1MB")
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = next(iter(table["weight_map"]))
    index.write_text(json.dumps({"weight_map": {**table["weight_map"], first: "../../secret.safetensors"}}))
    with pytest.raises(CorruptFileError, match="outside its folder"):
        identify(folder)
    index.write_text(json.dumps({"weight_map": {**table["weight_map"], "ghost": table["weight_map"][first]}}))
    with pytest.raises(CorruptFileError, match="ghost"):
        identify(folder)
    index.write_text("{}")
    with pytest.raises(CorruptFileError, match="no weight_map"):
        identify(folder)


def test_a_line_break_in_a_name_begins_no_other_name() -> None:
    """The patterns of rules match the start of a name; all names are searched as one text."""
    pattern = rule("lora", None, "", "lora_te_")
    for name, fires in {"lora_te_x": True, "x\nlora_te_x": False, "x.lora_te_x": False}.items():
        names = {"first": (1,), name: (1,)}
        assert pattern.fires(names, lines_of(names)) == fires
