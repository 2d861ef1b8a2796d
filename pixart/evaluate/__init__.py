"""Scores of a model's images and of its denoising. Nothing of the training loop may enter it."""
