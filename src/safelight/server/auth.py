"""The access rules: the API key, the sessions of browsers, the host name, and pages of other sites."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from safelight.files.disk import write_whole

COOKIE = "safelight_session"
"""The cookie with the token of a session, which a browser sends instead of the key."""

SESSION_SECONDS = 30 * 86_400
"""Seconds until a session expires."""

SECRET_FILE = ".sessions"
"""The file below the root with the secret that signs tokens. If it is deleted, all sessions end."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``, an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Sessions:
    """The sessions of browsers, as signed tokens: ``EXPIRES.NONCE.SIGNATURE``.

    ``EXPIRES``: seconds since 1970. A change of the key ends all sessions.
    """

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
        """Return the token of a new session."""
        content = f"{int(time.time() + SESSION_SECONDS)}.{secrets.token_hex(8)}"
        return f"{content}.{self._signature(content)}"

    def holds(self, token: str) -> bool:
        """Return whether this server has issued the token for this key, and it has not expired."""
        content, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(content).encode()):
            return False
        expires = content.partition(".")[0]
        return expires.isdecimal() and int(expires) > time.time()

    def _signature(self, content: str) -> str:
        return hmac.new(self._secret, content.encode(), hashlib.sha256).hexdigest()


def secure(connection: HTTPConnection) -> bool:
    """Return whether the browser uses TLS: to this server, or to a proxy in front of it."""
    forwarded = connection.headers.get("x-forwarded-proto", "").partition(",")[0].strip()
    return "https" in (connection.url.scheme, forwarded)


def given(connection: HTTPConnection) -> str | None:
    """Return the key that an HTTP request contains: a bearer token, or the password of basic authentication.

    Returns None when there is none, or it is unreadable.
    """
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return None


def cookie(token: str, connection: HTTPConnection, root_path: str, seconds: int = SESSION_SECONDS) -> str:
    """Return the header ``Set-Cookie`` of a session.

    ``root_path``: the setting of this name.
    ``seconds``: until it expires; 0 to remove it.
    """
    text = f"{COOKIE}={token}; HttpOnly; SameSite=Strict; Path={root_path}/; Max-Age={seconds}"
    return text + ("; Secure" if secure(connection) else "")


def from_elsewhere(connection: HTTPConnection, protected: bool, origins: Collection[str] = ()) -> str | None:
    """Return why to refuse a request from a page of another site, or None when the server may answer.

    Without key and people, the name in the Host header must be this machine's. Otherwise a page of another site could
    use a name that resolves to this machine (DNS rebinding), and the browser would treat the page as this server's own.

    ``protected``: whether clients need a key, or must log in.
    ``origins``: the setting ``allow_origins``.
    """
    host = connection.headers.get("host", "")
    origin = connection.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        place = None if origin is None else urlsplit(origin).netloc
    except ValueError:
        return f"the host {host!r} or the origin {origin!r} is no address"
    if not protected and not is_loopback(name):
        return f"the host {host!r} is not this machine; set --api-key if other machines use this server"
    if place is not None and place != host and origin not in origins:
        return f"pages of {origin!r} may not use this server; the setting allow_origins allows them"
    return None
