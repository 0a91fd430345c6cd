"""The neutral values of A1111's and Forge's fields: a rule for each name. A name without a rule is an error.

The names come from A1111 1.10 (``modules/api/models.py``, ``modules/processing.py``), Forge, and the extension
sd-webui-controlnet. Their pages send all of their fields, most of them with the default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from safelight.errors import RequestError

Rule = Callable[[Any], bool]
"""Return whether a value is neutral."""


def one_of(*values: object) -> Rule:
    """Return a rule that accepts None and these values; 0 does not stand for False, nor 1 for True."""
    return lambda value: (
        value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
    )


def anything(_: Any) -> bool:
    """Accept every value: the field has no effect over A1111's API, or only concerns A1111's files."""
    return True


def number(value: Any) -> bool:
    """Accept None and every number."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


OFF = one_of(False, 0)
EMPTY = one_of("", [], {})
NO_NAME = one_of("", "None", "none")

FIELDS: Mapping[str, Rule] = {
    # SillyTavern sends where it connects to, and the words of its own password.
    "auth": anything,
    "url": anything,
    "comments": anything,
    "do_not_reload_embeddings": anything,
    "do_not_save_grid": anything,
    "do_not_save_samples": anything,
    "force_task_id": anything,
    "override_settings_restore_afterwards": anything,
    "prompt_for_display": anything,
    "save_images": anything,
    "script_args": anything,  # has no effect, because script_name must be empty
    "seed_enable_extras": one_of(True, False, 1, 0),
    "ddim_discretize": one_of("uniform", ""),
    "disable_extra_networks": OFF,
    "extra_generation_params": EMPTY,
    "firstpass_image": EMPTY,
    "firstphase_height": one_of(0),
    "firstphase_width": one_of(0),
    "hr_additional_modules": one_of([], "", ["Use same choices"]),
    "hr_distilled_cfg": number,
    "image_cfg_scale": number,  # has no effect without an image
    "infotext": EMPTY,
    "initial_noise_multiplier": one_of(1),
    "latent_mask": EMPTY,
    "mask_round": one_of(True, 1),
    "outpath_grids": EMPTY,
    "outpath_samples": EMPTY,
    "overlay_images": EMPTY,
    "restore_faces": OFF,
    "s_churn": one_of(0),
    "s_min_uncond": one_of(0),
    "s_tmax": one_of(0, float("inf"), "inf", "Infinity"),
    "s_tmin": one_of(0),
    "sampler_noise_scheduler_override": one_of(),
    "script_name": NO_NAME,
    "sd_model": one_of(),
    "seed_resize_from_h": one_of(-1, 0),
    "seed_resize_from_w": one_of(-1, 0),
    "styles": one_of([], "", [""]),
    "token_merging_ratio": one_of(0),
    "token_merging_ratio_hr": one_of(0),
}
"""The fields of a request, besides those of the classes in :mod:`safelight.server.apis.a1111_fields`."""

OPTIONS: Mapping[str, Rule] = {
    "always_discard_next_to_last_sigma": OFF,
    "comma_padding_backtrack": one_of(20),
    "emphasis": one_of("Original"),
    "enable_pnginfo": one_of(True, 1),
    "eta_ancestral": one_of(1),
    "eta_ddim": one_of(0),
    "eta_noise_seed_delta": one_of(0),
    "face_restoration": OFF,
    "filter_nsfw": OFF,
    "forge_additional_modules": one_of([], ""),
    "forge_async_loading": anything,
    "forge_inference_memory": anything,
    "forge_pin_shared_memory": anything,
    "forge_preset": anything,
    "forge_unet_storage_dtype": one_of("Automatic"),
    "fp8_storage": one_of("Disable"),
    "grid_save": anything,
    "img2img_color_correction": OFF,
    "img2img_extra_noise": one_of(0),
    "img2img_fix_steps": OFF,
    "initial_noise_multiplier": one_of(1),
    "inpainting_mask_weight": one_of(1),
    "k_sched_type": one_of("Automatic"),
    "live_previews_enable": anything,
    "outdir_samples": anything,
    "outdir_txt2img_samples": anything,
    "return_grid": OFF,
    "rho": one_of(0),
    "s_churn": one_of(0),
    "s_min_uncond": one_of(0),
    "s_noise": one_of(1),
    "s_tmax": one_of(0, float("inf")),
    "s_tmin": one_of(0),
    "samples_filename_pattern": anything,
    "samples_format": one_of("png", "PNG"),
    "samples_save": anything,
    "save_images_add_number": anything,
    "sd_hypernetwork": NO_NAME,
    "sd_lora": NO_NAME,
    "sd_vae_decode_method": one_of("Full"),
    "sd_vae_encode_method": one_of("Full"),
    "show_progress_every_n_steps": anything,
    "sigma_max": one_of(0),
    "sigma_min": one_of(0),
    "tiling": OFF,
    "token_merging_ratio": one_of(0),
    "token_merging_ratio_hr": one_of(0),
    "token_merging_ratio_img2img": one_of(0),
    "upcast_attn": OFF,
    "use_old_emphasis_implementation": OFF,
    "use_old_hires_fix_width_height": OFF,
    "use_old_karras_scheduler_sigmas": OFF,
    "use_old_scheduling": OFF,
}
"""The options in ``override_settings`` and ``/options``, besides those that Safelight supports."""

UNIT: Mapping[str, Rule] = {
    "enabled": anything,
    "inpaint_crop_input_image": anything,
    "is_ui": anything,
    "low_vram": anything,
    "lowvram": anything,
    "output_dir": anything,
    "pixel_perfect": anything,
    "processor_res": number,
    "save_detected_map": anything,
    "advanced_weighting": EMPTY,
    "animatediff_batch": OFF,
    "batch_image_dir": EMPTY,
    "batch_image_files": EMPTY,
    "batch_images": EMPTY,
    "batch_input_gallery": EMPTY,
    "batch_keyframe_idx": one_of(""),
    "batch_mask_dir": EMPTY,
    "batch_mask_gallery": EMPTY,
    "batch_modifiers": EMPTY,
    "effective_region_mask": EMPTY,
    "generated_image": EMPTY,
    "guess_mode": OFF,
    "guessmode": OFF,
    "image_fg": EMPTY,
    "input_mode": one_of("simple", "InputMode.SIMPLE"),
    "ipadapter_input": EMPTY,
    "loopback": OFF,
    "mask": EMPTY,
    "mask_image": EMPTY,
    "mask_image_fg": EMPTY,
    "pulid_mode": one_of("Fidelity", ""),
    "use_preview_as_input": OFF,
}
"""The fields of a ControlNet unit, besides those that Safelight supports."""

Args = Sequence[Any]

_FALSE = (False, 0, None, "False", "")


def _off(*switches: int) -> Callable[[Args], bool]:
    """Return a rule: all these arguments are off. A1111 replaces missing ones by its page's values, which are off."""
    return lambda args: all(len(args) <= at or args[at] in _FALSE for at in switches)


def _nothing(args: Args) -> bool:
    return all(arg in _FALSE for arg in args)


def _adetailer(args: Args) -> bool:
    """``args``: (enabled, skip_img2img, {ad_model, ad_tab_enable, …}, …); with dicts alone the script is enabled."""
    if args and args[0] is False:
        return True
    tabs = [cast("Mapping[str, Any]", arg) for arg in args if isinstance(arg, Mapping)]
    return all(tab.get("ad_model") in (None, "", "None") or tab.get("ad_tab_enable") is False for tab in tabs)


SCRIPTS: Mapping[str, Callable[[Args], bool]] = {
    "api payload": anything,
    "comments": _nothing,
    "extra options": _nothing,
    "hypertile": _nothing,
    "refiner": anything,  # TextToImage.refiner reads it
    "sampler": anything,  # A1111's API reads the fields of the request instead
    "seed": anything,
    "soft inpainting": _off(0),
    "dynamicthresholding integrated": _off(0),
    "freeu integrated": _off(0),
    "hypertile integrated": _off(0),
    "kohya hrfix integrated": _off(0),
    "latentmodifier integrated": _off(0),
    "multidiffusion integrated": _off(0),
    "never oom integrated": _off(0, 1),
    "perturbedattentionguidance integrated": _off(0),
    "selfattentionguidance integrated": _off(0),
    "stylealign integrated": _off(0),
    "adetailer": _adetailer,
}
"""For each always-on script of A1111 and Forge, and for ADetailer: whether its arguments turn it off."""


def _title(name: str) -> str:
    """Remove case, brackets and versions from a script's name: ``FreeU Integrated (SD 1.x, SD 2.x, SDXL)``."""
    plain = re.sub(r"\([^)]*\)", " ", name.lower())
    return " ".join(re.sub(r"\sv?\d+(\.\d+)*\S*\s*$", " ", plain).split())


def refuse_script(name: str, what: Any) -> None:
    """Raise RequestError for an always-on script that is enabled or unknown."""
    rule = SCRIPTS.get(_title(name))
    if rule is None:
        if what in (None, {}, [], {"args": []}):
            return
        raise RequestError("alwayson_scripts", name, "Safelight has no such script")
    args = cast("Mapping[str, Any]", what).get("args", []) if isinstance(what, Mapping) else what or []
    if not isinstance(args, list | tuple):
        raise RequestError("alwayson_scripts", name, "args must be a list")
    if not rule(cast("Args", args)):
        raise RequestError("alwayson_scripts", name, "is enabled, and Safelight does not support it yet")


def refuse(rules: Mapping[str, Rule], prefix: str, name: str, value: Any) -> None:
    """Raise RequestError for a value that is not neutral, and for a name that has no rule."""
    rule = rules.get(name)
    if rule is None:
        raise RequestError(f"{prefix}{name}", value, "is unknown to Safelight")
    if not rule(value):
        raise RequestError(f"{prefix}{name}", value, "Safelight does not support this value yet")
