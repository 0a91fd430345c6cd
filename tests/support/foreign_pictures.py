"""Pictures as other programs write them, after their published formats."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image as PILImage
from PIL import PngImagePlugin

PROMPT, NEGATIVE = "a red apple, 国风 (fresh:1.2)", "blurred, text"

A1111 = (
    f"{PROMPT} <lora:style one:0.7>\nNegative prompt: {NEGATIVE}\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, "
    "Model hash: 6ce0161689, Model: dream.v8, VAE hash: c6a580b13a, VAE: vae-ft-mse.safetensors, Clip skip: 2, "
    'Denoising strength: 0.55, Hires upscale: 2, Lora hashes: "style one: 0123456789ab", Version: v1.10.1'
)

FORGE = (
    f"{PROMPT}\nSteps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 7, "
    "Size: 896x1152, Model hash: 0123456789, Model: flux1-dev, Shift: 3.1, Version: f2.0.1v1.10.1"
)


def png(**texts: str) -> bytes:
    """Return a picture with these texts; ``_`` in a name stands for a blank."""
    info = PngImagePlugin.PngInfo()
    for name, value in texts.items():
        plain = value.isascii() and name != "XML_com_adobe_xmp"
        key = {"XML_com_adobe_xmp": "XML:com.adobe.xmp", "sd_metadata": "sd-metadata"}.get(name, name)
        info.add_text(key, value) if plain else info.add_itxt(key, value)
    held = io.BytesIO()
    PILImage.new("RGB", (64, 96), "red").save(held, "PNG", pnginfo=info)
    return held.getvalue()


def with_comment(comment: str, form: str) -> bytes:
    """Return a picture whose Exif has a comment (UTF-16 with the high byte first)."""
    exif = PILImage.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + comment.encode("utf-16-be")
    held = io.BytesIO()
    PILImage.new("RGB", (64, 96), "red").save(held, form, exif=exif.tobytes())
    return held.getvalue()


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


CLASSIC_GRAPH = {
    "3": node(
        "KSampler",
        seed=42,
        steps=25,
        cfg=7.5,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=1.0,
        model=["11", 0],
        positive=["6", 0],
        negative=["7", 0],
        latent_image=["5", 0],
    ),
    "4": node("CheckpointLoaderSimple", ckpt_name="sd15/dream v8.safetensors"),
    "5": node("EmptyLatentImage", width=512, height=640, batch_size=1),
    "6": node("CLIPTextEncode", text=PROMPT, clip=["12", 0]),
    "7": node("CLIPTextEncode", text=NEGATIVE, clip=["12", 0]),
    "8": node("VAEDecode", samples=["3", 0], vae=["13", 0]),
    "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    "10": node("LoraLoader", lora_name="one.safetensors", strength_model=0.8, model=["4", 0], clip=["4", 1]),
    "11": node("LoraLoader", lora_name="two.safetensors", strength_model=-0.5, model=["10", 0], clip=["10", 1]),
    "12": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["11", 1]),
    "13": node("VAELoader", vae_name="vae-ft-mse.safetensors"),
}  # fmt: skip

FLUX_GRAPH = {
    "1": node("UnetLoaderGGUF", unet_name="flux1-dev-Q4_K_S.gguf"),
    "2": node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl.safetensors", type="flux"),
    "3": node("CLIPTextEncode", text=["14", 0], clip=["2", 0]),
    "4": node("FluxGuidance", guidance=3.5, conditioning=["3", 0]),
    "5": node("BasicGuider", model=["6", 0], conditioning=["4", 0]),
    "6": node("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=1024, height=1024, model=["7", 0]),
    "7": node("LoraLoaderModelOnly", lora_name="realism.safetensors", strength_model=0.9, model=["1", 0]),
    "8": node("RandomNoise", noise_seed=["15", 0]),
    "9": node("KSamplerSelect", sampler_name="euler"),
    "10": node("BasicScheduler", scheduler="simple", steps=20, denoise=0.7, model=["6", 0]),
    "11": node("EmptySD3LatentImage", width=1024, height=832, batch_size=1),
    "12": node(
        "SamplerCustomAdvanced",
        noise=["8", 0], guider=["5", 0], sampler=["9", 0], sigmas=["10", 0], latent_image=["11", 0],
    ),
    "13": node("VAEDecode", samples=["12", 0], vae=["16", 0]),
    "14": node("PrimitiveString", value=PROMPT),
    "15": node("PrimitiveInt", value=99),
    "16": node("VAELoader", vae_name="ae.safetensors"),
    "17": node("SaveImage", images=["13", 0]),
}  # fmt: skip

INVOKEAI = {
    "app_version": "6.14.2",
    "generation_mode": "txt2img",
    "positive_prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "width": 768,
    "height": 512,
    "seed": 5,
    "rand_device": "cpu",
    "cfg_scale": 7.0,
    "steps": 30,
    "scheduler": "dpmpp_2m_k",
    "clip_skip": 1,
    "model": {"key": "abc", "hash": "blake3:0123", "name": "Dreamshaper 8", "base": "sd-1", "type": "main"},
    "vae": {"key": "def", "hash": "blake3:4567", "name": "sd-vae-ft-mse", "base": "sd-1", "type": "vae"},
    "loras": [{"model": {"key": "g", "hash": "blake3:89ab", "name": "glow"}, "weight": 0.75}],
    "strength": 0.6,
}

INVOKEAI_2 = {
    "model": "stable diffusion",
    "model_weights": "stable-diffusion-1.5",
    "model_hash": "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
    "app_version": "2.3.5",
    "image": {
        "prompt": [{"prompt": f"a red apple [{NEGATIVE}]", "weight": 1.0}],
        "steps": 50,
        "cfg_scale": 7.5,
        "sampler": "k_lms",
        "seed": 3,
        "width": 512,
        "height": 512,
        "type": "txt2img",
    },
}

NOVELAI = {
    "prompt": PROMPT,
    "steps": 28,
    "height": 1216,
    "width": 832,
    "scale": 5.0,
    "uncond_scale": 0.0,
    "seed": 8,
    "sampler": "k_euler_ancestral",
    "noise_schedule": "karras",
    "uc": NEGATIVE,
}

FOOOCUS = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "steps": 30,
    "guidance_scale": 4.0,
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "seed": "11",
    "resolution": "(896, 1152)",
    "base_model": "juggernautXL_v8Rundiffusion",
    "base_model_hash": "aeb7e9e689",
    "loras": [["sd_xl_offset_example-lora_1.0", 0.1, "4852686128"]],
    "vae": "Default (model)",
    "clip_skip": 2,
    "version": "Fooocus v2.5.5",
    "metadata_scheme": "fooocus",
}

SWARMUI = {
    "sui_image_params": {
        "prompt": PROMPT,
        "negativeprompt": NEGATIVE,
        "model": "SDXL/dream.safetensors",
        "seed": 21,
        "steps": 20,
        "cfgscale": 7.0,
        "width": 1024,
        "height": 768,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "sigmashift": 3.0,
        "loras": ["style/one"],
        "loraweights": ["0.5"],
        "swarm_version": "0.9.6",
    }
}

DRAW_THINGS = {
    "c": PROMPT,
    "uc": NEGATIVE,
    "seed": 31,
    "steps": 8,
    "scale": 1.5,
    "sampler": "DPM++ 2M Karras",
    "size": "512x704",
    "model": "z_image_turbo_q8p.ckpt",
    "strength": 1,
    "lora": [{"model": "glow_lora_f16.ckpt", "weight": 0.6}],
    "v2": {"guidanceScale": 1.5},
}

_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description><exif:UserComment><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></exif:UserComment></rdf:Description></rdf:RDF></x:xmpmeta>'
)

PICTURES: Mapping[str, Callable[[], bytes]] = {
    "A1111, PNG": lambda: png(parameters=A1111),
    "A1111, JPEG": lambda: with_comment(A1111, "JPEG"),
    "A1111, WebP": lambda: with_comment(A1111, "WEBP"),
    "A1111, AVIF": lambda: with_comment(A1111, "AVIF"),
    "Forge": lambda: png(parameters=FORGE),
    "ComfyUI": lambda: png(prompt=json.dumps(CLASSIC_GRAPH), workflow=json.dumps({"nodes": [], "links": []})),
    "ComfyUI, FLUX": lambda: png(prompt=json.dumps(FLUX_GRAPH)),
    "InvokeAI": lambda: png(invokeai_metadata=json.dumps(INVOKEAI)),
    "InvokeAI 2": lambda: png(sd_metadata=json.dumps(INVOKEAI_2), Dream="a red apple -s 50"),
    "NovelAI": lambda: png(
        Title="AI generated image",
        Software="NovelAI",
        Source="Stable Diffusion XL C1E1DE52",
        Description=PROMPT,
        Comment=json.dumps(NOVELAI),
    ),
    "Fooocus": lambda: png(parameters=json.dumps(FOOOCUS), fooocus_scheme="fooocus"),
    "SwarmUI": lambda: png(parameters=json.dumps(SWARMUI)),
    "Draw Things": lambda: png(XML_com_adobe_xmp=_XMP.format(escape(json.dumps(DRAW_THINGS), {'"': "&quot;"}))),
}
"""A picture of each program."""
