"""Images + captions → a feature store."""

from pixart.extract.build import Share
from pixart.extract.convert import convert_official
from pixart.extract.run import (
    ExtractConfig,
    Result,
    autoencoder_fingerprint,
    encoder_dtype,
    extract,
    fingerprint,
    summarize,
)  # fmt: skip

__all__ = [
    "ExtractConfig", "Result", "Share", "autoencoder_fingerprint", "convert_official", "encoder_dtype", "extract",
    "fingerprint", "summarize",
]  # fmt: skip
