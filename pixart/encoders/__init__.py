"""The encoders around the network: text → states, pixels ↔ latents, images → patch features.

Nothing of the network, of diffusion or of training may enter it.
"""
