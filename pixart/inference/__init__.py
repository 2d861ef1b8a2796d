"""From prompts to images: text states → latents, prompts → images, images in a folder.

Nothing of training may enter it.
"""
