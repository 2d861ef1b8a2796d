"""Seeds derived from names, and descriptions of the random numbers that samples need."""

import hashlib
from dataclasses import dataclass
from typing import Literal


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable, also from file names that are not UTF-8; the same on every machine and in
    every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fit_seed(seed: int) -> int:
    """A seed that torch accepts: `seed` itself, or one derived from it if it has more than 64 bits."""
    return int(seed) if -(2**63) <= seed < 2**64 else derive_seed(seed)


@dataclass(frozen=True)
class Draw:
    """Random numbers that a network or an objective needs for every sample; each is drawn under its own name.

    Those of the network are for training only: validation and sampling leave them out.
    `shape` is "sample" (one number), "token" (one per token of the image) or "latent" (C, h, w).
    """

    kind: Literal["uniform", "normal"] = "uniform"  # uniform in [0, 1)
    shape: Literal["sample", "token", "latent"] = "sample"
