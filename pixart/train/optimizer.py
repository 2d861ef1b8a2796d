"""Which parameters are trained and how: freezing and groups by name patterns, optimizers by name, learning rates."""

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from pixart.errors import InputError
from pixart.train.config import OptimizerConfig
from pixart.train.more_optimizers import MORE, make_bitsandbytes, make_more, more_optimizers


def make_optimizer(named: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW for "adamw", else timm's optimizer of that name (bnb…: bitsandbytes'), else
    pytorch-optimizer's.

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

        known, more = timm.optim.list_optimizers(), more_optimizers()
        if config.name not in known and (config.name in more or (not more and config.name in MORE)):
            return make_more(config.name, parameters, config.lr, config.weight_decay, options)
        if config.name not in known:
            near = difflib.get_close_matches(config.name, [*known, *(more or MORE)], n=3)
            raise InputError(f"optimizer.name: there is no '{config.name}'; similar names: {', '.join(near) or 'none'}")
        if config.name.startswith("bnb"):
            return make_bitsandbytes(config.name, parameters, config.lr, config.weight_decay, options)
        return timm.optim.create_optimizer_v2(
            parameters, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **options
        )
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"optimizer '{config.name}' does not accept its options {options}: {error}") from None


def check_optimizer(config: OptimizerConfig) -> None:
    """Make the optimizer for one small matrix, so that a wrong one shows before any work. Raises InputError."""
    make_optimizer({"weight": nn.Parameter(torch.zeros(2, 2))}, replace(config, groups=()))


def group_parameters(named: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> list:
    """Parameters as an optimizer takes them: a list, or with `optimizer.groups` a list of groups. A parameter belongs
    to the first group with a pattern that matches its name; the last group holds those that no pattern matches."""
    if not config.groups:
        return list(named.values())
    left, groups = dict(named), []
    for i, group in enumerate(config.groups):
        found = match_names(named, group.names, f"optimizer.groups[{i}].names")
        mine = [left.pop(name) for name in list(left) if name in found]
        if not mine:
            raise InputError(
                f"optimizer.groups[{i}].names: every parameter that {list(group.names)} match is in an earlier group"
            )
        settings = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        groups.append({"params": mine, "lr_factor": group.lr_factor, **settings})
    return [*groups, {"params": list(left.values()), "lr_factor": 1.0}] if left else groups


def learning_rate(config: OptimizerConfig, step: int, steps: int, batch_size: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: a linear warm-up, then the schedule.

    `batch_size` is the global one; only `auto_lr` uses it.
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


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters that match any pattern from training; averages and checkpoints still hold them."""
    names = [name for name, _ in model.named_parameters()]
    frozen = match_names(names, patterns)
    if len(frozen) == len(names):
        raise InputError(f"train.freeze: {list(patterns)} match every parameter, so that nothing is left to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def match_names(names: Iterable[str], patterns: Sequence[str], setting: str = "train.freeze") -> set[str]:
    """The names that match a shell pattern: * matches any text, dots included, ? one character, [0-9] one in a range.

    Raises:
        InputError: a pattern matches nothing; `setting` is the setting that holds it.
    """
    names, frozen = list(names), set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise InputError(f"{setting}: '{pattern}' matches no parameter; similar names: {_near(pattern, names)}")
        frozen.update(found)
    return frozen


def _near(pattern: str, names: list[str]) -> str:
    # all blocks have the same names, so list them for one block only, the one that the pattern asks for
    number = next(iter(re.findall(r"\d+", pattern)), "0")
    shown = {re.sub(r"^blocks\.\d+", f"blocks.{number}", name): name for name in names}
    shown = {near: name for near, name in shown.items() if near in names} | {name: name for name in names}
    plain = pattern.replace("*", "")
    return ", ".join(difflib.get_close_matches(plain, list(shown), n=3, cutoff=0.0))
