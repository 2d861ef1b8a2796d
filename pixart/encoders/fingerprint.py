"""Fingerprints: short digests of an encoder's weights, by which stores and runs notice that they have changed."""

import hashlib

import torch
from torch import nn

from pixart.encoders.autoencoder import Autoencoder


def fingerprint(module: nn.Module) -> str:
    """A digest of a network's weights that does not depend on their file format or precision.

    It covers names, shapes and up to 256 values of every tensor, rounded to bf16.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().flatten()
        values = values[:: max(len(values) // 256, 1)][:256].float().cpu().bfloat16().view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def autoencoder_fingerprint(autoencoder: Autoencoder) -> str:
    model = getattr(autoencoder, "model", None)
    return "identity" if model is None else fingerprint(model)
