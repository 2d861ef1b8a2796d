"""Optimizers of two extras by name: pytorch-optimizer's (CAME, Prodigy, schedule-free AdamW and others), and those of
bitsandbytes, whose state has 8 bits."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pixart.errors import InputError, did_you_mean, missing_extra
from pixart.quantize import load_bitsandbytes
from pixart.train.distributed import local

# names that are told of before the package is installed
MORE = ("came", "prodigy", "schedulefreeadamw", "schedulefreeradam", "schedulefreesgd")
GIVEN = ("params", "lr", "weight_decay")  # constructor arguments that are settings of their own


def more_optimizers() -> list[str]:
    """The names that pytorch-optimizer knows; none if it is not installed."""
    try:
        from pytorch_optimizer import get_supported_optimizers
    except ImportError:
        return []
    return get_supported_optimizers()


def make_more(
    name: str, parameters: list, lr: float, weight_decay: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of that name in pytorch-optimizer.

    Raises:
        InputError: the package is not installed or has no such optimizer; the optimizer does not take an option; or it
            needs more than gradients at a step, such as a closure.
    """
    try:
        from pytorch_optimizer import load_optimizer
    except ImportError:
        raise missing_extra("pytorch-optimizer", "optimizers", f"optimizer.name '{name}'") from None
    kind = load_optimizer(name)
    _check_options(kind, name, options)
    _try(kind, name, lr, weight_decay, options)
    return kind(parameters, lr=lr, weight_decay=weight_decay, **options)


def make_bitsandbytes(
    name: str, parameters: list, lr: float, weight_decay: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of bitsandbytes that has this name in timm, as bnbadamw8bit. timm's own maker insists on CUDA, but
    recent versions of bitsandbytes have these optimizers on a CPU, too.

    Raises:
        InputError: the package is not installed or cannot use this device, or the optimizer does not take an option.
    """
    bitsandbytes = load_bitsandbytes(f"optimizer.name '{name}'")
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(name)
    kind = getattr(bitsandbytes.optim, str(info.opt_class).rpartition(".")[2])
    _check_options(kind, name, options)
    options = {**(info.defaults or {}), **({"momentum": 0.9} if info.has_momentum else {}), **options}
    options = {key: options[key] for key in options if key in inspect.signature(kind).parameters}
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    if first.is_cuda or not torch.cuda.is_available():  # else it is only asked for, and CUDA will be used
        trial = nn.Parameter(torch.ones(64, 64, device=first.device))  # of fewer than 4096 numbers it keeps 32 bits
        trial.grad = torch.ones_like(trial)
        try:
            kind([trial], lr=lr, weight_decay=weight_decay, **options).step()
        except (RuntimeError, NotImplementedError, AttributeError) as error:  # what versions without this device raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(
                f"optimizer '{name}' needs CUDA: bitsandbytes {bitsandbytes.__version__} cannot use it on device "
                f"'{first.device.type}' ({reason})"
            ) from None
    return kind(parameters, lr=lr, weight_decay=weight_decay, **options)


def _check_options(kind: type, name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a constructor does not have: many ignore those that they do not know."""
    known = [key for key, value in inspect.signature(kind).parameters.items() if value.kind is not value.VAR_KEYWORD]
    known = [key for key in known if key not in GIVEN]
    if unknown := [key for key in options if key not in known]:
        hint = did_you_mean(unknown[0], known)
        raise InputError(f"optimizer '{name}' has no option '{unknown[0]}'{hint} (there are {', '.join(known)})")


def _try(kind: type, name: str, lr: float, weight_decay: float, options: Mapping[str, Any]) -> None:
    """Take one step with a small matrix, so that an optimizer that needs more than its gradient is refused early."""
    parameter = nn.Parameter(torch.eye(4))
    parameter.grad = torch.eye(4)
    with torch.random.fork_rng(devices=[]):
        try:
            optimizer = kind([parameter], lr=lr, weight_decay=weight_decay, **options)
        except Exception as error:  # each raises its own kind
            raise InputError(f"optimizer '{name}' does not accept its options {dict(options)}: {error}") from None
        try:
            optimizer.step()
        except Exception as error:
            raise InputError(
                f"optimizer '{name}' cannot be used: it needs more than gradients at a step "
                f"({type(error).__name__}: {error})"
            ) from None


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer averages the weights itself (The Road Less Scheduled, arXiv 2405.15682)."""
    return all("train_mode" in group for group in optimizer.param_groups)


@torch.no_grad()
def take_average(average: nn.Module, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy a schedule-free optimizer's averaged weights x of `module` into `average`.

    The module itself holds y = (1 - β1)·z + β1·x, at which gradients are taken (equation 4), and stays in this mode: to
    switch it to x and back, as the optimizer's own `eval` and `train` do, would round the weights twice a step.
    """
    sequences = dict(_sequences(optimizer))
    for held, parameter in zip(average.parameters(), module.parameters(), strict=True):
        held, value = local(held), local(parameter.detach())
        if parameter in sequences:
            z, beta = sequences[parameter]
            held.copy_(torch.lerp(value, z.to(value), 1 - 1 / beta))
        else:  # frozen, or without a gradient so far
            held.copy_(value)


def _sequences(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, tuple[Tensor, float]]]:
    """z and β1 of every parameter that has been updated."""
    for group in optimizer.param_groups:
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        for parameter in group["params"]:
            if "z" in optimizer.state.get(parameter, {}):
                yield parameter, (optimizer.state[parameter]["z"], beta)
