"""Signed tokens: a rater id is accepted only with the study's own signature."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

SECRET_NAME = "secret"


def write_secret(folder: Path) -> None:
    """Write a new study secret that only the owner of the folder can read."""
    descriptor = os.open(folder / SECRET_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))


def read_secret(folder: Path) -> bytes:
    """Return the study's secret.

    Raises:
        ValueError: It is missing or was cut short.
    """
    path = folder / SECRET_NAME
    secret = path.read_bytes().strip() if path.is_file() else b""
    if len(secret) != 64:
        raise ValueError(
            f"{path}: {len(secret)} bytes instead of 64; bring the file back from where the study "
            "was built: with another secret no rater's link works"
        )
    return secret


def _signature(secret: bytes, purpose: str, value: str) -> str:
    return hmac.new(secret, f"{purpose}:{value}".encode(), hashlib.sha256).hexdigest()[:32]


def rater_token(secret: bytes, rater: str) -> str:
    """Return the token that authenticates this rater."""
    return f"{rater}.{_signature(secret, 'rater', rater)}"


def rater_of_token(secret: bytes, token: str) -> str | None:
    """Return the rater whom the token authenticates, or None if its signature is wrong."""
    rater, _, signature = token.partition(".")
    expected = _signature(secret, "rater", rater)
    return rater if hmac.compare_digest(signature.encode(), expected.encode()) else None


def invitation(secret: bytes) -> str:
    """Return the code that lets people join."""
    return _signature(secret, "invitation", "")


def is_invitation(secret: bytes, code: str) -> bool:
    """Return whether this code lets people join."""
    return hmac.compare_digest(code.encode(), invitation(secret).encode())
