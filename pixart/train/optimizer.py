"""Optimizers by name and learning rates in closed form."""

import difflib
import math
from collections.abc import Mapping

import torch

from pixart.errors import InputError
from pixart.train.config import OptimizerConfig
from pixart.train.freeze import match_names


def make_optimizer(named: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW for "adamw", else the optimizer of timm that has this name.

    Raises:
        InputError: there is no such optimizer, it does not take an option, or a group's pattern matches nothing.
    """
    parameters = group_parameters(named, config)
    options: dict = dict(config.options)
    for name in ("betas", "eps"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    try:
        if config.name == "adamw":
            options.setdefault("fused", True)
            return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, **options)
        import timm.optim

        known = timm.optim.list_optimizers()
        if config.name not in known:
            near = difflib.get_close_matches(config.name, known, n=3)
            raise InputError(f"optimizer.name: there is no '{config.name}'; near it are {', '.join(near) or 'none'}")
        return timm.optim.create_optimizer_v2(
            parameters, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **options
        )
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"optimizer '{config.name}' refuses its options {options}: {error}") from None


def group_parameters(named: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> list:
    """Parameters as an optimizer takes them: a list, or with `optimizer.groups` a list of groups, the last of those
    that no pattern matches. A parameter belongs to the first group whose patterns match its name."""
    if not config.groups:
        return list(named.values())
    left, groups = dict(named), []
    for i, group in enumerate(config.groups):
        found = match_names(named, group.names, f"optimizer.groups[{i}].names")
        mine = [left.pop(name) for name in list(left) if name in found]
        if not mine:
            raise InputError(f"optimizer.groups[{i}].names: groups before it have all that {list(group.names)} match")
        settings = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        groups.append({"params": mine, "lr_factor": group.lr_factor, **settings})
    return [*groups, {"params": list(left.values()), "lr_factor": 1.0}] if left else groups


def learning_rate(config: OptimizerConfig, step: int, steps: int, batch_size: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: a linear warm-up, then the schedule.

    `batch_size` is the global one, which `auto_lr` asks for.
    """
    base = config.lr * math.sqrt(batch_size / 256) if config.auto_lr == "sqrt" else config.lr
    if step < config.warmup:
        return base * (step + 1) / config.warmup
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "linear":
        factor = 1 - (1 - config.final_lr) * done
    else:
        factor = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2
    return base * factor
