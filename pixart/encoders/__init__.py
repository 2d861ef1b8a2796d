"""What stands before and behind the network: text → states, pixels ↔ latents.

Nothing of the network, of diffusion or of training may enter it.
"""
