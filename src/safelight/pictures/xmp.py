"""The XMP packet in which JPEG and WebP files hold Safelight's metadata."""

from __future__ import annotations

import html

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:safelight="urn:safelight:metadata">\
<safelight:metadata>{}</safelight:metadata></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""

_BEGIN, _END = "<safelight:metadata>", "</safelight:metadata>"


def packet(text: str) -> bytes:
    """Return the packet that holds a text."""
    return _PACKET.format(html.escape(text)).encode("utf-8", "replace")


def find(stored: object) -> str | None:
    """Return the text of a packet; None if the bytes are no packet of Safelight."""
    if not isinstance(stored, bytes):
        return None
    # Not a regular expression: without an end, it would search the rest again from each begin.
    _, begin, rest = stored.decode("utf-8", "replace").partition(_BEGIN)
    text, end, _ = rest.partition(_END)
    return html.unescape(text) if begin and end else None
