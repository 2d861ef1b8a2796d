"""A learned weight of the loss at every noise level: `diffusion.weighting: uncertainty`."""

import math

import torch
from torch import Tensor, nn

FEATURES = 128  # as in EDM2's code
LIMIT = 1e3  # noise levels are held between its inverse and itself: a flow ends at 0 and infinity


class Uncertainty(nn.Module):
    """EDM2's uncertainty u (arXiv 2312.02696, equations 14, 15 and 21): a linear function of Fourier features of the
    noise level ln(σ/α) / 4.

    The loss e^(-u) · L + u has its minimum at u = log E[L], where every noise level contributes alike. u starts at 0,
    with which the loss is L.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(FEATURES))
        self.register_buffer("phases", torch.empty(FEATURES))
        self.weight = nn.Parameter(torch.empty(FEATURES))

    def init_weights(self, generators) -> None:
        nn.init.normal_(self.frequencies, generator=generators("frequencies"))
        nn.init.uniform_(self.phases, generator=generators("phases"))
        nn.init.zeros_(self.weight)

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """α and σ (B, 1, 1, 1) → u (B,), fp32."""
        level = (sigma / alpha).clamp(1 / LIMIT, LIMIT).log().flatten() / 4  # (B,)
        angles = 2 * math.pi * (level[:, None] * self.frequencies + self.phases)
        return math.sqrt(2) * (angles.cos() * self.weight).sum(1)  # no matrix product, which autocast would round

    def weigh(self, loss: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """A loss (B,) → "loss", e^(-u) · loss + u, and "uncertainty", u."""
        u = self(alpha, sigma)
        return {"loss": torch.exp(-u) * loss + u, "uncertainty": u.detach()}
