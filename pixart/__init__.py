"""PixArt-α and PixArt-Σ: train, ablate, load, sample. The names below are imported lazily, on first use.

Training is in `pixart.train`, which has its own exports: `from pixart.train import TrainConfig, train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time, importing pixart does not import torch
    from pixart.adapters.load import load_model
    from pixart.checkpoint.files import ModelCard
    from pixart.checkpoint.save import export_model
    from pixart.config import load_config
    from pixart.cpu import keep_freed_memory, use_onednn
    from pixart.diffusion.sampling import SampleConfig
    from pixart.errors import InputError
    from pixart.extensions import load_extensions
    from pixart.inference.pipeline import Pipeline
    from pixart.inference.request import Request
    from pixart.model import PRESETS, PixArt, PixArtConfig

__version__ = "0.1.0"

_PLACES = {
    "InputError": "pixart.errors",
    "ModelCard": "pixart.checkpoint.files",
    "PRESETS": "pixart.model",
    "PixArt": "pixart.model",
    "PixArtConfig": "pixart.model",
    "Pipeline": "pixart.inference.pipeline",
    "Request": "pixart.inference.request",
    "SampleConfig": "pixart.diffusion.sampling",
    "export_model": "pixart.checkpoint.save",
    "keep_freed_memory": "pixart.cpu",
    "load_config": "pixart.config",
    "load_extensions": "pixart.extensions",
    "load_model": "pixart.adapters.load",
    "use_onednn": "pixart.cpu",
}

__all__ = [
    "PRESETS",
    "InputError",
    "ModelCard",
    "PixArt",
    "PixArtConfig",
    "Pipeline",
    "Request",
    "SampleConfig",
    "export_model",
    "keep_freed_memory",
    "load_config",
    "load_extensions",
    "load_model",
    "use_onednn",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pixart' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
