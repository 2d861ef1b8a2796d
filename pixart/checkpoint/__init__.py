"""Reading and writing model files: every published PixArt format, our own folders, initialisation from other weights.

Nothing of data, sampling or training may enter it.
"""

from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.load import load_model, load_with_card

__all__ = ["ModelCard", "load_model", "load_with_card", "save_model"]
