"""Fingerprints: short digests of an encoder's weights, by which stores and runs notice that they have changed."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixart.encoders.autoencoder import Autoencoder


def fingerprint(module: nn.Module) -> str:
    """A digest of a network's weights that does not depend on their file format or precision.

    It covers names, shapes and up to 256 values of every tensor, rounded to bf16.
    """
    return digest_tensors(module.state_dict())


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of tensors by their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        values = sample_values(tensor).bfloat16().view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def sample_values(tensor: Tensor) -> Tensor:
    """The values of a tensor that its fingerprint covers, at most 256, in fp32."""
    values = tensor.detach().flatten()
    return values[:: max(len(values) // 256, 1)][:256].float().cpu()


def autoencoder_fingerprint(autoencoder: Autoencoder) -> str:
    model = getattr(autoencoder, "model", None)
    return "identity" if model is None else fingerprint(model)
