"""Settings: each is declared once, in :class:`Settings`.

The sources and checks of values, ``safelight config`` and docs/settings.md follow from the declarations.
pydantic-settings merges the sources: command line, ``SAFELIGHT_*`` variables, a file, defaults, in this order.
:mod:`safelight.settings_sources` reads the sources, and writes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from safelight.file_patterns import DEFAULT, check_pattern
from safelight.origins import check_origins
from safelight.request.run_settings import AttentionType, Precision, SliceSize
from safelight.setting_details import SettingDetails, declare
from safelight.setting_types import (
    DEVICES,
    AnyDevice,
    AttentionTypes,
    Folders,
    Words,
    check_root_path,
    default_root,
    make_absolute,
    number_to_text,
)

PREFIX = "SAFELIGHT_"
"""The environment variable of a setting is this prefix with the setting's name in capitals."""

GB = "GB of 2^30 bytes"


_MACHINE = "depends on the machine"


class Settings(BaseSettings):
    """All settings. ``Settings(threads=2)`` has the given values and the defaults; it reads no other source.

    :func:`safelight.settings_sources.load_settings` reads all sources. For this it gives one more argument:
    ``below``: the sources that come after the given values and the environment variables.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=PREFIX,
        env_ignore_empty=True,
        # Variables have YAML, as the file has, or a list with separators: never JSON.
        enable_decoding=False,
        # An error of pydantic with a secret in it would reach logs.
        hide_input_in_errors=True,
    )

    root: Annotated[Path, AfterValidator(make_absolute)] = declare(
        "Safelight stores models, images and all other data in this folder.",
        SettingDetails(group="Folders", default_text="the user's data folder"),
        default_factory=default_root,
    )
    model_folders: Folders = declare(
        "Clients may add checkpoints from these folders over HTTP.",
        SettingDetails(group="Folders", default_text="none"),
        default=(),
    )
    watched_folders: Folders = declare(
        "The server follows these folders, of other programs or plain ones: it imports what appears, and forgets what "
        "goes. Nothing is read but headers.",
        SettingDetails(group="Folders", default_text="none"),
        default=(),
    )
    download_folder: Path | None = declare(
        "Downloaded models are stored in this folder.",
        SettingDetails(group="Folders", default_text="downloads in the root"),
        default=None,
    )
    allow_downloads: bool | None = declare(
        "Clients may let the server download models over HTTP.",
        SettingDetails(group="Folders", default_text="only if no other machine can reach the server"),
        default=None,
    )
    download_hosts: Words = declare(
        "Downloads may come from these hosts (HOST or HOST:PORT) without TLS and from private addresses.",
        SettingDetails(group="Folders", default_text="none"),
        default=(),
    )
    trash_days: float = declare(
        "Removed images and unused input images stay in the trash for this time before Safelight deletes them.",
        SettingDetails(group="Folders", unit="days"),
        default=30.0,
        ge=0,
    )
    device: AnyDevice = declare(
        "Safelight computes on this device. `auto` selects a GPU if there is one.",
        SettingDetails(
            group="Computing",
            allowed=f"one of {', '.join(DEVICES)}, or the device of an installed package",
            in_invokeai=True,
            invokeai_values={"cuda:0": "cuda"},
        ),
        default="auto",
    )
    devices: Words = declare(
        "A server has a slot, a device with a worker of its own, for each of these. `auto` is every GPU, or what "
        "`device` says; `cuda:1` is the second GPU, `cpu:2` are two workers on the CPU.",
        SettingDetails(group="Computing", allowed="a list of devices, separated by commas", default_text="auto"),
        default=("auto",),
    )
    precision: Precision = declare(
        "Models compute in this dtype. `auto` is fp32 on a CPU. On another device, it is a dtype in which that device "
        "computes correctly.",
        SettingDetails(
            group="Computing",
            in_invokeai=True,
            invokeai_values={"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "autocast": "auto"},
        ),
        default="auto",
    )
    attention_type: AttentionType = declare(
        "Safelight computes attention with this kernel. `auto` is `torch-sdp`, or another kernel if that one "
        "computes wrongly on this machine.",
        SettingDetails(group="Computing", in_invokeai=True),
        default="auto",
    )
    attention_types: AttentionTypes = declare(
        "Sets another attention_type for some models or bases.",
        SettingDetails(
            group="Computing",
            allowed="a mapping of names of models or bases to attention types, such as {sdxl: sliced}; "
            f"attention types are {', '.join(get_args(AttentionType))}",
            default_text="none",
        ),
        default={},
    )
    attention_slice_size: Annotated[SliceSize, BeforeValidator(number_to_text)] = declare(
        "The kernel `sliced` computes this number of heads at once. `balanced` and `auto` are half of the heads. "
        "`max` slices most: one head at once.",
        SettingDetails(group="Computing", unit="heads", in_invokeai=True),
        default="auto",
    )
    threads: int | None = declare(
        "Safelight computes with this number of threads. By default, it uses all cores. Another number can change the "
        "last bits of an image.",
        SettingDetails(group="Computing", unit="threads", default_text=_MACHINE),
        default=None,
        ge=1,
        le=1024,
    )
    max_cache_ram_gb: float | None = declare(
        "The weights of models use at most this much host memory. By default, the memory of the machine, containers "
        "and ulimit set the limit.",
        SettingDetails(
            group="Memory",
            unit=GB,
            default_text=_MACHINE,
            in_invokeai=True,
            obsolete_names=("ram", "ram_cache_size", "max_cache_size"),
        ),
        default=None,
        gt=0,
    )
    max_cache_vram_gb: float | None = declare(
        "The weights of models use at most this much device memory. By default, they use all memory that computing "
        "does not need.",
        SettingDetails(
            group="Memory",
            unit=GB,
            default_text=_MACHINE,
            in_invokeai=True,
            obsolete_names=("vram", "vram_cache_size", "max_vram_cache_size"),
        ),
        default=None,
        gt=0,
    )
    device_working_mem_gb: float | None = declare(
        "Safelight reserves this much device memory for computing. By default, it measures each model and image size.",
        SettingDetails(group="Memory", unit=GB, default_text=_MACHINE, in_invokeai=True),
        default=None,
        gt=0,
    )
    enable_partial_loading: bool = declare(
        "If a model does not fit in memory, Safelight keeps some of its parts there and streams the others.",
        SettingDetails(group="Memory", in_invokeai=True),
        default=True,
    )
    keep_ram_copy_of_weights: bool = declare(
        "Safelight keeps a copy in host memory of weights on the device, so that it loads them faster again. Not where "
        "device and host share one memory, as on a Mac.",
        SettingDetails(group="Memory", in_invokeai=True),
        default=True,
    )
    log_memory_usage: bool = declare(
        "Safelight logs every step of every memory plan, with its reason.",
        SettingDetails(group="Memory", in_invokeai=True),
        default=False,
    )
    verify_transfers: Literal["auto", "always", "first", "sample", "off"] = declare(
        "How often Safelight verifies weights in memory. `always`: after each use; `first`: after the first use; "
        "`sample`: one use in 16; `off`: never; `auto`: the first use, then as often as possible within 2 % of the "
        "computing time.",
        SettingDetails(group="Checks"),
        default="auto",
    )
    canary: Literal["switch", "off"] = declare(
        "After each switch of models, `switch` compares a tiny image with the image of a fresh process.",
        SettingDetails(group="Checks"),
        default="off",
    )
    isolate: bool = declare(
        "Safelight makes every image in a process that never held another model.",
        SettingDetails(group="Checks"),
        default=False,
    )
    default_model: str | None = declare(
        "Requests without a model use this model. By default, they use the first model in alphabetical order.",
        SettingDetails(group="Requests", default_text="none"),
        default=None,
    )
    default_seed: int | None = declare(
        "Commands without a seed use this seed, so that scripts can compare images. By default, the seed is random.",
        SettingDetails(group="Requests", default_text="none"),
        default=None,
        ge=0,
        le=2**32 - 1,
    )
    image_format: Literal["png", "jpeg", "webp"] = declare(
        "The commands save images in this format. JPEG, and WebP with a quality below 100, lack the exact pixels.",
        SettingDetails(group="Output"),
        default="png",
    )
    image_quality: int = declare(
        "The quality of JPEG and WebP files. A WebP file of quality 100 is lossless.",
        SettingDetails(group="Output"),
        default=95,
        ge=1,
        le=100,
    )
    image_names: Annotated[str, AfterValidator(check_pattern)] = declare(
        "The names of saved images. Fields: {date}, {time}, {model}, {seed}, {prompt}, {width}, {height}, {steps}, "
        "{sampler}; `/` makes folders: {date}/{model}-{seed}-{prompt}.",
        SettingDetails(group="Output"),
        default=DEFAULT,
    )
    host: str = declare(
        "The server listens on this address. Any address that other machines can reach needs an api_key, or people.",
        SettingDetails(group="Server", in_invokeai=True),
        default="127.0.0.1",
    )
    port: int = declare(
        "The server listens on this port. 0 selects a free port.",
        SettingDetails(group="Server", in_invokeai=True),
        default=9090,
        ge=0,
        le=65535,
    )
    api_key: SecretStr | None = declare(
        "Clients must send this key, as a bearer token or as the password of basic authentication.",
        SettingDetails(group="Server", default_text="none", secret=True),
        default=None,
        min_length=8,
    )
    api_key_file: Path | None = declare(
        "The first line of this file is the api_key. A value of api_key itself overrides it.",
        SettingDetails(group="Server", default_text="none"),
        default=None,
    )
    forwarded_allow_ips: Words = declare(
        "Addresses of proxies in front of the server. Safelight believes what they say of their clients' addresses "
        "and of TLS (`X-Forwarded-For`, `X-Forwarded-Proto`). `*` means every address.",
        SettingDetails(group="Server", default_text="none"),
        default=(),
    )
    root_path: Annotated[str, AfterValidator(check_root_path)] = declare(
        "The path at which a proxy shows the server, such as `/safelight`; the proxy may remove it or not.",
        SettingDetails(group="Server", default_text="none"),
        default="",
    )
    allow_origins: Annotated[Words, AfterValidator(check_origins)] = declare(
        "Pages of these sites may use the server from a browser, such as `https://example.org`.",
        SettingDetails(group="Server", default_text="none", in_invokeai=True),
        default=(),
    )
    log_format: Literal["plain", "json"] = declare(
        "The server and its worker write messages as plain text, or as one JSON object per line.",
        SettingDetails(
            group="Server",
            in_invokeai=True,
            invokeai_values={"color": "plain", "syslog": "plain", "legacy": "plain"},
        ),
        default="plain",
    )
    shutdown_seconds: float = declare(
        "When the server stops, a job has this time to finish before it returns to the queue.",
        SettingDetails(group="Server", unit="seconds"),
        default=10.0,
        ge=0,
    )
    database_url: SecretStr | None = declare(
        "The server stores jobs and images in this database of PostgreSQL (`postgresql://user:password@host/name`), in "
        "place of SQLite's file in the root.",
        SettingDetails(group="Server", default_text="none", secret=True),
        default=None,
    )
    cluster_lease_seconds: float = declare(
        "A slot of the cluster that is silent for this time has lost its job, which is tried once more elsewhere.",
        SettingDetails(group="Cluster", unit="seconds"),
        default=30.0,
        ge=3,
    )
    cluster_cache_gb: float = declare(
        "Each machine of the cluster keeps copies of models of at most this size. The least recently used copies are "
        "removed first.",
        SettingDetails(group="Cluster", unit=GB),
        default=200.0,
        gt=0,
    )
    cluster_shared_files: bool = declare(
        "A machine of the cluster uses a file that it sees at the server's path, for example in a shared folder. "
        "Without this, it gets copies of its own.",
        SettingDetails(group="Cluster"),
        default=True,
    )
    cluster_other_versions: bool = declare(
        "Machines of the cluster with other versions of Safelight, torch or diffusers may compute, too. Their images "
        "may differ, and say where they were made.",
        SettingDetails(group="Cluster"),
        default=False,
    )
    spare_worker: bool = declare(
        "The server keeps a second process with all imports ready, in case the worker dies.",
        SettingDetails(group="Server"),
        default=True,
    )
    max_queue_size: int = declare(
        "At most this number of jobs may wait.",
        SettingDetails(group="Queue", unit="jobs", in_invokeai=True),
        default=10_000,
        ge=1,
    )
    queue_overtakes: int = declare(
        "At most this number of later jobs may overtake a waiting job to save switches of models. 0 means first come, "
        "first served.",
        SettingDetails(group="Queue", unit="jobs"),
        default=64,
        ge=0,
    )
    queue_delay_seconds: float = declare(
        "Later jobs may delay a waiting job for at most this time.",
        SettingDetails(group="Queue", unit="seconds"),
        default=600.0,
        ge=0,
    )
    queue_lead_seconds: float = declare(
        "The jobs of one person may compute for at most this much longer than those of another person who waits.",
        SettingDetails(group="Queue", unit="seconds"),
        default=60.0,
        ge=0,
    )
    stall_seconds: float = declare(
        "When a job makes no progress for this time, Safelight replaces its worker and tries the job once more. 0 "
        "waits for ever.",
        SettingDetails(group="Queue", unit="seconds"),
        default=0.0,
        ge=0,
    )
    idle_unload_seconds: float = declare(
        "When no job has run for this time, the server's worker frees the memory of all models that are not pinned. 0 "
        "keeps them.",
        SettingDetails(group="Memory", unit="seconds"),
        default=0.0,
        ge=0,
    )
    max_pixels: int = declare(
        "The server rejects images with more pixels (width times height).",
        SettingDetails(group="Limits of the server", unit="pixels"),
        default=4096 * 4096,
        ge=64,
    )
    max_steps: int = declare(
        "The server rejects requests with more steps.",
        SettingDetails(group="Limits of the server", unit="steps"),
        default=150,
        ge=1,
    )
    max_images: int = declare(
        "The server rejects requests with more images.",
        SettingDetails(group="Limits of the server", unit="images"),
        default=16,
        ge=1,
    )
    max_prompt_chars: int = declare(
        "The server rejects prompts with more characters.",
        SettingDetails(group="Limits of the server", unit="characters"),
        default=20_000,
        ge=1,
    )
    max_body_bytes: int = declare(
        "The server rejects requests with a larger body.",
        SettingDetails(group="Limits of the server", unit="bytes"),
        default=32 << 20,
        ge=1024,
    )
    guest_max_pixels: int = declare(
        "The server rejects a guest's images with more pixels (width times height).",
        SettingDetails(group="People", unit="pixels"),
        default=1536 * 1536,
        ge=64,
    )
    guest_max_steps: int = declare(
        "The server rejects a guest's requests with more steps.",
        SettingDetails(group="People", unit="steps"),
        default=50,
        ge=1,
    )
    guest_max_waiting: int = declare(
        "At most this number of a guest's jobs may wait.",
        SettingDetails(group="People", unit="jobs"),
        default=10,
        ge=1,
    )
    guest_max_disk: float = declare(
        "A guest whose images and input images take more than this makes no more.",
        SettingDetails(group="People", unit=GB),
        default=1.0,
        gt=0,
    )
    member_max_waiting: int | None = declare(
        "At most this number of a member's jobs may wait.",
        SettingDetails(group="People", unit="jobs", default_text="no limit"),
        default=None,
        ge=1,
    )
    member_max_disk: float | None = declare(
        "A member whose images and input images take more than this makes no more.",
        SettingDetails(group="People", unit=GB, default_text="no limit"),
        default=None,
        gt=0,
    )

    @property
    def plain_database_url(self) -> str | None:
        """The address of the database with its password; None for SQLite."""
        return None if self.database_url is None else self.database_url.get_secret_value()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, the strongest first. pydantic-settings calls this."""
        del settings_cls, dotenv_settings, file_secret_settings
        below = cast("InitSettingsSource", init_settings).init_kwargs.pop("below", None)
        return (init_settings,) if below is None else (init_settings, env_settings, *below)


def details_of(name: str) -> SettingDetails:
    """Return the details of a setting."""
    return SettingDetails(**cast("dict[str, Any]", Settings.model_fields[name].json_schema_extra))


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


SECRETS = tuple(name for name in Settings.model_fields if details_of(name).secret)
"""Settings whose values Safelight never shows."""

OBSOLETE: Mapping[str, str] = {
    old: f"InvokeAI itself ignores it since version 5.6; use {name} instead"
    for name in Settings.model_fields
    for old in details_of(name).obsolete_names
}
"""Settings of older InvokeAI files, and why Safelight ignores them."""
