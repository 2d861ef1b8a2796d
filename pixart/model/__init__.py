"""The network, its text encoder and its autoencoder."""

from pixart.model.pixart import PRESETS, CaptionContext, PixArt, PixArtConfig

__all__ = ["PRESETS", "CaptionContext", "PixArt", "PixArtConfig"]
