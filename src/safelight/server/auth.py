"""Who may ask: the key, the address, and pages of other sites."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

OPEN_PATHS = ("/api/v1/health",)
"""Answered to everyone, so that whatever watches over the server needs no key."""

COOKIE = "safelight_key"
"""What a browser keeps instead of the key: its digest."""


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token(key: str) -> str:
    """What a browser's cookie holds for a key."""
    return hashlib.sha256(f"safelight {key}".encode()).hexdigest()


def given(connection: HTTPConnection) -> str | None:
    """The key that a request brings: a bearer token, or the password of basic authentication."""
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def allowed(connection: HTTPConnection, key: str | None) -> bool:
    """Whether a request may be answered."""
    if key is None or connection.url.path in OPEN_PATHS:
        return True
    brought = given(connection)
    if brought is not None and hmac.compare_digest(brought.encode(), key.encode()):
        return True
    return hmac.compare_digest(connection.cookies.get(COOKIE, "").encode(), token(key).encode())


def from_elsewhere(connection: HTTPConnection, key: str | None) -> str | None:
    """Why a request must be refused that another site's page has made, None when it may be answered.

    Without a key, the name in the Host header must be this machine's: a foreign name that leads here (DNS rebinding)
    would make a foreign page this server's own.
    """
    host = connection.headers.get("host", "")
    name = urlsplit(f"//{host}").hostname or ""
    if key is None and not is_loopback(name):
        return f"the host {host!r} is not this machine; a server that others reach needs --api-key"
    origin = connection.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return f"pages of {origin!r} may not use this server"
    return None
