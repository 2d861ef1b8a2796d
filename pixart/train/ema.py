"""Exponential moving average (EMA) of the weights in fp32, as a separate model that can be sampled from."""

import copy

import torch
from torch import Tensor, nn

from pixart.train.distributed import local


def make_ema(model: nn.Module) -> nn.Module:
    """A frozen fp32 copy of `model` to average into; make it before the model is compiled, sharded or wrapped."""
    return in_fp32(copy.deepcopy(model)).eval().requires_grad_(False)


def in_fp32(module: nn.Module) -> nn.Module:
    """The module itself, converted in place if any of its tensors has another floating-point type."""
    return module if is_fp32(module) else module.float()


def is_fp32(module: nn.Module) -> bool:
    """Whether all of a module's floating-point tensors are in fp32."""
    tensors = (*module.parameters(), *module.buffers())
    return all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())


def ema_decay(decay: float, step: int, *, warmup: bool) -> float:
    """Decay of the update after optimizer step `step` (from 0)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, applied: Tensor) -> None:
    """ema ← decay · ema + (1 - decay) · model, for every parameter; both must list them in the same order.

    `applied` is a boolean on the device: if it is false, nothing changes. With sharded models each process averages its
    own part.
    """
    averages = [local(value) for value in ema.parameters()]
    values = [local(value.detach()).float() for value in model.parameters()]
    weight = applied.float() * (1 - decay)
    torch._foreach_lerp_(averages, values, [weight] * len(averages))
