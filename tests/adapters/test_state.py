"""Combinations are values: whatever was made, failed, or was taken off before, an image is that of a fresh engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import adapters
from support.scale import times

import safelight
from safelight.assembly.engine import open_engine
from safelight.devices.simulated import simulated
from safelight.errors import CorruptFileError, IntegrityError, OutOfMemoryError, RequestError
from safelight.families.sd.spec import SD1
from safelight.request.adapters import Lora, Purpose
from safelight.request.prompts import loras
from safelight.request.results import Progress
from safelight.request.schema import Request
from safelight.settings_sources import load_settings
from safelight.workers.local_engine import LocalEngine

Ask = Callable[..., Request]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number in (1, 2, 3):
        adapters.write(folder / f"{number}.safetensors", "sd1", number)
    adapters.write(folder / "xl.safetensors", "sdxl", 1, adapters.kohya_two)
    return folder


@pytest.fixture
def lora(files: Path) -> Callable[..., Lora]:
    return lambda number, strength=1.0, **more: Lora(str(files / f"{number}.safetensors"), strength, **more)


def pixels(engine: LocalEngine, request: Request) -> str:
    return next(engine.generate(request)).pixels_sha256


def test_state_01_02_04_08_10_11_on_and_off_many_times(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    engine = safelight.open_engine(root)
    wanted = [ask(), ask(loras=(lora(1),)), ask("b.safetensors"), ask(loras=(lora(1, 0.5), lora(2)))]
    right = [pixels(safelight.open_engine(root), request) for request in wanted]
    assert len(set(right)) == len(wanted)
    chance = random.Random(5)
    for _ in range(times(12, 40)):
        at = chance.randrange(len(wanted))
        assert pixels(engine, wanted[at]) == right[at]


def test_neither_order_nor_a_strength_of_nothing_changes_a_bit(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    engine = safelight.open_engine(root)
    one, other = lora(1, 0.7), lora(2, -0.4)
    # Strong guidance enlarges a difference in the last bit until it is seen in the pixels.
    strong = {"cfg": 40.0, "steps": 8}
    assert pixels(engine, ask(loras=(one, other), **strong)) == pixels(engine, ask(loras=(other, one), **strong))
    assert pixels(engine, ask(loras=(lora(1, 0.0), lora(3, 0)))) == pixels(engine, ask())
    assert pixels(engine, ask(loras=(one, lora(3, 0.0)))) == pixels(engine, ask(loras=(one,)))


def test_state_07_every_strength_is_part_of_the_key(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    engine, seen = safelight.open_engine(root), dict[str, Lora]()
    blocks = [0.0] * 17
    changes = (
        lora(1),
        lora(1, 0.5),
        lora(1, unet=0.5),
        lora(1, text_encoder=0.5),
        lora(1, blocks=(1.0, *blocks[1:])),
        lora(1, blocks=(1.0, 1.0, *blocks[2:])),
        lora(1, blocks=(0.5, *[1.0] * 16)),
    )
    for changed in changes[: times(4, 7)]:
        made = pixels(engine, ask(loras=(changed,)))
        assert made not in seen
        assert made == pixels(safelight.open_engine(root), ask(loras=(changed,)))
        seen[made] = changed
    assert pixels(engine, ask(loras=(lora(1, unet=1.0, text_encoder=1.0),))) in seen


def test_state_09_the_first_and_each_later_image_has_it(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    images = list(safelight.open_engine(root).generate(ask(loras=(lora(1),), count=3)))
    alone = [pixels(safelight.open_engine(root), ask(loras=(lora(1),), seed=number)) for number in range(3)]
    assert [image.pixels_sha256 for image in images] == alone


def test_state_05_a_nan_is_refused_and_the_next_is_right(
    root: Path, ask: Ask, lora: Callable[..., Lora], files: Path, tmp_path: Path
) -> None:
    engine = safelight.open_engine(root)
    right = pixels(engine, ask(loras=(lora(1),)))
    tensors = load_file(files / "1.safetensors")
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(CorruptFileError, match="NaN"):
        pixels(engine, ask(loras=(lora(1), Lora(str(tmp_path / "nan.safetensors")))))
    assert pixels(engine, ask(loras=(lora(1),))) == right


def bad(kind: str, files: Path, folder: Path) -> Lora:
    """An adapter that is wrong in one way."""
    tensors = load_file(files / "1.safetensors")
    down = next(name for name in tensors if name.endswith("lora_down.weight") and tensors[name].ndim == 2)
    path = folder / f"{kind}.safetensors"
    match kind:
        case "strange":
            tensors |= {"lora_unet_nowhere.lora_down.weight": torch.ones(4, 8), "something": torch.ones(2)}
        case "half":
            del tensors[down]
        case "shape":
            tensors[down] = torch.ones(4, tensors[down].shape[1] + 1)
        case "rank":
            up = down.replace("down", "up")
            tensors |= {down: torch.ones(9000, tensors[down].shape[1]), up: torch.ones(tensors[up].shape[0], 9000)}
        case "integer":
            tensors[down] = torch.ones(4, 8, dtype=torch.int32)
        case "base":
            return Lora(str(files / "xl.safetensors"))
        case "absent":
            return Lora(str(path))
    save_file(tensors, path)
    if kind == "short":
        path.write_bytes(path.read_bytes()[:-100])
    return Lora(str(path))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("strange", "2 of its tensors fit nothing in a: .*nowhere"),
        ("half", "fit nothing in a"),
        ("shape", "does not fit a"),
        ("rank", "does not fit a"),
        ("integer", "is I32"),
        ("base", "does not fit a|is a lora for sdxl; a is sd1"),
        ("absent", "does not exist"),
        ("short", "cut off|ends at byte"),
    ],
)
def test_what_is_wrong_is_said_and_the_next_is_right(
    root: Path, ask: Ask, lora: Callable[..., Lora], files: Path, tmp_path: Path, kind: str, says: str
) -> None:
    engine = safelight.open_engine(root)
    right = pixels(engine, ask(loras=(lora(1),)))
    with pytest.raises(safelight.SafelightError, match=says) as raised:
        pixels(engine, ask(loras=(lora(2), bad(kind, files, tmp_path))))
    assert isinstance(raised.value, (RequestError, CorruptFileError, safelight.InputError))
    assert pixels(engine, ask(loras=(lora(1),))) == right
    if kind in ("strange", "half"):
        assert pixels(engine, ask(loras=(bad(kind, files, tmp_path),), lenient=True))


def test_state_12_at_the_least_memory_the_pixels_are_the_same(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    """Streamed, with what lies over the weights computed once and read from disk from then on."""
    wanted = ask(loras=(lora(1), lora(2, 0.5)), steps=4)
    right = pixels(safelight.open_engine(root), wanted)
    engine = safelight.open_engine(root, max_cache_ram_gb=0.0001)
    with pytest.raises(OutOfMemoryError, match=r"; at least .* is needed") as refused:
        pixels(engine, wanted)
    least = float(str(refused.value).rpartition("; at least ")[2].split(" ")[0])
    streamed: set[str] = set()
    for _ in range(10):
        engine = safelight.open_engine(root, max_cache_ram_gb=least)

        def look(_: Progress, engine: LocalEngine = engine) -> None:
            streamed.update(s["segment"] for t in engine.tiers for s in t.last_plan() if s["action"] == "stream")

        try:
            made = next(engine.generate(wanted, look)).pixels_sha256
        except OutOfMemoryError as error:
            # Another component needs more.
            least = float(str(error).rpartition("; at least ")[2].split(" ")[0])
            continue
        assert made == right
        assert any("text_encoder" in segment and "+" in segment for segment in streamed)
        return
    raise AssertionError


def test_state_28_a_cancel_in_the_middle_leaves_nothing(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    engine = safelight.open_engine(root)
    plain, with_it = pixels(engine, ask()), pixels(engine, ask(loras=(lora(1),)))

    def stop(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.step == 1:
            raise safelight.Cancelled

    with pytest.raises(safelight.Cancelled):
        next(engine.generate(ask(loras=(lora(2),)), stop))
    assert pixels(engine, ask()) == plain
    assert pixels(engine, ask(loras=(lora(1),))) == with_it


def test_state_29_when_memory_runs_out_the_adapter_is_not_lost(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    with simulated() as device:
        engine = open_engine(load_settings(root), device)
        plain, right = pixels(engine, ask()), pixels(engine, ask(loras=(lora(1),)))
        assert plain != right
        for failures in (1, 4)[: times(1, 2)]:
            engine.loaded.unload(None)
            device.faults.failed_allocations = failures
            try:
                assert pixels(engine, ask(loras=(lora(1),))) == right
            except OutOfMemoryError:
                device.faults.failed_allocations = 0
            assert pixels(engine, ask(loras=(lora(1),))) == right
            assert pixels(engine, ask()) == plain
        engine.close()


def test_what_was_spoiled_in_memory_is_computed_again(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    """The base's bytes, the adapter's, and what was computed from both."""
    engine = safelight.open_engine(root, verify_transfers="off")
    wanted = ask(loras=(lora(1),))
    right = pixels(engine, wanted)
    for mark in ("adapter ", " +"):
        for piece, held in engine.resources.residency.table.residents.items():
            if mark in piece.component_key:
                for tensor in held.buffer.tensors.values():
                    # An adapter's bytes are finite all the same: no gate would see it.
                    tensor.mul_(1.5 if mark == "adapter " else float("nan"))
        if mark == "adapter ":
            # What is computed from it goes, so that it is computed again.
            for piece in [p for p in engine.resources.residency.table.residents if " +" in p.component_key]:
                engine.resources.residency.table.evict(piece)
        assert pixels(engine, wanted) == right


def test_load_03_an_adapter_that_was_replaced_is_not_taken_for_the_one_that_was_added(
    root: Path, ask: Ask, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes((files / "1.safetensors").read_bytes())
    engine = safelight.open_engine(root)
    added = engine.catalog.adapters.add(path)
    right = pixels(engine, ask(loras=(Lora("mine"),)))
    path.write_bytes((files / "2.safetensors").read_bytes())
    with pytest.raises(IntegrityError, match="its content changed"):
        pixels(engine, ask(loras=(Lora("mine"),)))
    path.write_bytes((files / "1.safetensors").read_bytes())
    image = next(engine.generate(ask(loras=(Lora("mine", digest=added.digest),))))
    assert image.pixels_sha256 == right
    (written,) = image.metadata["request"]["loras"]
    assert (written["name"], written["digest"]) == ("mine", added.digest)


def test_prompts_name_adapters_too(root: Path, ask: Ask, files: Path) -> None:
    engine = safelight.open_engine(root)
    engine.catalog.adapters.add(files / "1.safetensors", "style")
    asked = pixels(engine, ask(prompt="red apple", loras=(Lora("style", 0.8),)))
    assert pixels(engine, ask(prompt="red apple <lora:style:0.8>")) == asked
    apart = pixels(engine, ask(loras=(Lora("style", text_encoder=0.5, unet=0.8),)))
    assert pixels(engine, ask(prompt="<lora:style:0.5:0.8> red apple")) == apart
    assert pixels(engine, ask(prompt="red <lora:style:te=0.5:unet=0.8> apple")) == apart
    with pytest.raises(RequestError, match="at character 4: 'much' is not a number"):
        pixels(engine, ask(prompt="red <lora:style:much>"))
    with pytest.raises(safelight.InputError, match=r"no adapter named 'stile'.* Did you mean style"):
        pixels(engine, ask(prompt="<lora:stile>"))


def test_another_strength_is_not_made_of_spoiled_bytes(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    engine = safelight.open_engine(root, verify_transfers="off")
    right = pixels(safelight.open_engine(root), ask(loras=(lora(1, 0.5),)))
    pixels(engine, ask(loras=(lora(1),)))
    for piece, held in engine.resources.residency.table.residents.items():
        if piece.component_key.startswith("adapter "):
            for tensor in held.buffer.tensors.values():
                tensor.mul_(1.5)
    assert pixels(engine, ask(loras=(lora(1, 0.5),))) == right


def test_a_checkpoint_that_was_moved_is_read_where_it_is(
    root: Path, ask: Ask, lora: Callable[..., Lora], tiny: Path, tmp_path: Path
) -> None:
    engine = safelight.open_engine(root, max_cache_ram_gb=0.03)
    asked = {"prompt": "red apple", "steps": 2, "width": 64, "height": 64, "loras": (lora(1),)}
    places = [tmp_path / "here/m.safetensors", tmp_path / "there/m.safetensors"]
    for place in places:
        place.parent.mkdir()
    places[0].write_bytes((tiny / "a.safetensors").read_bytes())
    right = pixels(engine, Request(model=str(places[0]), **asked))
    places[0].rename(places[1])
    engine.loaded.unload(None)
    assert pixels(engine, Request(model=str(places[1]), **asked)) == right


def test_what_peft_says_of_its_scale_is_part_of_the_content(root: Path, files: Path, tmp_path: Path) -> None:
    shelf = safelight.open_engine(root).catalog.adapters
    tensors = adapters.lora("sd1", 1, adapters.peft, alpha=None)
    bare = {name.removeprefix("unet."): t for name, t in tensors.items() if name.startswith("unet.")}
    said = [{"unet.r": 4, "unet.lora_alpha": 8}, {"unet.r": 4, "unet.lora_alpha": 16}, {"r": 4, "lora_alpha": 8}]
    found = []
    for number, settings in enumerate(said):
        path = tmp_path / f"{number}.safetensors"
        save_file(bare if "r" in settings else tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
        found.append(shelf.find(str(path)))
    assert found[0].digest != found[1].digest
    assert [one.component.config.scale(SD1.component("unet")) for one in found] == [2.0, 4.0, 2.0]


def test_strengths_are_read_as_automatic1111_reads_them() -> None:
    expected = {
        "x": (1.0, 1.0),
        "x:0.5": (0.5, 0.5),
        "x:0.5:0.8": (0.5, 0.8),
        "x:te=0": (0.0, 0.0),
        "x:1:te=0.5": (0.5, 0.5),
        "x:unet=0.3": (1.0, 0.3),
    }
    for text, (te, unet) in expected.items():
        found = loras.parse_lora(text)
        assert (found.strength_for(Purpose.TEXT_ENCODER), found.strength_for(Purpose.DENOISER)) == (te, unet), text
        again = loras.extract_lora_tags("prompt", loras.lora_to_tag(found))[1][0]
        assert (again.strength_for(Purpose.TEXT_ENCODER), again.strength_for(Purpose.DENOISER)) == (te, unet), text
    with pytest.raises(RequestError, match="inside another"):
        loras.extract_lora_tags("prompt", "a <lo<lora:ink:0>ra:/etc/hostname:1>")
    with pytest.raises(RequestError, match="at most 50"):
        loras.extract_lora_tags("prompt", "<lora:x>" * 51)


def test_a_checkpoint_is_no_adapter_and_an_adapter_no_checkpoint(root: Path, tiny: Path, files: Path) -> None:
    engine = safelight.open_engine(root)
    with pytest.raises(safelight.InputError, match="safelight models add"):
        engine.catalog.adapters.add(tiny / "a.safetensors")
    with pytest.raises(safelight.InputError, match="safelight adapters add"):
        engine.library.add(files / "1.safetensors")


def test_half_precision_is_what_fresh_engines_make(root: Path, ask: Ask, lora: Callable[..., Lora]) -> None:
    engine = safelight.open_engine(root)
    for precision in ("bf16", "fp32", "bf16"):
        wanted = ask(loras=(lora(1),), precision=precision)
        assert pixels(engine, wanted) == pixels(safelight.open_engine(root), wanted)
