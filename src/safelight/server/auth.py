"""Who may ask: the key, the address, and pages of other sites."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import secrets
import time
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from safelight.files import write_whole
from safelight.settings import Settings

OPEN_PATHS = ("/api/v1/health",)
"""Answered to everyone, so that whatever watches over the server needs no key."""

COOKIE = "safelight_session"
"""What a browser brings instead of the key: a session's token."""

SESSION_SECONDS = 30 * 86_400

SECRET_FILE = ".sessions"
"""Below the root: by what tokens are signed. Without it every browser gives the key again."""


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Sessions:
    """The sessions of browsers, as signed tokens: ``EXPIRES.NONCE.SIGNATURE``. Another key ends all of them."""

    def __init__(self, root: Path, key: str) -> None:
        path = root / SECRET_FILE
        try:
            secret = path.read_bytes()
        except OSError:
            secret = b""
        if len(secret) != 32:
            secret = secrets.token_bytes(32)
            write_whole(path, secret, 0o600)
        self._secret = hashlib.sha256(secret + key.encode()).digest()

    def token(self) -> str:
        """A new session's."""
        said = f"{int(time.time() + SESSION_SECONDS)}.{secrets.token_hex(8)}"
        return f"{said}.{self._signature(said)}"

    def holds(self, token: str) -> bool:
        """Whether it was given by this server, for this key, and has not expired."""
        said, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(said).encode()):
            return False
        expires = said.partition(".")[0]
        return expires.isdecimal() and int(expires) > time.time()

    def _signature(self, said: str) -> str:
        return hmac.new(self._secret, said.encode(), hashlib.sha256).hexdigest()


def secure(connection: HTTPConnection) -> bool:
    """Whether a browser reaches this server by TLS: its own, or that of a proxy before it."""
    forwarded = connection.headers.get("x-forwarded-proto", "").partition(",")[0].strip()
    return "https" in (connection.url.scheme, forwarded)


def may_use(connection: HTTPConnection, settings: Settings) -> bool:
    """Whether a request brings the key, or none is wanted."""
    if settings.api_key is None:
        return True
    brought = given(connection)
    return brought is not None and hmac.compare_digest(brought.encode(), settings.api_key.get_secret_value().encode())


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


def allowed(connection: HTTPConnection, key: str | None, sessions: Sessions | None) -> bool:
    """Whether a request may be answered."""
    if key is None or connection.url.path in OPEN_PATHS:
        return True
    brought = given(connection)
    if brought is not None and hmac.compare_digest(brought.encode(), key.encode()):
        return True
    return sessions is not None and sessions.holds(connection.cookies.get(COOKIE, ""))


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
