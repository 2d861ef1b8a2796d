"""What a model's images or denoising are worth, as numbers. Nothing of the training loop may enter it."""
