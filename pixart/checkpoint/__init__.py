"""Models in files, in and out."""

from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.load import load_model, load_with_card

__all__ = ["ModelCard", "load_model", "load_with_card", "save_model"]
