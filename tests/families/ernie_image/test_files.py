"""ERNIE-Image's files as people have them, and its LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from support import ernie_image
from support.scale import thinned

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import IncompleteModelError, InputError, UnsupportedModelError
from safelight.families.ernie_image.transformer import ErnieImageConfig, infer
from safelight.families.family_model import construct
from safelight.families.parts.ministral3 import Ministral3Config
from safelight.families.registry import family
from safelight.request.adapters import Lora

SEED, RANK, STRENGTH = 5, 4, 0.7
PUBLISHED = (
    ErnieImageConfig(128, 4096, 12288, 36, 128, 3072),
    Ministral3Config(131072, 3072, 9216, 25, 32, 8),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ernie_image.write_folder(tmp_path_factory.mktemp("ernie") / "tiny", SEED)


def ask(model: str, **changes: Any) -> safelight.Request:
    return safelight.Request("a red apple", model, seed=3, steps=2, width=64, height=48, cfg=1.0, **changes)


def pixels(root: Path, model: Path, **changes: Any) -> bytes:
    engine: Any = safelight.open_engine(root)
    found = engine.library.add(model, f"m-{model.name}", variant="base")
    return next(engine.generate(ask(found.name, **changes))).pixels


@pytest.mark.parametrize("config", PUBLISHED)
def test_the_tables_have_what_the_modules_have(config: Any) -> None:
    with torch.device("meta"):
        state = construct(family("ernie-image"), config).state_dict()
    assert {row.name: row.shape for row in config.rows()} == {name: tuple(one.shape) for name, one in state.items()}


def test_settings_come_back_from_shapes() -> None:
    assert infer({row.name: row.shape for row in PUBLISHED[0].rows()}) == PUBLISHED[0]


def test_diffusers_converts_the_original_names_to_the_same_tensors() -> None:
    state = ernie_image.modules(SEED)["transformer"].state_dict()
    original = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    converted = single_file_utils.convert_ernie_image_transformer_checkpoint_to_diffusers(original)
    assert converted.keys() == state.keys() == {row.name for row in ernie_image.configs()["transformer"].rows()}


def test_a_sharded_folder_has_the_same_digest(folder: Path, root: Path, tmp_path: Path) -> None:
    sharded = ernie_image.write_folder(tmp_path / "sharded", SEED, max_shard_size="100KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    library = Catalog.under(root).library
    one, other = (library.add(path, path.name, variant="base") for path in (folder, sharded))
    assert one.digest == other.digest


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_named(root: Path, tmp_path: Path) -> None:
    """ERNIE-Image's tokenizer is a file of the checkpoint, so the shapes do not say how many tokens it has."""
    folder = ernie_image.write_folder(tmp_path / "folder", SEED)
    [path] = (folder / "text_encoder").glob("*.safetensors")
    tensors = load_file(path)
    [name] = [name for name in tensors if name.endswith("embed_tokens.weight")]
    save_file({**tensors, name: tensors[name][:20].clone()}, path)
    with pytest.raises(InputError, match=r"the token [0-9]+, and embed_tokens.weight of its text encoder has 20 rows"):
        pixels(root, folder)


def test_the_prompt_enhancer_is_no_text_encoder(tmp_path: Path) -> None:
    encoder: Any = ernie_image.modules(SEED)["text_encoder"]
    tensors = {f"model.{name}": one.clone() for name, one in encoder.language_model.state_dict().items()}
    save_file(tensors, tmp_path / "enhancer.safetensors")
    with pytest.raises(UnsupportedModelError, match="unknown kind of model"):
        identify(tmp_path / "enhancer.safetensors")


def test_other_settings_of_the_text_encoder_are_refused(tmp_path: Path) -> None:
    path = ernie_image.write_folder(tmp_path / "other", SEED)
    file = path / "text_encoder/config.json"
    file.write_text(file.read_text().replace('"factor": 16.0', '"factor": 8.0'))
    with pytest.raises(UnsupportedModelError, match=r"text_config\.rope_parameters\.factor = 8\.0; ernie-image has 16"):
        identify(path)
    path = ernie_image.write_folder(tmp_path / "shift", SEED)
    (path / "scheduler/scheduler_config.json").write_text('{"shift": 3.0}')
    with pytest.raises(UnsupportedModelError, match=r"shift = 3\.0; ernie-image has 4\.0"):
        identify(path)


@pytest.mark.parametrize(
    "name", thinned(["layers.1.self_attention.norm_k.weight", "text_proj.weight", "final_norm.linear.bias"], 1)
)
def test_a_missing_tensor_and_a_wrong_shape_are_named(name: str, tmp_path: Path) -> None:
    tensors = ernie_image.modules(SEED)["transformer"].state_dict()
    for changed in (None, torch.zeros(3, 5, 7)):
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(kept if changed is None else {**kept, name: changed}, tmp_path / "part.safetensors")
        with pytest.raises(IncompleteModelError) as error:
            identify(tmp_path / "part.safetensors")
        assert name in str(error.value)


def test_an_export_would_lack_layers_and_is_refused(folder: Path, root: Path, tmp_path: Path) -> None:
    model = Catalog.under(root).library.add(folder, "base", variant="base")
    with pytest.raises(InputError, match=r"base \(ernie-image\) cannot be exported: .* without its last layers"):
        export.to_diffusers(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def drawn(pipe: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    image = pipe("a red apple", width=64, height=48, num_inference_steps=2, guidance_scale=1.0, generator=generator)
    return image.images[0].tobytes()


LAYERS: Mapping[str, tuple[int, int]] = {
    "layers.0.self_attention.to_q": (64, 64),
    "layers.1.self_attention.to_out.0": (64, 64),
    "layers.1.mlp.linear_fc2": (64, 96),
}


def lora(path: Path, naming: str) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in LAYERS.items():
        down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((RANK, columns), (rows, RANK)))
        if naming == "kohya":
            module = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        else:
            tensors |= {f"{naming}{name}.lora_A.weight": down, f"{naming}{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("naming", thinned(["diffusion_model.", "kohya", "transformer.", "base_model.model."], 2))
def test_diffusers_adds_the_same_adapter(naming: str, folder: Path, root: Path, tmp_path: Path) -> None:
    """The sums differ by one rounding, so the pixels by 1."""
    own = lora(tmp_path / "own.safetensors", naming)
    assert identify(own).base == "ernie-image"
    pipe = ernie_image.pipeline(SEED)
    pipe.load_lora_weights(load_file(lora(tmp_path / "theirs.safetensors", "diffusion_model.")), adapter_name="one")
    pipe.set_adapters(["one"], [STRENGTH])
    theirs = torch.frombuffer(bytearray(drawn(pipe)), dtype=torch.uint8).int()
    changed = pixels(root, folder, loras=(Lora(str(own), STRENGTH),))
    assert (torch.frombuffer(bytearray(changed), dtype=torch.uint8).int() - theirs).abs().max() <= 1
    assert changed != pixels(root, folder)
