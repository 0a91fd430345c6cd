"""Settings: where they come from, and what a wrong one says."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from pydantic import SecretStr
from typer.testing import CliRunner

from safelight.cli.main import app
from safelight.devices import choice
from safelight.errors import InputError, SettingError
from safelight.settings import Settings
from safelight.settings_sources import FILE, explain_settings, load_settings, write_setting


def test_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().root == root
    assert load_settings(tmp_path).root == tmp_path
    monkeypatch.delenv("SAFELIGHT_ROOT")
    assert load_settings().root.name == "safelight"


@pytest.mark.parametrize(
    ("name", "value"),
    [("THREADS", "0"), ("MAX_CACHE_RAM_GB", "-1"), ("PRECISION", "fp8"), ("DEVICE", "tpu"), ("ATTENTION_TYPE", "x")],
)
def test_wrong_values_name_their_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SAFELIGHT_{name}", value)
    with pytest.raises(SettingError, match=f"SAFELIGHT_{name}"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threads", "0", "threads='0' (from SAFELIGHT_THREADS): must be a whole number from 1 to 1024 (threads)"),
        (
            "max_cache_ram_gb",
            "-1",
            "MAX_CACHE_RAM_GB): must be a number above 0 (GB of 2^30 bytes)",
        ),
        ("canary", "on", "canary='on' (from SAFELIGHT_CANARY): must be one of switch, off"),
        ("isolate", "maybe", "isolate='maybe' (from SAFELIGHT_ISOLATE): must be true or false"),
        ("attention_types", "{a: [", "must be a mapping of names of models or bases to attention types"),
        ("attention_types", "{a: fast}", "attention_types='fast' (from SAFELIGHT_ATTENTION_TYPES): must be a mapping"),
        ("model_folders", "[/a", "model_folders='[/a' (from SAFELIGHT_MODEL_FOLDERS): must be a list of paths"),
        ("api_key", "tiny", "api_key='…' (from SAFELIGHT_API_KEY): must be text of at least 8 characters"),
    ],
)
def test_messages_say_the_allowed_values(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SAFELIGHT_{name.upper()}", value)
    with pytest.raises(SettingError) as refused:
        load_settings()
    assert message in str(refused.value)
    assert refused.value.__cause__ is not None
    assert name != "api_key" or value not in str(refused.value.__cause__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SettingError, match="unknown setting; did you mean attention_type"):
        load_settings(atention_type="normal")


def test_settings_in_code_read_no_other_source(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / FILE).write_text("max_steps: 3\n")
    monkeypatch.setenv("SAFELIGHT_MAX_IMAGES", "3")
    settings = Settings(root=root)
    assert (settings.max_steps, settings.max_images) == (150, 16)
    assert pickle.loads(pickle.dumps(load_settings())) == load_settings()


def test_a_value_given_in_code_replaces_the_mapping_of_the_file(root: Path) -> None:
    (root / FILE).write_text("attention_types: {sdxl: sliced}\n")
    found = explain_settings(attention_types={"mine": "normal"})
    assert found.settings.attention_types == {"mine": "normal"}
    assert found.origins["attention_types"] == "--attention-types"


def test_a_relative_root_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / FILE).write_text("max_steps: 3\n")
    settings = load_settings(Path("here"))
    assert (settings.root, settings.max_steps) == (tmp_path / "here", 3)


def test_devices() -> None:
    assert choice.device("cpu").torch == torch.device("cpu")
    assert choice.device("simulated").has_own_memory
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(SettingError, match="no such device"):
        choice.device(absent)


def test_precision_is_tried_before_it_is_chosen() -> None:
    cpu = choice.device("cpu")
    assert choice.precision("auto", cpu) == "fp32"
    assert choice.precision("bf16", cpu) == "bf16"
    assert choice.computes_correctly("bf16", cpu.torch)
    assert choice.computes_correctly("fp16", cpu.torch)


def test_without_free_memory_nothing_is_said_of_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(torch.Tensor, "cpu", full)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        choice.computes_correctly("bf16", torch.device("cpu"))


def test_flags_go_above_variables_above_the_file(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "safelight.yaml").write_text("max_cache_ram_gb: 4\nthreads: 3\nattention_type: normal\n")
    monkeypatch.setenv("SAFELIGHT_THREADS", "2")
    found = explain_settings(attention_type="sliced")
    assert (found.settings.max_cache_ram_gb, found.settings.threads, found.settings.attention_type) == (4, 2, "sliced")
    assert found.origins["max_cache_ram_gb"] == str(root / "safelight.yaml")
    assert found.origins["threads"] == "SAFELIGHT_THREADS"
    assert found.origins["attention_type"] == "--attention-type"
    assert found.origins["device"] == "default"


INVOKEAI = """
schema_version: 4.0.2
max_cache_ram_gb: 6
max_cache_vram_gb: 3.5
device_working_mem_gb: 2
enable_partial_loading: true
keep_ram_copy_of_weights: false
log_memory_usage: true
precision: float16
device: cpu
attention_type: xformers
legacy_models_yaml_path: models.yaml
allow_nodes: []
"""


def test_an_invokeai_file_is_read_and_the_rest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELIGHT_ATTENTION_TYPE")
    path = tmp_path / "invokeai.yaml"
    path.write_text(INVOKEAI)
    found = explain_settings(file=path)
    s = found.settings
    assert (s.max_cache_ram_gb, s.max_cache_vram_gb, s.device_working_mem_gb) == (6, 3.5, 2)
    assert (s.enable_partial_loading, s.keep_ram_copy_of_weights, s.log_memory_usage) == (True, False, True)
    assert (s.precision, s.device, s.attention_type) == ("fp16", "cpu", "xformers")
    assert set(found.ignored) == {"schema_version", "legacy_models_yaml_path", "allow_nodes"}


def test_what_invokeai_itself_ignores_is_not_taken_and_is_named(tmp_path: Path) -> None:
    """``vram: 0.25`` of an old file was no limit of what a device may hold."""
    path = tmp_path / "invoke.yaml"
    path.write_text("InvokeAI:\n  Model Cache:\n    ram: 7.5\n    vram: 0.25\n  Web Server:\n    log_level: info\n")
    found = explain_settings(file=path)
    assert (found.settings.max_cache_ram_gb, found.settings.max_cache_vram_gb) == (None, None)
    assert set(found.ignored) == {"ram", "vram", "log_level"}
    assert "max_cache_vram_gb instead" in found.ignored["vram"]
    path.write_text("ram_cache_size: 8\nmax_cache_size: 6\nmax_vram_cache_size: 1\nvram_cache_size: 1\n")
    assert explain_settings(file=path).settings == load_settings()


VARIABLES: dict[str, tuple[str, object]] = {
    "device": ("cpu", "cpu"),
    "precision": ("bf16", "bf16"),
    "attention_type": ("normal", "normal"),
    "attention_types": ("{sdxl: sliced}", {"sdxl": "sliced"}),
    "attention_slice_size": ("4", "4"),
    "threads": ("2", 2),
    "max_cache_ram_gb": ("3.5", 3.5),
    "max_cache_vram_gb": ("2", 2.0),
    "device_working_mem_gb": ("1", 1.0),
    "enable_partial_loading": ("false", False),
    "keep_ram_copy_of_weights": ("0", False),
    "log_memory_usage": ("true", True),
    "verify_transfers": ("always", "always"),
    "canary": ("switch", "switch"),
    "isolate": ("1", True),
    "log_format": ("json", "json"),
    "host": ("::1", "::1"),
    "port": ("0", 0),
    "api_key": ("long-enough", SecretStr("long-enough")),
    "default_model": ("dream", "dream"),
    "default_seed": ("7", 7),
    "allow_downloads": ("true", True),
    "allow_origins": ("https://a.org,https://b.org", ("https://a.org", "https://b.org")),
    "image_format": ("webp", "webp"),
    "image_names": ("{date}/{seed}", "{date}/{seed}"),
    "image_quality": ("80", 80),
    "watched_folders": (f"/a b{os.pathsep}/c", (Path("/a b"), Path("/c"))),
    "download_folder": ("/a b", Path("/a b")),
    "download_hosts": ("localhost:8080, mirror", ("localhost:8080", "mirror")),
    "model_folders": (f"/a b{os.pathsep}/c", (Path("/a b"), Path("/c"))),
    "max_queue_size": ("5", 5),
    "queue_overtakes": ("0", 0),
    "queue_lead_seconds": ("30", 30.0),
    "stall_seconds": ("600", 600.0),
    "database_url": ("postgresql://a/b", SecretStr("postgresql://a/b")),
    "cluster_lease_seconds": ("60", 60.0),
    "cluster_cache_gb": ("10", 10.0),
    "cluster_shared_files": ("false", False),
    "cluster_other_versions": ("true", True),
    "devices": ("cuda:0, cpu", ("cuda:0", "cpu")),
    "queue_delay_seconds": ("1.5", 1.5),
    "idle_unload_seconds": ("90", 90.0),
    "forwarded_allow_ips": ("127.0.0.1,10.0.0.1", ("127.0.0.1", "10.0.0.1")),
    "root_path": ("/safelight", "/safelight"),
    "guest_max_pixels": ("4096", 4096),
    "guest_max_steps": ("9", 9),
    "guest_max_waiting": ("3", 3),
    "guest_max_disk": ("0.5", 0.5),
    "member_max_waiting": ("30", 30),
    "member_max_disk": ("50", 50.0),
    "max_pixels": ("4096", 4096),
    "max_steps": ("10", 10),
    "max_images": ("2", 2),
    "max_prompt_chars": ("100", 100),
    "max_body_bytes": ("2048", 2048),
    "shutdown_seconds": ("0", 0.0),
    "trash_days": ("7", 7.0),
    "spare_worker": ("false", False),
}


@pytest.mark.parametrize("name", sorted(set(Settings.model_fields) - {"root", "api_key_file"}))
def test_each_setting_has_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VARIABLES[name]
    monkeypatch.setenv(f"SAFELIGHT_{name.upper()}", text)
    found = explain_settings()
    assert getattr(found.settings, name) == value
    assert found.origins[name] == f"SAFELIGHT_{name.upper()}"


def test_folders_as_a_yaml_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_MODEL_FOLDERS", "[/a, /b]")
    assert load_settings().model_folders == (Path("/a"), Path("/b"))


def test_secrets_are_masked_and_their_files_are_the_owners(root: Path, tmp_path: Path, capfd) -> None:
    runner = CliRunner()
    write_setting(root, "threads", "2")
    assert (root / FILE).stat().st_mode & 0o777 == 0o644
    done = runner.invoke(app, ["config", "set", "api_key", "very-secret-key"])
    assert done.exit_code == 0
    assert (root / FILE).stat().st_mode & 0o777 == 0o600
    write_setting(root, "threads", "3")
    assert (root / FILE).stat().st_mode & 0o777 == 0o600
    shown = [runner.invoke(app, ["config", "show", *more]).output for more in ([], ["--json"])]
    for text in (done.output, *shown, repr(explain_settings()), repr(load_settings())):
        assert "very-secret-key" not in text
    assert load_settings().api_key == SecretStr("very-secret-key")
    assert explain_settings().exposed is None
    (root / FILE).chmod(0o644)
    assert explain_settings().exposed == root / FILE
    refused = runner.invoke(app, ["config", "set", "api_key", "short"])
    assert isinstance(refused.exception, SettingError)
    assert "short" not in str(refused.exception).replace("shorter", "")


def test_the_key_may_come_from_a_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("SAFELIGHT_API_KEY_FILE", str(tmp_path / "key"))
    found = explain_settings()
    assert found.settings.api_key == SecretStr("from-a-file")
    assert found.origins["api_key"] == str(tmp_path / "key")
    monkeypatch.setenv("SAFELIGHT_API_KEY", "goes-above")
    assert load_settings().api_key == SecretStr("goes-above")
    monkeypatch.delenv("SAFELIGHT_API_KEY")
    monkeypatch.setenv("SAFELIGHT_API_KEY_FILE", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="gone"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max_cache_ram_gb: many", "max_cache_ram_gb"),
        ("precision: int8", "precision"),
        ("- a\n- b", "not a mapping of names to values"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_file_says_what_and_where(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=problem) as refused:
        load_settings(file=path)
    assert "wrong.yaml" in str(refused.value)


def test_unknown_variables_are_named_and_a_file_is_no_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_MAX_RAM", "3")
    assert explain_settings().ignored == {"SAFELIGHT_MAX_RAM": "unknown variable"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingError, match="not a folder"):
        load_settings(tmp_path / "file")


def test_a_value_is_set_in_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELIGHT_ATTENTION_TYPE")
    monkeypatch.delenv("SAFELIGHT_THREADS")
    (root / FILE).write_text("threads: 3\n")
    assert write_setting(root, "attention_type", "normal") == "normal"
    assert write_setting(root, "attention_types", "{sdxl: sliced}") == {"sdxl": "sliced"}
    settings = load_settings()
    assert (settings.threads, settings.attention_type, settings.attention_types) == (3, "normal", {"sdxl": "sliced"})
    before = (root / FILE).read_bytes()
    for name, value, says in (
        ("attention_type", "fast", "attention_type"),
        ("atention_type", "normal", "did you mean attention_type"),
        ("threads", "[", "is not YAML"),
        ("prot", "1", "did you mean port"),
        ("root", "/a", "unknown setting"),
        ("api_key", "123456789", "write it in quotes"),
    ):
        with pytest.raises(SettingError, match=says):
            write_setting(root, name, value)
    assert (root / FILE).read_bytes() == before


def test_a_file_of_a_newer_version_is_refused(root: Path) -> None:
    (root / FILE).write_text("threads: 3\nsafelight_settings_version: 2\n")
    with pytest.raises(SettingError, match="a newer Safelight wrote the file"):
        load_settings()
    with pytest.raises(SettingError, match="a newer Safelight wrote the file"):
        write_setting(root, "threads", "2")


@pytest.mark.parametrize("origin", ["*", "null", "example.org", "https://example.org/path", "ftp://example.org"])
def test_origins_that_are_none_are_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="an origin is such as"):
        Settings(allow_origins=(origin,))


def test_origins_are_as_browsers_write_them() -> None:
    assert Settings(allow_origins=("https://Example.ORG/",)).allow_origins == ("https://example.org",)
