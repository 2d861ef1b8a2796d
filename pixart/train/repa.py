"""REPA (arXiv 2410.06940): hidden states of the network are aligned with features of a frozen vision model."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixart.diffusion.objective import OBJECTIVES, Denoising, Example, Network
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.vision import load_patch_features
from pixart.errors import InputError
from pixart.invocation import command

TARGET = "repa"  # of data.targets: features that the store holds


@OBJECTIVES.register("repa")
class Repa(Denoising):
    """The denoising loss and `weight` times the paper's equation 8: minus the mean cosine similarity of every patch's
    features with a projection of the hidden state after block `block`.

    The features are computed in every step by the vision model `encoder`, or, if `size` is given in its place, come
    with the data as `data.targets: {repa: vision:ENCODER}`, which a feature store keeps. A grid of features that is not
    the network's is interpolated to it.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        network: nn.Module,
        *,
        block: int,
        encoder: str | None = None,
        size: int | None = None,
        weight: float = 0.5,
        width: int = 2048,
    ):
        """
        Args:
            block: number of the block whose hidden states are aligned; the paper's 8th of 28 is 7.
            encoder: name of a vision model, see `load_patch_features`.
            size: width of the features, where the store holds them.
            weight: the paper's λ.
            width: of the projector's two hidden layers.

        Raises:
            InputError: not one of `encoder` and `size`, no such block, or no such vision model.
        """
        super().__init__(config, network)
        if (encoder is None) == (size is None):
            raise InputError(
                "objective repa: expected one of the options encoder (features are computed in training) and size "
                "(their width, where data.targets has them as repa)"
            )
        if not 0 <= block < network.config.depth:
            raise InputError(f"objective repa: block {block}: the model has blocks 0 to {network.config.depth - 1}")
        device = next(network.parameters()).device
        self.features = None if encoder is None else load_patch_features(encoder, device, "objective repa: ")
        self.block, self.weight, self.patch = block, weight, network.config.patch_size
        size = size if self.features is None else self.features.size
        self.trained["projector"] = nn.Sequential(
            nn.Linear(network.config.hidden_size, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )

    def forward(self, network: Network, example: Example) -> dict[str, Tensor]:
        x_t, t = self.add_noise(example)
        target = self._find_features(example)  # (B, N, D)
        output, hidden = network(x_t, t, keep=(self.block,), **example.inputs)
        found = self.trained["projector"](hidden[self.block])  # (B, N, D)
        alignment = -F.cosine_similarity(found.float(), target, dim=-1).mean(1)
        terms = self.measure(output, example, t)
        return terms | {"loss": terms["loss"] + self.weight * alignment, "alignment": alignment}

    @classmethod
    def missing(cls, options: Mapping[str, Any], targets: Collection[str], *, pixels: bool) -> str | None:
        if options.get("encoder") is not None and not pixels:
            return (
                "objective repa: a feature store has no images for the encoder; put its features there "
                f"({command('extract')} CONFIG, with data.targets {{repa: vision:ENCODER}}) and set size"
            )
        if options.get("size") is not None and TARGET not in targets:
            return "objective repa: its option size needs data.targets {repa: vision:ENCODER}"
        return None

    @torch.no_grad()
    def _find_features(self, example: Example) -> Tensor:
        """The features on the network's grid of tokens: fp32 (B, N, D)."""
        if lack := self.missing(
            {"size" if self.features is None else "encoder": True}, example.targets, pixels=example.pixels is not None
        ):
            raise InputError(lack)
        features = example.targets[TARGET] if self.features is None else self.features(example.pixels)
        image = rearrange(features.float(), "b h w d -> b d h w")
        grid = tuple(side // self.patch for side in example.x0.shape[-2:])
        if image.shape[-2:] != grid:
            image = F.interpolate(image, grid, mode="bilinear", antialias=True)
        return rearrange(image, "b d h w -> b (h w) d")
