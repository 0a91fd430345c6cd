"""``<lora:name:0.8>`` in prompts, as AUTOMATIC1111 takes it: it is taken out of the text, and asked for.

``<lora:NAME:STRENGTH>``, ``<lora:NAME:TEXT_ENCODER:UNET>``, and by name: ``te=``, ``unet=``, ``lbw=`` (block weights,
as sd-webui-lora-block-weight has them). ``<lyco:…>`` means the same.
"""

from __future__ import annotations

import re

from safelight.errors import RequestError
from safelight.types import Lora

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")


def taken(field: str, text: str) -> tuple[str, tuple[Lora, ...]]:
    """(the text without them, the adapters). Raises RequestError, which says where, for one that is not understood."""
    found: list[Lora] = []
    for tag in _TAG.finditer(text):
        try:
            found.append(parsed(tag[1]))
        except ValueError as error:
            raise RequestError(field, tag[0], f"at character {tag.start()}: {error}") from error
    return (re.sub(r"[ \t]{2,}", " ", _TAG.sub("", text)).strip() if found else text), tuple(found)


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
    strength = plain[0] if plain else 1.0
    two = plain[1] if len(plain) == 2 else None
    return Lora(
        name.strip(),
        strength,
        _number(named["unet"]) if "unet" in named else two,
        _number(named["te"]) if "te" in named else (strength if two is not None else None),
        tuple(_number(part) for part in named["lbw"].split(",")) if "lbw" in named else (),
    )


def _cut(text: str) -> list[str]:
    """At colons; one before a backslash is a drive's (``C:\\loras\\x.safetensors``)."""
    return re.split(r":(?!\\)", text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def written(lora: Lora) -> str:
    """As AUTOMATIC1111 writes it; equal ones are written equally."""
    parts = [lora.name, f"{lora.strength:g}"]
    parts += [f"unet={lora.unet:g}"] if lora.unet is not None else []
    parts += [f"te={lora.text_encoder:g}"] if lora.text_encoder is not None else []
    parts += ["lbw=" + ",".join(f"{value:g}" for value in lora.blocks)] if lora.blocks else []
    return f"<lora:{':'.join(parts)}>"
