"""A model with a closed form, a tiny PixArt, and the relative distance of two tensors."""

import torch
from torch import Tensor

from pixart.model import PixArt, PixArtConfig


def relative(value: Tensor, reference: Tensor) -> float:
    """L2 distance over the reference's norm."""
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).norm() / reference.norm()).item()


def toy_network(c: Tensor):
    """A smooth ε resembling that of a Gaussian mixture; the golden solver files were made with it."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        tau = ((t + 1) / 1000)[:, None, None, None]
        bar = torch.exp(-(0.1 * tau + 9.95 * tau**2))
        a, s = bar.sqrt(), (1 - bar).sqrt()
        return s * (x - a * c) / (a**2 / 4 + s**2) + 0.1 * s * torch.tanh(2 * x + c)

    return network


TINY = {
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "caption_channels": 16,
    "caption_length": 12,
    "latent_size": 8,
}


def tiny_model(seed: int = 0, **changes) -> PixArt:
    """Two layers with every weight random: zero-initialised outputs would hide mistakes."""
    torch.manual_seed(seed)
    model = PixArt(PixArtConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 / max(parameter.shape[-1], 4) ** 0.5 + 0.02))
    return model


def tiny_inputs(model: PixArt, batch: int = 2, side: int = 8, length: int = 5, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    inputs = {
        "x": torch.randn(batch, config.in_channels, side, side, generator=generator),
        "t": torch.rand(batch, generator=generator) * 999,
        "caption": torch.randn(batch, length, config.caption_channels, generator=generator),
        "caption_mask": torch.arange(length) < torch.tensor([length, 2] * batch)[:batch, None],
    }
    if config.micro_conditions:
        inputs["size"] = torch.tensor([[512.0, 768.0], [640.0, 480.0]])[:batch]
        inputs["aspect_ratio"] = torch.tensor([0.68, 1.29])[:batch]
    return inputs
