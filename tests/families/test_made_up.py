"""A family that a package brings: identified, drawn, streamed, switched, adapted and proven."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.extensions import Install

import safelight
from safelight.assembly.programs import WORKER
from safelight.catalog.identify import identify
from safelight.diagnostics import canary
from safelight.diagnostics.canary import Canaries, request
from safelight.errors import RequestError
from safelight.families import registry
from safelight.request.adapters import Lora
from safelight.settings_sources import load_settings
from safelight.workers.fresh_process import FreshProcesses
from safelight.workers.local_engine import LocalEngine

HOME = Path(__file__).parents[1] / "data/made_up"
WIDTHS = {"letters": 256, "flow": 256, "pixels": 16}


@pytest.fixture(autouse=True)
def installed(install: Install) -> Generator[None]:
    """The package of the family is installed, also for processes that the test starts."""
    install(HOME)
    yield
    install()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint with seeded random weights."""
    family = registry.family("made-up")
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for component, config in zip(family.components, family.architectures, strict=True):
        for row in config(WIDTHS[component.role]).rows():  # type: ignore[call-arg]
            scale = row.shape[-1] ** -0.5 if len(row.shape) > 1 else 0.02
            tensors[f"{component.role}.{row.name}"] = torch.randn(row.shape, generator=generator) * scale
    path = tmp_path / "made-up.safetensors"
    save_file(tensors, path)
    return path


def engine(root: Path, **settings: object) -> LocalEngine:
    return safelight.open_engine(root, threads=1, attention_type="torch-sdp", **settings)  # type: ignore[return-value]


def ask(model: Path, **changes: object) -> safelight.Request:
    values = {"steps": 4, "width": 128, "height": 96, "seed": 3, **changes}
    return safelight.Request("a red apple", str(model), **values)  # type: ignore[arg-type]


def test_it_is_identified_and_draws(file: Path, tmp_path: Path) -> None:
    found = identify(file)
    assert (found.base, found.prediction_type) == ("made-up", "flow")
    assert "layers of the made-up transformer; a rectified flow" in found.rule
    made = engine(tmp_path / "root")
    image = next(made.generate(ask(file)))
    assert (image.width, image.height) == (128, 96)
    assert image.metadata["model"]["components"].keys() == {"letters", "flow", "pixels"}
    other = next(made.generate(ask(file, seed=4)))
    assert other.pixels_sha256 != image.pixels_sha256
    larger = next(made.generate(ask(file, hires_scale=1.5)))
    assert (larger.width, larger.height) == (192, 144)


def test_it_is_the_same_whatever_memory_there_is_and_whatever_came_before(
    file: Path, tiny: Path, tmp_path: Path
) -> None:
    right = next(engine(tmp_path / "one").generate(ask(file))).pixels_sha256
    made = engine(tmp_path / "two", max_cache_ram_gb=0.002)
    assert any(part["streamed"] for part in made.fits(ask(file), made.library.find(str(file)))["components"])
    sd = ask(tiny / "a.safetensors", width=64, height=64)
    seen = {next(made.generate(ask(file))).pixels_sha256}
    made = engine(tmp_path / "three")
    first = next(made.generate(sd)).pixels_sha256
    seen.add(next(made.generate(ask(file))).pixels_sha256)
    assert next(made.generate(sd)).pixels_sha256 == first
    seen.add(next(made.generate(ask(file))).pixels_sha256)
    assert seen == {right}


def test_it_takes_a_lora(file: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(4, 256, generator=generator), torch.randn(256, 4, generator=generator)
    lora: dict[str, torch.Tensor] = {}
    whole = load_file(file)
    for n in range(4):
        lora[f"lora_flow_blocks_{n}_qkv.lora_down.weight"] = down.clone()
        lora[f"lora_flow_blocks_{n}_qkv.lora_up.weight"] = up.clone()
        whole[f"flow.blocks.{n}.qkv.weight"] += 0.5 * (up @ down)
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(whole, tmp_path / "fused.safetensors")
    made = engine(tmp_path / "root")
    plain = next(made.generate(ask(file)))
    adapted = next(made.generate(ask(file, loras=[Lora(str(tmp_path / "lora.safetensors"), strength=0.5)])))
    assert adapted.pixels_sha256 == next(made.generate(ask(tmp_path / "fused.safetensors"))).pixels_sha256
    assert adapted.pixels_sha256 != plain.pixels_sha256
    assert next(made.generate(ask(file))).pixels_sha256 == plain.pixels_sha256


def test_its_canary_is_that_of_a_fresh_process(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "TOKENS_PER_SIDE", 17)
    made = engine(tmp_path / "root")
    model = made.library.add(file, "made-up")
    next(made.generate(ask(file)))
    fresh = FreshProcesses(
        WORKER, load_settings(tmp_path / "root", threads=1, attention_type="torch-sdp"), made.catalog
    )
    canaries = Canaries(tmp_path / "root", fresh.make_first_image)
    assert request(model).width == 272
    assert canaries.compare(model, lambda asked: next(made.generate(asked))) is None
    fresh.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"negative": "blue"}, "negative='blue': asks for a negative prompt, which"),
        ({"cfg": 3.0}, "cfg=3.0: asks for a guidance scale, which"),
        ({"clip_skip": 1}, "clip_skip=1: asks for CLIP skip, which"),
        ({"seamless": "x"}, "seamless='x': asks for seamless images, which"),
        ({"sampler": "ddim"}, "which has: euler, heun, dpmpp_2m, unipc, lcm"),
        ({"width": 136}, "must be a multiple of 16 for made-up"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    file: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        next(engine(tmp_path / "root").generate(ask(file, **changes)))


def test_a_model_whose_package_is_gone_is_named_and_spoils_no_list(
    file: Path, tiny: Path, tmp_path: Path, install: Install
) -> None:
    made = engine(tmp_path / "root")
    model = made.library.add(file, "made-up")
    made.library.add(tiny / "a.safetensors", "other")
    install()
    library = engine(tmp_path / "root").library
    assert "other" in [card.name for card in library.cards()]
    with pytest.raises(safelight.CorruptFileError, match="no installed family has the architecture made-up-letters"):
        library.get("made-up")
    with pytest.raises(RequestError, match="is of the family made-up, which no installed package has"):
        _ = model.family


def test_it_is_short() -> None:
    """Adding a family takes little: these files are all of it."""
    assert sum(len(path.read_text().splitlines()) for path in HOME.glob("*.py")) <= 150
