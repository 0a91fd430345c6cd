"""Adapter tags in prompts, such as ``<lora:name:0.8>``, in AUTOMATIC1111's syntax. A tag requests the adapter and is
removed from the text.

Forms: ``<lora:NAME:STRENGTH>`` and ``<lora:NAME:TEXT_ENCODER:UNET>``. Named values: ``te=``, ``unet=`` (default: the
strength of the text encoder) and ``lbw=`` (block weights, as in sd-webui-lora-block-weight). ``<lyco:…>`` means the
same as ``<lora:…>``.
"""

from __future__ import annotations

import re

from safelight.errors import RequestError
from safelight.request.adapters import MOST_LORAS, Lora, Purpose
from safelight.request.prompts.tags import ADAPTERS

_TAG = re.compile(rf"<(?:{'|'.join(ADAPTERS)}):([^<>]*)>")


def extract_lora_tags(field: str, text: str) -> tuple[str, tuple[Lora, ...]]:
    """Return (the text without its adapter tags, the adapters).

    Raises RequestError, with the position, for a malformed tag or for more than :data:`MOST_LORAS` adapters.
    """
    tags = list(_TAG.finditer(text))
    if len(tags) > MOST_LORAS:
        raise RequestError(field, f"{len(tags)} adapters", f"at most {MOST_LORAS} at once")
    found: list[Lora] = []
    for tag in tags:
        try:
            found.append(parse_lora(tag[1]))
        except ValueError as error:
            raise RequestError(field, tag[0], f"at character {tag.start()}: {error}") from error
    if not tags:
        return text, ()
    rest = re.sub(r"[ \t]{2,}", " ", _TAG.sub("", text)).strip()
    if _TAG.search(rest) is not None:
        # The text would request another adapter when it is parsed again.
        raise RequestError(field, text[:40], "has an adapter tag inside another adapter tag")
    return rest, tuple(found)


def parse_lora(text: str) -> Lora:
    """Parse ``NAME``, ``NAME:STRENGTH`` or ``NAME:TEXT_ENCODER:UNET``, with ``te=``, ``unet=`` and ``lbw=``.

    Raises ValueError for malformed text, RequestError for a value that is not allowed.
    """
    name, *rest = _cut(text)
    plain = [_number(part) for part in rest if "=" not in part]
    named = dict(part.split("=", 1) for part in rest if "=" in part)
    strange = named.keys() - {"te", "unet", "lbw"}
    if not name.strip() or len(plain) > 2 or strange:
        odd = f"{strange.pop()}= is unknown" if strange else "there is more than a name and two strengths"
        raise ValueError("the name is missing" if not name.strip() else odd)
    te = _number(named["te"]) if "te" in named else plain[0] if plain else 1.0
    unet = _number(named["unet"]) if "unet" in named else plain[1] if len(plain) == 2 else te
    blocks = tuple(_number(part) for part in named["lbw"].split(",")) if "lbw" in named else ()
    if te == unet:
        return Lora(name.strip(), te, blocks=blocks)
    return Lora(name.strip(), te, unet, te, blocks)


def _cut(text: str) -> list[str]:
    """Split at colons, except for a drive's (``C:\\loras\\x.safetensors``)."""
    return re.split(r":(?!\\)", text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def taggable(name: str) -> str:
    """Return a name without the characters that end a name in a tag or a list."""
    return re.sub(r"[:,<>\n]+", "", name)


def lora_to_tag(lora: Lora) -> str:
    """Return the tag of an adapter in AUTOMATIC1111's syntax. Equal adapters give equal tags."""
    te, unet, name = lora.strength_for(Purpose.TEXT_ENCODER), lora.strength_for(Purpose.DENOISER), taggable(lora.name)
    parts = [name, f"{te:g}"] if te == unet else [name, f"te={te:g}", f"unet={unet:g}"]
    parts += ["lbw=" + ",".join(f"{value:g}" for value in lora.blocks)] if lora.blocks else []
    return f"<lora:{':'.join(parts)}>"
