"""Seeds for everything random, from what it belongs to."""

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable; the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
