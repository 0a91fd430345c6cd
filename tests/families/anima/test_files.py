"""Anima's files as people have them: the text conditioner is in the transformer's file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from support import anima, zimage
from support.families import tiny_families

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import IncompleteModelError, InputError, UnsupportedModelError
from safelight.families.anima.spec import ANIMA, PREFIXES
from safelight.families.anima.text_conditioner import AnimaConditionerConfig
from safelight.families.anima.text_encoder import Qwen3SmallConfig
from safelight.families.anima.transformer import AnimaConfig
from safelight.families.components import Config
from safelight.families.family_model import construct
from safelight.request.adapters import Purpose

SEED = 5
PUBLISHED = tuple(one.standard for one in ANIMA.components if one.role != "vae")
ADAPTER = "model.diffusion_model.llm_adapter."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_families()["anima"].write_files(tmp_path_factory.mktemp("files"), SEED)


@pytest.mark.parametrize("config", PUBLISHED)
def test_the_tables_have_what_the_modules_have(config: Config) -> None:
    with torch.device("meta"):
        state = construct(ANIMA, config).state_dict()
    assert {row.name: row.shape for row in config.rows()} == {name: tuple(one.shape) for name, one in state.items()}


def test_settings_come_back_from_shapes() -> None:
    kinds = {Qwen3SmallConfig: "text_encoder", AnimaConditionerConfig: "text_conditioner", AnimaConfig: "transformer"}
    for config in PUBLISHED:
        assert config is not None
        infer = ANIMA.component(kinds[type(config)]).infer  # type: ignore[index]
        assert infer({row.name: row.shape for row in config.rows()}) == config


def test_diffusers_converts_the_original_names_to_the_same_tensors() -> None:
    net = anima.modules(SEED)["transformer"].state_dict()
    named = {row.name: row.sources[-1].name for row in anima.configs()["transformer"].rows()}
    original = {f"net.{named[name]}": tensor for name, tensor in net.items()}
    converted = convert_cosmos_transformer_checkpoint_to_diffusers(original)
    assert converted.keys() == net.keys()
    assert all(torch.equal(converted[name], net[name]) for name in net)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_is_identified(prefix: str, tmp_path: Path, files: dict[str, Path]) -> None:
    net = load_file(files["transformer"])
    bare = {prefix + name.removeprefix("model.diffusion_model."): one for name, one in net.items()}
    training = {f"{prefix}pos_embedder.seq": torch.zeros(4), f"{prefix}accum_iteration": torch.zeros(1)}
    save_file({**bare, **training}, tmp_path / "net.safetensors")
    found = identify(tmp_path / "net.safetensors")
    assert (found.kind, found.base, found.variant) == ("checkpoint", "anima", "text-to-image")
    assert found.layout is not None
    assert found.layout.missing == ("text_encoder", "vae")
    assert "alone" in found.rule


def test_a_transformer_without_the_adapter_is_named_for_what_it_is(tmp_path: Path, files: dict[str, Path]) -> None:
    net = {name: one for name, one in load_file(files["transformer"]).items() if not name.startswith(ADAPTER)}
    for state in (net, anima.modules(SEED)["transformer"].state_dict()):
        save_file(state, tmp_path / "net.safetensors")
        found = identify(tmp_path / "net.safetensors")
        assert (found.base, found.layout) == ("cosmos-predict2", None)
        assert found.rule.endswith("it is not supported yet")


def test_a_missing_tensor_of_the_adapter_is_named(tmp_path: Path, files: dict[str, Path]) -> None:
    net = load_file(files["transformer"])
    lost = f"{ADAPTER}blocks.1.cross_attn.v_proj.weight"
    del net[lost]
    save_file(net, tmp_path / "net.safetensors")
    with pytest.raises(IncompleteModelError, match=r"blocks\.1\.cross_attn\.v_proj\.weight"):
        identify(tmp_path / "net.safetensors")


def test_a_larger_qwen3_is_another_text_encoder(root: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    """Its queries are not twice as wide as its hidden states."""
    catalog = Catalog.under(root)
    other = zimage.write_files(tmp_path / "other", SEED)
    catalog.adapters.add(other / "text_encoders/qwen_3_tiny.safetensors")
    catalog.adapters.add(files["vae"])
    with pytest.raises(UnsupportedModelError, match=r"no text_encoder \(qwen3-0.6b 1024x28\), and none in the library"):
        catalog.library.add(files["transformer"])
    catalog.adapters.add(files["text_encoder"])
    model = catalog.library.add(files["transformer"])
    assert model.sources.keys() == {"text_encoder", "vae"}


def test_a_sharded_folder_has_the_same_digest(folder: Path, root: Path, tmp_path: Path) -> None:
    sharded = anima.write_folder(tmp_path / "sharded", SEED, max_shard_size="100KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    library = Catalog.under(root).library
    assert library.add(folder).digest == library.add(sharded).digest


def test_a_component_that_the_index_says_was_not_loaded_is_read_from_its_folder(folder: Path, tmp_path: Path) -> None:
    """A modular pipeline that was saved in parts has null for the class of such a component."""
    path = Path(shutil.copytree(folder, tmp_path / "other"))
    index = path / "modular_model_index.json"
    values = json.loads(index.read_text())
    values["vae"][:2] = [None, None]
    index.write_text(json.dumps(values))
    found = identify(path).layout
    assert found is not None
    assert found.missing == ()


@pytest.mark.parametrize(
    ("file", "key", "value", "says"),
    [
        ("scheduler/scheduler_config.json", "shift", 5.0, r"shift = 5\.0; anima has 3\.0"),
        ("transformer/config.json", "rope_scale", [2.0, 1.0, 1.0], r"rope_scale = \[2\.0, 1\.0, 1\.0\]"),
        ("transformer/config.json", "extra_pos_embed_type", "learnable", "extra_pos_embed_type = learnable"),
        ("text_conditioner/config.json", "min_sequence_length", 256, "min_sequence_length = 256; anima has 512"),
    ],
)
def test_other_settings_are_refused(
    file: str, key: str, value: object, says: str, tmp_path: Path, folder: Path
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "other"))
    settings = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**settings, key: value}))
    with pytest.raises(UnsupportedModelError, match=says):
        identify(path)


def test_an_export_is_refused(folder: Path, root: Path, tmp_path: Path) -> None:
    model = Catalog.under(root).library.add(folder, "anima")
    with pytest.raises(InputError, match=r"anima \(anima\) cannot be exported: diffusers has it as a modular pipeline"):
        export.to_diffusers(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_tokenizer_with_more_tokens_than_the_adapter_is_named(root: Path, folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "other"))
    [file] = (path / "text_conditioner").glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "embed.weight": tensors["embed.weight"][:1].clone()}, file)
    request = safelight.Request("a red apple", str(path), seed=3, steps=1, width=64, height=64)
    with pytest.raises(InputError, match=r"the token [0-9]+, and embed.weight of its text encoder has 1 rows"):
        next(safelight.open_engine(root).generate(request))


def test_the_text_encoder_of_another_model_leaves_the_text_conditioner(
    root: Path, folder: Path, tmp_path: Path
) -> None:
    """The text conditioner was trained with the transformer, and is in its file."""
    library = Catalog.under(root).library
    library.add(anima.write_folder(tmp_path / "other", SEED + 1), "other")
    before = library.add(folder, "own")
    after = library.set_choices("own", parts=[(Purpose.TEXT_ENCODER, "other")])
    same = {
        role: before.manifest.component(role).digest == after.manifest.component(role).digest for role in ANIMA.roles
    }
    assert same == {"text_encoder": False, "text_conditioner": True, "transformer": True, "vae": True}
