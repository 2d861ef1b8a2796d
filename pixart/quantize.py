"""What bitsandbytes holds in 8 or 4 bits (arXiv 2110.02861, 2208.07339, 2305.14314); an extra."""

import importlib
from types import ModuleType

from pixart.errors import missing_extra


def load_bitsandbytes(purpose: str) -> ModuleType:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise missing_extra("bitsandbytes", "quantize", purpose) from None
