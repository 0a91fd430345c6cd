"""The XMP packet in which JPEG and WebP files hold Safelight's metadata."""

from __future__ import annotations

import html
import re

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:safelight="urn:safelight:metadata">\
<safelight:metadata>{}</safelight:metadata></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""

_STORED = re.compile(r"<safelight:metadata>(.*?)</safelight:metadata>", re.DOTALL)


def packet(text: str) -> bytes:
    """Return the packet that holds a text."""
    return _PACKET.format(html.escape(text)).encode("utf-8", "replace")


def find(stored: object) -> str | None:
    """Return the text of a packet; None if the bytes are no packet of Safelight."""
    if not isinstance(stored, bytes):
        return None
    found = _STORED.search(stored.decode("utf-8", "replace"))
    return None if found is None else html.unescape(found[1])
