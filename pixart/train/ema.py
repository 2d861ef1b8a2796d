"""Exponential moving average of the weights, in fp32, as a model of its own that can be sampled from."""

import copy

import torch
from torch import nn


def make_ema(model: nn.Module) -> nn.Module:
    """A frozen fp32 copy of `model` to average into; take it before the model is compiled or wrapped."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


def ema_decay(decay: float, step: int, *, warmup: bool) -> float:
    """Decay of the update after optimizer step `step` (from 0)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema ← decay · ema + (1 - decay) · model, for every parameter; both list them in one order."""
    averages, values = list(ema.parameters()), [value.detach() for value in model.parameters()]
    if any(value.dtype != torch.float32 for value in values):
        values = [value.float() for value in values]
    torch._foreach_lerp_(averages, values, 1 - decay)
