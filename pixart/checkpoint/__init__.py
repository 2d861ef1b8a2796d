"""Models in files, in and out."""

from pixart.checkpoint.files import ModelCard, load_model, save_model

__all__ = ["ModelCard", "load_model", "save_model"]
