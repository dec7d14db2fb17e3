"""Digests that are kept on disk: the same in every version."""

from __future__ import annotations

from hashlib import blake2b

from evomerge.system.hashing import digest, digest_bytes


def test_parts_are_hashed_as_one() -> None:
    assert digest("é", b"12", memoryview(b"3")) == blake2b("é123".encode(), digest_size=16).hexdigest()
    assert digest_bytes(b"x", size=4, person=b"p") == blake2b(b"x", digest_size=4, person=b"p").digest()
    assert digest() == "cae66941d9efbd404e4d88758ea67670"  # of nothing, by `b2sum -l 128`
