"""MLPs besides the GELU's: `model.mlp: swiglu`."""

import torch.nn.functional as F
from torch import Tensor, nn

from pixart.model.layers import MLPS


@MLPS.register("swiglu")
class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x)) (arXiv 2002.05202, equation 6); (…, in_features) → (…, out_features).

    Three matrices take the place of two, so the hidden width is two thirds of `hidden_features`, to the nearest
    multiple of 8: as many parameters, as in the paper's section 3.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        hidden = 8 * max(round(hidden_features / 12), 1)
        self.gate = nn.Linear(in_features, hidden)
        self.up = nn.Linear(in_features, hidden)
        self.down = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
