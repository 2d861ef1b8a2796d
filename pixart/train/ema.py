"""Exponential moving average of the weights, in fp32, as a model of its own that can be sampled from."""

import copy

import torch
from torch import Tensor, nn

from pixart.train.distributed import local


def make_ema(model: nn.Module) -> nn.Module:
    """A frozen fp32 copy of `model` to average into; take it before the model is compiled, sharded or wrapped."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


def ema_decay(decay: float, step: int, *, warmup: bool) -> float:
    """Decay of the update after optimizer step `step` (from 0)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, applied: Tensor) -> None:
    """ema ← decay · ema + (1 - decay) · model, for every parameter; both list them in one order.

    `applied` is a truth value on the device: where it is false, nothing changes. Of a sharded model each process
    averages its own part.
    """
    averages = [local(value) for value in ema.parameters()]
    values = [local(value.detach()).float() for value in model.parameters()]
    weight = applied.float() * (1 - decay)
    torch._foreach_lerp_(averages, values, [weight] * len(averages))
