"""The network. Nothing of text, pixels, files or training may enter it."""

from pixart.model import conditioning, mlp, norms, positions, routing  # noqa: F401  # they register their names
from pixart.model.pixart import PRESETS, CaptionContext, PixArt, PixArtConfig

__all__ = ["PRESETS", "CaptionContext", "PixArt", "PixArtConfig"]
