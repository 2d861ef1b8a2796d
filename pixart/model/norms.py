"""Norms of the stream besides LayerNorm: `model.norm: rms_norm`."""

from torch import nn

from pixart.model.layers import NORMS


@NORMS.register("rms_norm")
def rms_norm(dim: int) -> nn.Module:
    """RMSNorm (arXiv 1910.07467, equation 4) without weights, as adaLN takes it."""
    return nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
