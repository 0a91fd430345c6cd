"""Passwords: hashed by Argon2id with the parameters that RFC 9106 recommends where memory is limited."""

from __future__ import annotations

import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.profiles import RFC_9106_LOW_MEMORY

from safelight.errors import InputError

LEAST_CHARACTERS, MOST_CHARACTERS = 10, 1000

KEY_PREFIX = "safelight-"
"""API keys begin so, so that people and programs that look for leaked keys recognise them."""

_hasher = PasswordHasher.from_parameters(RFC_9106_LOW_MEMORY)

_at_once = threading.Semaphore(2)
"""Each hash takes 64 MiB, so only a few are computed at the same time."""

_nobody = ""


def hash_password(password: str) -> str:
    """Return the hash of a new password. Raises InputError if it is too short or too long."""
    if not LEAST_CHARACTERS <= len(password) <= MOST_CHARACTERS:
        raise InputError(f"a password must have from {LEAST_CHARACTERS} to {MOST_CHARACTERS} characters")
    with _at_once:
        return _hasher.hash(password)


def is_password(stored: str | None, password: str) -> bool:
    """Return whether this is the password of a hash.

    ``stored``: None if there is no such person. This takes as long, so that nobody learns which names exist.
    """
    global _nobody  # noqa: PLW0603 - computed at the first use, because a hash takes a tenth of a second
    if stored is None and not _nobody:
        _nobody = hash_password(secrets.token_urlsafe())
    with _at_once:
        try:
            return _hasher.verify(stored or _nobody, password[: MOST_CHARACTERS + 1]) and stored is not None
        except (VerificationError, InvalidHashError):
            return False


def new_key() -> str:
    """Return a new API key, of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)
