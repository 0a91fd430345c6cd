"""What installed packages add works on every surface, and a package that does not work hurts only who uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from support import controls
from support.extensions import HOME, Install, write_package
from support.jobs import resolved
from support.serving import ended, serving
from typer.testing import CliRunner

import safelight
from safelight.cli import remake
from safelight.cli.main import app
from safelight.errors import ExtensionError, RequestError, SettingError, UnsupportedModelError
from safelight.extensions import Extensible, instance_of
from safelight.families import registry
from safelight.families.sd.spec import SD1
from safelight.pictures import chunks
from safelight.pipeline import preprocess
from safelight.queue.database import Database
from safelight.request.adapters import Control, Lora
from safelight.request.samplers import SAMPLERS
from safelight.request.stored import read_request
from safelight.workers.local_engine import LocalEngine

Ask = Callable[..., safelight.Request]
SMALL = {"prompt": "red apple", "model": "starter-noto", "steps": 2, "width": 64, "height": 64, "seed": 5}


def test_a_table_has_the_built_in_values_first_and_loads_nothing_before_it_is_used(
    install: Install, tmp_path: Path
) -> None:
    write_package(tmp_path / "p", "odd", "safelight.numbers", {"one": "odd_module:ONE", "two": "odd_module:TWO"})
    (tmp_path / "p/odd_module.py").write_text("ONE, TWO = 10, 2\n")
    install(tmp_path / "p")
    table: Extensible[int] = Extensible({"one": 1}, "safelight.numbers", instance_of(int))
    assert list(table) == ["one", "two"]
    assert len(table) == 2
    assert "odd_module" not in sys.modules
    assert (table["one"], table["two"]) == (1, 2)
    assert "three" not in table
    with pytest.raises(KeyError):
        table["three"]


def test_built_in_names_do_not_read_the_installed_packages() -> None:
    code = "import safelight.cli.main, safelight.request.schema as s, sys; s.Request('x', 'm', sampler='ddim');"
    code += "assert 'importlib.metadata' not in sys.modules or not __import__('safelight.extensions').extensions"
    code += ".extensions.cache_info().currsize"
    subprocess.run([sys.executable, "-c", code], check=True)


BROKEN = {
    "raises": ("raise OSError('no such chip')", "failed with OSError: no such chip"),
    "lacks": ("x = 1", "AttributeError"),
    "wrong": ("VALUE = 'text'", "failed with TypeError: must be a Sampler, not a str"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_package_that_fails_is_named_and_hurts_nobody_else(install: Install, tmp_path: Path, case: str) -> None:
    code, says = BROKEN[case]
    write_package(tmp_path / "p", f"bad-{case}", "safelight.samplers", {"bad": f"bad_{case}:VALUE"})
    (tmp_path / f"p/bad_{case}.py").write_text(f"{code}\n")
    install("sampler", tmp_path / "p")
    with pytest.raises(ExtensionError, match=says) as error:
        safelight.Request("x", "m", sampler="bad")
    assert f"'bad' (group safelight.samplers) of the package bad-{case} 1.0" in str(error.value)
    assert safelight.Request("x", "m", sampler="clipped").sampler == "clipped"
    with capture_logs() as logs:
        assert list(SAMPLERS.usable())[-1][0] == "clipped"
    assert says in logs[0]["event"]


def test_two_packages_with_one_name_are_both_named(install: Install, tmp_path: Path) -> None:
    write_package(tmp_path / "p", "other", "safelight.samplers", {"clipped": "other:VALUE"})
    install("sampler", tmp_path / "p")
    with pytest.raises(ExtensionError, match="two packages have this name") as error:
        safelight.Request("x", "m", sampler="clipped")
    assert "clipped-sampler 1.0" in str(error.value)
    assert "other 1.0" in str(error.value)
    assert safelight.Request("x", "m").sampler_name == "euler"


def test_a_sampler_draws_and_is_in_the_metadata(install: Install, engine: safelight.Engine, ask: Ask) -> None:
    install("sampler")
    image = next(engine.generate(ask(sampler="clipped", steps=4)))
    plain = next(engine.generate(ask(sampler="ddim", steps=4)))
    assert image.metadata["request"]["sampler"] == "clipped"
    assert image.metadata["extensions"] == {"safelight.samplers: clipped": "clipped-sampler 1.0"}
    assert plain.metadata["extensions"] == {}
    older = {**image.metadata, "extensions": {"safelight.samplers: clipped": "clipped-sampler 0.9"}}
    assert "clipped-sampler 0.9, now clipped-sampler 1.0" in remake._differences(older, image).values()
    assert "Sampler: Clipped, Schedule type: Automatic" in chunks.parameters(image.metadata)
    assert image.pixels_sha256 != plain.pixels_sha256
    assert next(engine.generate(ask(sampler="clipped", steps=4))).pixels_sha256 == image.pixels_sha256


def test_a_picture_of_a_sampler_that_is_gone_is_shown_and_fails_alone(
    install: Install, engine: safelight.Engine, ask: Ask
) -> None:
    install("sampler")
    image = next(engine.generate(ask(sampler="clipped")))
    install()
    assert "Sampler: clipped" in chunks.parameters(image.metadata)
    with pytest.raises(RequestError, match="sampler='clipped': must be one of ddim"):
        read_request(image.metadata["request"], image.metadata["version"])


def test_the_command_line_takes_a_sampler(install: Install, tiny: Path, tmp_path: Path) -> None:
    install("sampler")
    words = ["generate", "red apple", "-m", str(tiny / "a.safetensors"), "--sampler", "Clipped", "--steps", "2"]
    words += ["--width", "64", "--height", "64", "--json", "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    [path] = (tmp_path / "out").glob("*.png")
    assert json.loads(ran.stdout.splitlines()[0])["path"] == str(path)


def test_the_apis_take_a_sampler(install: Install, root: Path) -> None:
    install("sampler")
    with serving(root) as server, server.client() as http:
        assert {"name": "Clipped", "aliases": ["clipped"], "options": {}} in http.get("/sdapi/v1/samplers").json()
        job = http.post("/api/v1/generate", json={**SMALL, "sampler": "clipped"}).json()
        assert ended(http, job["id"])["state"] == "done"
        body = {"prompt": "x", "steps": 2, "width": 64, "height": 64, "sampler_name": "Clipped"}
        answer = http.post("/sdapi/v1/txt2img", json=body).json()
        assert json.loads(answer["info"])["sampler_name"] == "Clipped"


@pytest.mark.full
def test_a_queued_job_whose_sampler_is_gone_fails_alone(install: Install, root: Path) -> None:
    install("sampler")
    database = Database(root)
    asked = [safelight.Request(**{**SMALL, "sampler": sampler}) for sampler in ("clipped", "euler")]  # type: ignore[arg-type]
    jobs = database.accept(*(resolved(root, request) for request in asked))
    database.close()
    install()
    with serving(root) as server, server.client() as http:
        first, second = (ended(http, job.id) for job in jobs)
    assert (first["state"], second["state"]) == ("failed", "done")
    assert "sampler='clipped': must be one of ddim" in first["reason"]


def test_a_family_of_a_package_that_fails_is_left_out(install: Install, tmp_path: Path) -> None:
    write_package(tmp_path / "p", "bad-family", "safelight.families", {"bad": "bad_family:FAMILIES"})
    (tmp_path / "p/bad_family.py").write_text("import nothing_of_that_name\n")
    install(tmp_path / "p")
    registry.families.cache_clear()
    with capture_logs() as logs:
        assert "sdxl" in registry.families()
    registry.families.cache_clear()
    assert "'bad' (group safelight.families) of the package bad-family 1.0: failed with" in logs[0]["event"]


@pytest.mark.parametrize("taken", ["name", "architecture"])
def test_a_family_with_a_taken_name_is_left_out_and_the_built_in_one_stays(
    install: Install, tmp_path: Path, taken: str
) -> None:
    write_package(tmp_path / "p", "taken-family", "safelight.families", {"taken": f"taken_{taken}:FAMILIES"})
    code = "from dataclasses import replace\nfrom safelight.families.sd.spec import SD1\n"
    if taken == "name":
        code += "FAMILIES = (replace(SD1, latent_space='other'),)\n"
    else:
        code += "class Same(SD1.architectures[0]): pass\n"
        code += "FAMILIES = (replace(SD1, name='other', architectures=(Same,)),)\n"
    (tmp_path / f"p/taken_{taken}.py").write_text(code)
    install(tmp_path / "p")
    registry.families.cache_clear()
    registry.architectures.cache_clear()
    with capture_logs() as logs:
        assert registry.family("sd1") is SD1
        assert "other" not in registry.families()
        assert registry.architectures()
    registry.families.cache_clear()
    registry.architectures.cache_clear()
    assert f"the {'family' if taken == 'name' else 'architecture'} name" in logs[0]["event"]
    assert "is taken" in logs[0]["event"]


def test_the_document_shows_the_examples() -> None:
    page = (HOME.parents[2] / "docs/extending.md").read_text()
    modules, entry_points = sorted(HOME.rglob("*.py")), sorted(HOME.rglob("entry_points.txt"))
    assert len(entry_points) == 6
    assert all(f"```python\n{path.read_text()}```\n" in page for path in modules)
    assert all(path.read_text() in page for path in entry_points)
    groups = [line.strip("[]\n") for path in entry_points for line in path.open() if line.startswith("[")]
    assert all(f"`{group}` |" in page for group in ("safelight.families", *groups))


def test_the_picture_of_a_preprocessor_reaches_the_controlnet(
    install: Install, engine: safelight.Engine, ask: Ask, tmp_path: Path
) -> None:
    install("preprocessor")
    picture, net = controls.picture(tmp_path / "in.png"), str(controls.write(tmp_path / "net.safetensors"))
    reached = next(engine.generate(ask(controls=[Control(net, str(picture), preprocessor="posterize", low=64)])))
    assert reached.metadata["request"]["controls"][0]["preprocessor"] == "posterize"
    assert reached.metadata["extensions"] == {"safelight.preprocessors: posterize": "posterize 1.0"}
    ran = CliRunner().invoke(
        app, ["preprocess", "posterize", str(picture), "--low", "64", "--out", str(tmp_path / "x.png")]
    )
    assert ran.exit_code == 0, ran.output
    assert PILImage.open(tmp_path / "x.png").getextrema() == ((0, 192), (0, 192), (0, 192))
    right = next(engine.generate(ask(controls=[Control(net, str(tmp_path / "x.png"))])))
    assert reached.pixels_sha256 == right.pixels_sha256
    plain = next(engine.generate(ask(controls=[Control(net, str(picture))])))
    assert reached.pixels_sha256 != plain.pixels_sha256


def test_a_preprocessor_that_returns_no_picture_is_named(install: Install, tmp_path: Path) -> None:
    write_package(tmp_path / "p", "half", "safelight.preprocessors", {"half": "half:half"})
    (tmp_path / "p/half.py").write_text("def half(pixels, low, high):\n    return pixels[::2] / 2\n")
    install(tmp_path / "p")
    with pytest.raises(ExtensionError, match=r"half 1\.0: failed with ValueError: returned float64") as error:
        preprocess.preprocess(PILImage.new("RGB", (8, 8)), Control("net", "in.png", preprocessor="half"))
    assert "[4, 8, 3] for uint8 [8, 8, 3]" in str(error.value)


def test_the_apis_list_a_preprocessor_and_refuse_it_when_it_is_gone(install: Install, root: Path) -> None:
    install("preprocessor")
    body = {"prompt": "x", "alwayson_scripts": {"controlnet": {"args": [{"module": "posterize", "model": "no-net"}]}}}
    with serving(root) as server, server.client() as http:
        assert "posterize" in http.get("/controlnet/module_list").json()["module_list"]
        assert "no-net" in http.post("/sdapi/v1/txt2img", json=body).json()["detail"]
    install()
    with pytest.raises(RequestError, match="must be one of none, canny"):
        Control("net", "in.png", preprocessor="posterize")


@pytest.mark.full
def test_what_a_check_finds_marks_the_image(install: Install, engine: safelight.Engine, ask: Ask) -> None:
    requests = [ask(name, seed=seed) for seed in range(2) for name in ("a.safetensors", "v2.safetensors")]
    plain = [next(engine.generate(request)) for request in requests]
    install("check")
    found = [next(engine.generate(request)) for request in requests]
    assert [image.pixels_sha256 for image in found] == [image.pixels_sha256 for image in plain]
    assert found[0].metadata["extensions"] == {"safelight.checks: colour-cast": "colour-cast 1.0"}
    marked = 0
    for image, before in zip(found, plain, strict=True):
        means = (
            PILImage.frombytes("RGB", (64, 64), image.pixels).resize((1, 1), PILImage.Resampling.BOX).getpixel((0, 0))
        )
        colour = ("red", "green", "blue")[means.index(max(means))]  # type: ignore[union-attr]
        own = image.metadata["marks"][len(before.metadata["marks"]) :]
        assert image.metadata["marks"] == [*before.metadata["marks"], *own]
        assert own in ([], [f"colour-cast: it is mostly {colour}"])
        marked += bool(own)
    assert marked


@pytest.mark.parametrize("code", ["return 'bad'", "pixels.zero_(); latents.zero_(); raise OSError('no chip')"])
def test_a_check_that_fails_is_a_mark_and_changes_no_image(
    install: Install, engine: safelight.Engine, ask: Ask, tmp_path: Path, code: str
) -> None:
    plain = next(engine.generate(ask()))
    write_package(tmp_path / "p", "bad-check", "safelight.checks", {"bad": "bad_check:check"})
    (tmp_path / "p/bad_check.py").write_text(f"def check(latents, pixels):\n    {code}\n")
    install(tmp_path / "p")
    image = next(engine.generate(ask()))
    assert image.pixels_sha256 == plain.pixels_sha256
    assert image.metadata["marks"][-1].startswith(
        "not checked: 'bad' (group safelight.checks) of the package bad-check"
    )


def test_an_api_answers_and_one_that_fails_does_not_stop_the_server(
    install: Install, root: Path, tmp_path: Path
) -> None:
    entries = {"broken": "bad_apis:nothing", "raises": "bad_apis:raises", "taken": "bad_apis:taken"}
    write_package(tmp_path / "p", "bad-apis", "safelight.apis", entries)
    code = "from fastapi import APIRouter\ndef raises(services):\n    return services.nothing\n"
    (tmp_path / "p/bad_apis.py").write_text(f"{code}def taken(services):\n    return APIRouter(prefix='/v1/more')\n")
    install("api", tmp_path / "p")
    with serving(root, key="very-secret", says=tmp_path / "log") as server, server.client() as http:
        answer = http.get("/curl/draw", params={"prompt": "apple", "steps": 2, "seed": 3})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        (tmp_path / "apple.png").write_bytes(answer.content)
        [job] = http.get("/api/v1/jobs").json()
        assert (job["client"], job["state"]) == ("curl", "done")
        assert http.get("/curl/draw", params={"prompt": "x", "steps": 9999}).json()["field"] == "steps"
        assert http.get("/curl/nothing").json()["error"] == "not_found"
        assert "/curl/draw" in http.get("/api/v1/openapi.json").json()["paths"]
        assert httpx.get(f"{server.url}/curl/draw", params={"prompt": "x"}).status_code == 401
    assert chunks.read(tmp_path / "apple.png")[0]["request"]["prompt"] == "apple"
    log = (tmp_path / "log").read_text()
    for name, says in (("broken", "AttributeError"), ("raises", "AttributeError"), ("taken", "needs a prefix")):
        assert f"'{name}' (group safelight.apis) of the package bad-apis 1.0: failed with" in log
        assert says in log


@pytest.fixture
def ia3(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A file of the example's kind for a tiny checkpoint, and the checkpoint that it makes at strength 0.5."""
    whole, factors = load_file(tiny / "a.safetensors"), {}
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in whole if name.endswith((".attn2.to_q.weight", ".in_layers.2.weight"))]:
        weight, factor = whole[name], 1 + torch.randn(whole[name].shape[0], generator=generator)
        factors[name.removeprefix("model.").removesuffix(".weight") + ".ia3_scale"] = factor
        whole[name] = weight + 0.5 * (weight * factor.reshape(-1, *(1 for _ in weight.shape[1:])) - weight)
    save_file(factors, tmp_path / "ia3.safetensors")
    save_file(whole, tmp_path / "fused.safetensors")
    return tmp_path / "ia3.safetensors", tmp_path / "fused.safetensors"


def test_an_adapter_of_a_packages_kind_changes_weights_by_its_formula(
    install: Install, engine: LocalEngine, ask: Ask, ia3: tuple[Path, Path]
) -> None:
    install("adapter")
    added = engine.catalog.adapters.add(ia3[0], "factors")
    assert (added.kind, added.rule) == ("ia3", "ia3: the names of ia3-adapter 1.0")
    plain = next(engine.generate(ask()))
    image = next(engine.generate(ask(loras=[Lora("factors", 0.5)])))
    assert image.pixels_sha256 == next(engine.generate(ask(str(ia3[1])))).pixels_sha256
    assert image.metadata["extensions"] == {"safelight.adapters: ia3": "ia3-adapter 1.0"}
    assert image.pixels_sha256 != plain.pixels_sha256
    assert next(engine.generate(ask())).pixels_sha256 == plain.pixels_sha256
    install()
    with pytest.raises(RequestError, match="is a ia3: no installed package has this kind"):
        next(engine.generate(ask(loras=[Lora("factors", 0.5)])))
    with pytest.raises(UnsupportedModelError, match="unknown kind of model"):
        engine.catalog.adapters.add(ia3[0], "again")


WRONG = {
    "fits": ("fits = lambda shapes, weight: False", RequestError, "does not fit"),
    "raises": ("def fits(shapes, weight):\n    raise OSError", ExtensionError, "failed with OSError"),
    "shape": (
        "fits = lambda s, w: True\ndifference = lambda tensors, weight: weight[:1]",
        ExtensionError,
        "for a weight",
    ),
    "broken": ("import nothing_of_that_name", ExtensionError, "failed with ModuleNotFoundError"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_kind_that_fails_is_named(
    install: Install, engine: LocalEngine, ask: Ask, ia3: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    code, error, says = WRONG[case]
    install("adapter")
    engine.catalog.adapters.add(ia3[0], "factors")
    write_package(tmp_path / "p", "bad-kind", "safelight.adapters", {"ia3": f"bad_{case}:IA3"})
    head = f"from safelight.weights.adapter_kinds import AdapterKind\n{code}\n"
    kind = f"IA3 = AdapterKind({{'.ia3_scale': 'scale'}}, fits, 'bad_{case}:difference')\n"
    (tmp_path / f"p/bad_{case}.py").write_text(head + kind)
    install(tmp_path / "p")
    with pytest.raises(error, match=says):
        next(engine.generate(ask(loras=[Lora("factors", 0.5)])))
    assert next(engine.generate(ask())).width == 64


@pytest.mark.full
def test_a_device_of_a_package_computes_and_is_refused_when_it_is_gone(
    install: Install, root: Path, ask: Ask, engine: LocalEngine
) -> None:
    install("device")
    opened = safelight.open_engine(root, device="remote", precision="fp32")
    image = next(opened.generate(ask()))
    opened.close()
    assert image.metadata["run"]["device"] == "remote"
    assert image.metadata["extensions"] == {"safelight.devices: remote": "remote-device 1.0"}
    assert image.pixels_sha256 == next(engine.generate(ask())).pixels_sha256
    install()
    with pytest.raises(SettingError, match="device='remote'"):
        safelight.open_engine(root, device="remote")


def test_a_device_with_another_name_is_refused(install: Install, root: Path, tmp_path: Path) -> None:
    write_package(tmp_path / "p", "bad-device", "safelight.devices", {"odd": "bad_device:CPU"})
    (tmp_path / "p/bad_device.py").write_text("from safelight.devices.cpu import CPU\n")
    install(tmp_path / "p")
    with pytest.raises(
        ExtensionError,
        match=r"bad-device 1\.0: failed with ValueError: made a device named 'cpu'; its name must be 'odd'",
    ):
        safelight.open_engine(root, device="odd")
