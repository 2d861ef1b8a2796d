"""Feature stores: built from images and captions, converted, read as training samples.

Nothing of sampling or of the training loop may enter it.
"""

from pixart.features.build import Share
from pixart.features.convert import convert_official
from pixart.features.extraction import (
    ExtractConfig,
    Result,
    extract,
    summarize,
)

__all__ = [
    "ExtractConfig",
    "Result",
    "Share",
    "convert_official",
    "extract",
    "summarize",
]
