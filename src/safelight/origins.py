"""The origins of web pages: scheme, host and port."""

from __future__ import annotations

import re


def check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Return the origins as browsers write them. ``*`` and ``null`` would allow every site."""
    found = tuple(origin.strip().lower().removesuffix("/") for origin in origins)
    for origin in found:
        if not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?", origin):
            raise ValueError(f"has {origin!r}; an origin is such as https://example.org or http://127.0.0.1:8000")
    return found
