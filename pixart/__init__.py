"""PixArt-α and PixArt-Σ: train, ablate, load, sample. What stands here is imported when it is asked for."""

import importlib
from typing import Any

_PLACES = {
    "InputError": "pixart.errors",
    "PRESETS": "pixart.model",
    "PixArt": "pixart.model",
    "PixArtConfig": "pixart.model",
    "Pipeline": "pixart.inference.pipeline",
    "Request": "pixart.inference.request",
    "SampleConfig": "pixart.diffusion.sampling",
    "keep_freed_memory": "pixart.cpu",
    "load_model": "pixart.adapters.load",
    "use_onednn": "pixart.cpu",
}

__all__ = [
    "PRESETS", "InputError", "PixArt", "PixArtConfig", "Pipeline", "Request", "SampleConfig", "keep_freed_memory",
    "load_model", "use_onednn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pixart' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
