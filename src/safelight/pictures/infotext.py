"""Reads the text about the generation in picture files of any program, and the fields in it, in AUTOMATIC1111's form.

The text is in these places:

- PNG: ``parameters`` (tEXt, zTXt, iTXt)
- JPEG, WebP and TIFF: Exif's UserComment
- GIF: the comment
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any

from PIL import Image as PILImage

from safelight.pictures import xmp

_EXIF, _USER_COMMENT = 0x8769, 0x9286
_LONG, _UNDEFINED = 4, 7
"""Exif's types of a value."""

NOT_TEXT = frozenset(
    {
        *("jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "exif", "loop", "background", "timestamp"),
        *("duration", "progressive", "progression", "icc_profile", "chromaticity", "photoshop"),
    }
)
"""The entries of Pillow's ``info`` that are not texts."""

_FIELD = re.compile(r'(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""AUTOMATIC1111's pattern, with a limit for the name: without one, a long line takes the square of its length."""

_SIZE = re.compile(r"(\d+)x(\d+)")
_NEGATIVE = "Negative prompt:"
_FEWEST_FIELDS = 3
"""With fewer fields, the last line belongs to the prompt."""


def read(image: PILImage.Image) -> tuple[str, dict[str, Any]]:
    """Read the texts of an opened picture.

    Returns the text with the fields ("" if there is none), and all other entries of the file.
    """
    image.load()
    items = {str(key): value for key, value in image.info.items() if str(key) not in NOT_TEXT}
    text = _plain(items.pop("parameters", ""))
    own = xmp.find(items.pop("xmp", None))
    if own is not None:
        items["safelight"] = own
    comment = _user_comment(image)
    if comment:
        items["exif comment"] = text = comment
    elif not text and "comment" in items:
        text = _plain(items["comment"])
    return text, {key: _plain(value) for key, value in items.items() if isinstance(value, str | bytes | int | float)}


def _user_comment(image: PILImage.Image) -> str:
    try:
        exif = image.getexif()
        # Fooocus writes it beside the block to which it belongs.
        raw: object = exif.get_ifd(_EXIF).get(_USER_COMMENT) or exif.get(_USER_COMMENT)
    except Exception:  # noqa: BLE001 - Pillow raises any error for a damaged block, but the picture itself is intact
        return ""
    if isinstance(raw, str):
        return raw.strip("\0 ")
    if not isinstance(raw, bytes):
        return ""
    mark, body = raw[:8], raw[8:]
    if mark == b"UNICODE\0":
        return _utf16(body)
    return _utf8(body if mark in (b"ASCII\0\0\0", b"\0" * 8) else raw)


def _utf8(body: bytes) -> str:
    try:
        return body.decode().strip("\0 ")
    except UnicodeDecodeError:
        return body.decode("latin-1").strip("\0 ")


def _utf16(body: bytes) -> str:
    """Decode a comment. AUTOMATIC1111 writes UTF-16 with the high byte first; others the low byte first, or UTF-8."""
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return body.decode("utf-16", "replace").strip("\0")
    first, second = body[0::2], body[1::2]
    big = sum(high == 0 < low < 128 for high, low in zip(first, second, strict=False))
    little = sum(high == 0 < low < 128 for low, high in zip(first, second, strict=False))
    if not big and not little and b"\0" not in body:
        return _utf8(body)
    return body.decode("utf-16-be" if big >= little else "utf-16-le", "replace").strip("\0")


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if type(value) is str and not value.isascii():
        try:
            # By the standard a tEXt chunk is Latin-1, but most programs write UTF-8.
            return value.encode("latin-1").decode()
        except UnicodeError:
            return value
    return str(value) if isinstance(value, str) else value


def fields(text: str) -> dict[str, Any]:
    """Parse such a text. Returns prompts and fields by AUTOMATIC1111's names; ``Size`` as ``Size-1`` and ``Size-2``."""
    if not text.strip():
        return {}
    *lines, last = text.strip().split("\n")
    if len(_FIELD.findall(last)) < _FEWEST_FIELDS:
        lines, last = [*lines, last], ""
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    current = "Prompt"
    for line in lines:
        written = line.strip()
        if written.startswith(_NEGATIVE):
            current, written = "Negative prompt", written.removeprefix(_NEGATIVE).strip()
        prompts[current].append(written)
    found: dict[str, Any] = {name: "\n".join(part).lstrip("\n") for name, part in prompts.items()}
    for name, value in _FIELD.findall(last):
        _put(found, name, _unquoted(value))
    return found


def _unquoted(value: str) -> str:
    if value[:1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _put(found: dict[str, Any], name: str, value: str) -> None:
    size = _SIZE.fullmatch(value)
    if size is not None:
        found |= {f"{name}-1": size[1], f"{name}-2": size[2]}
    elif value:
        found[name] = value


def exif_of(text: str) -> bytes:
    """Encode the text as an Exif block as AUTOMATIC1111 does, for JPEG and WebP.

    Pillow would write the comment as BYTE. By the standard (CIPA DC-008, 4.6.5) it is UNDEFINED, and other programs
    fail on anything else.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    first, second, data = 8, 26, 44
    pointer = struct.pack("<HHHLLL", 1, _EXIF, _LONG, 1, second, 0)
    entry = struct.pack("<HHHLLL", 1, _USER_COMMENT, _UNDEFINED, len(comment), data, 0)
    return b"Exif\0\0" + b"II*\0" + struct.pack("<L", first) + pointer + entry + comment
