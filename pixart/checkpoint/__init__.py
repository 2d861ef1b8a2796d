"""Models in files, in and out: every PixArt in circulation, our own folders, starts from other weights.

Nothing of data, sampling or training may enter it.
"""

from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.load import load_model, load_with_card

__all__ = ["ModelCard", "load_model", "load_with_card", "save_model"]
