"""``<lora:name:0.8>`` in prompts, as AUTOMATIC1111 takes it: it is taken out of the text, and asked for.

``<lora:NAME:STRENGTH>``, ``<lora:NAME:TEXT_ENCODER:UNET>``, and by name: ``te=``, ``unet=`` (the text encoder's where
it is not given), ``lbw=`` (block weights, as sd-webui-lora-block-weight has them). ``<lyco:…>`` means the same.
"""

from __future__ import annotations

import re

from safelight.errors import RequestError
from safelight.prompts.tags import ADAPTERS
from safelight.request.parts import MOST_LORAS, Lora

_TAG = re.compile(rf"<(?:{'|'.join(ADAPTERS)}):([^<>]*)>")


def taken(field: str, text: str) -> tuple[str, tuple[Lora, ...]]:
    """(the text without them, the adapters). Raises RequestError, which says where, for one that is not understood."""
    tags = list(_TAG.finditer(text))
    if len(tags) > MOST_LORAS:
        raise RequestError(field, f"{len(tags)} adapters", f"at most {MOST_LORAS} at once")
    found: list[Lora] = []
    for tag in tags:
        try:
            found.append(parsed(tag[1]))
        except ValueError as error:
            raise RequestError(field, tag[0], f"at character {tag.start()}: {error}") from error
    if not tags:
        return text, ()
    rest = re.sub(r"[ \t]{2,}", " ", _TAG.sub("", text)).strip()
    if _TAG.search(rest) is not None:
        # Whoever read it again would find another adapter in it.
        raise RequestError(field, text[:40], "has an adapter within another one's brackets")
    return rest, tuple(found)


def parsed(text: str) -> Lora:
    """``NAME``, ``NAME:STRENGTH``, ``NAME:TEXT_ENCODER:UNET``, with ``te=``, ``unet=``, ``lbw=``.

    Raises ValueError, and RequestError for a value that is not allowed.
    """
    name, *rest = _cut(text)
    plain = [_number(part) for part in rest if "=" not in part]
    named = dict(part.split("=", 1) for part in rest if "=" in part)
    strange = named.keys() - {"te", "unet", "lbw"}
    if not name.strip() or len(plain) > 2 or strange:
        odd = f"{strange.pop()}= is not known" if strange else "there is more than a name and two strengths"
        raise ValueError("a name is wanted" if not name.strip() else odd)
    te = _number(named["te"]) if "te" in named else plain[0] if plain else 1.0
    unet = _number(named["unet"]) if "unet" in named else plain[1] if len(plain) == 2 else te
    blocks = tuple(_number(part) for part in named["lbw"].split(",")) if "lbw" in named else ()
    if te == unet:
        return Lora(name.strip(), te, blocks=blocks)
    return Lora(name.strip(), te, unet, te, blocks)


def _cut(text: str) -> list[str]:
    """At colons; one before a backslash is a drive's (``C:\\loras\\x.safetensors``)."""
    return re.split(r":(?!\\)", text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def taggable(name: str) -> str:
    """A name as it can stand in a tag or a list: without what ends a name there."""
    return re.sub(r"[:,<>\n]+", "", name)


def written(lora: Lora) -> str:
    """As AUTOMATIC1111 writes it; equal ones are written equally."""
    te, unet, name = lora.on("text_encoder"), lora.on("unet"), taggable(lora.name)
    parts = [name, f"{te:g}"] if te == unet else [name, f"te={te:g}", f"unet={unet:g}"]
    parts += ["lbw=" + ",".join(f"{value:g}" for value in lora.blocks)] if lora.blocks else []
    return f"<lora:{':'.join(parts)}>"
