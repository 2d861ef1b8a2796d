"""How the time reaches the blocks, besides adaLN-single: `model.conditioning: adaln_per_block`, `time_token` or `dit`.

Letters in shape comments: B batch, L caption tokens, D width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from pixart.model.layers import CONDITIONING, Block, CaptionKV, Conditioning, FinalLayer, Generators


class AdaLNBlock(Block):
    """adaLN-Zero of DiT (arXiv 2212.09748, section 3.2): every block projects the time itself, under DiT's names.

    The projection starts at zero, so that every block starts as the identity.
    """

    def add_modulation(self, dim: int) -> None:
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def init_weights(self, _: Generators) -> None:
        nn.init.zeros_(self.adaLN_modulation[1].weight)

    def modulation(self, shared: Tensor) -> Tensor:
        """The time embedding (B, D) → (B, 6, D)."""
        return rearrange(self.adaLN_modulation(shared), "b (six d) -> b six d", six=6)


class AdaLNFinal(FinalLayer):
    """DiT's final layer: shift and scale are a projection of the time, which starts at zero."""

    def add_modulation(self, dim: int) -> None:
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def init_weights(self, _: Generators) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.adaLN_modulation[1].weight)

    def modulation(self, time: Tensor) -> Tensor:
        return rearrange(self.adaLN_modulation(time), "b (two d) -> b two d", two=2)


class DiTBlock(AdaLNBlock):
    """DiT's block: without cross-attention, since the time embedding includes the class, see `pool_caption`."""

    def __init__(self, config, index: int):
        super().__init__(config, index)
        del self.cross_attn

    def encode_caption(self, caption: Tensor) -> CaptionKV:
        return caption, caption

    def read_caption(self, x: Tensor, caption: Tensor | CaptionKV, mask: Tensor | None) -> Tensor:
        return x


def pool_caption(caption: Tensor | CaptionKV, mask: Tensor | None) -> Tensor:
    """The mean of a caption's tokens (B, L, D) that are not masked, mask (B, 1, 1, L) → (B, D).

    DiT adds the embedding of a class to that of the time (arXiv 2212.09748, section 3.2). Here it is that of a caption,
    which is to name the class.
    """
    tokens = caption if isinstance(caption, Tensor) else caption[0]
    if mask is None:
        return tokens.mean(1)
    weight = mask[:, 0, 0, :, None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1)


class PlainBlock(Block):
    """A block of a plain vision transformer: the norms have weights of their own and there are no gates."""

    def add_modulation(self, dim: int) -> None:
        # shift and scale (minus 1) of the first norm, then of the second
        self.norm_table = nn.Parameter(torch.empty(4, dim))

    def init_weights(self, _: Generators) -> None:
        nn.init.zeros_(self.norm_table)

    def modulation(self, shared: Tensor) -> Tensor:
        gate = torch.ones_like(self.norm_table[:1])
        return torch.cat([self.norm_table[:2], gate, self.norm_table[2:], gate])[None]  # (1, 6, D)


class PlainFinal(FinalLayer):
    """A final layer whose norm has weights of its own."""

    def add_modulation(self, dim: int) -> None:
        self.norm_table = nn.Parameter(torch.empty(2, dim))

    def init_weights(self, _: Generators) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.norm_table)

    def modulation(self, time: Tensor) -> Tensor:
        return self.norm_table[None]


class TimeToken(nn.Module):
    """In-context conditioning (DiT, section 3.2; U-ViT, arXiv 2209.12152): the time is one more token, before those of
    the image."""

    def __init__(self, dim: int):
        """`dim` is the width, which the time embedding already has: there is nothing to project."""
        super().__init__()

    def forward(self, time: Tensor) -> Tensor:
        """(B, D) → (B, 1, D)."""
        return time[:, None]


CONDITIONING.register("adaln_per_block")(Conditioning(AdaLNBlock, AdaLNFinal))
CONDITIONING.register("dit")(Conditioning(DiTBlock, AdaLNFinal, pool=pool_caption))
CONDITIONING.register("time_token")(Conditioning(PlainBlock, PlainFinal, tokens=TimeToken))
