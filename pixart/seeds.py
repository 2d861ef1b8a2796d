"""Seeds for everything random, from what it belongs to, and the random numbers that a sample is drawn with."""

import hashlib
from dataclasses import dataclass
from typing import Literal


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable; the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Draw:
    """Random numbers that a network or an objective needs of every sample; each is drawn under a name of its own.

    Those of the network are for training alone: validation and sampling leave them out.
    `shape` is "sample" (one number), "token" (one for each token of the image) or "latent" (C, h, w).
    """

    kind: Literal["uniform", "normal"] = "uniform"  # uniform in [0, 1)
    shape: Literal["sample", "token", "latent"] = "sample"
