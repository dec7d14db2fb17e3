"""The one hash of the package: BLAKE2b of what is given, one part after the other."""

from __future__ import annotations

from hashlib import blake2b

Part = str | bytes | memoryview


def digest(*parts: Part) -> str:
    """Hashes some parts, text as UTF-8, to 128 bits, in hexadecimal."""
    return digest_bytes(*parts).hex()


def digest_bytes(*parts: Part, size: int = 16, person: bytes = b"") -> bytes:
    """Hashes some parts to `size` bytes; `person` sets apart hashes that are used for different things."""
    content = blake2b(digest_size=size, person=person)
    for part in parts:
        content.update(part.encode() if isinstance(part, str) else part)
    return content.digest()
