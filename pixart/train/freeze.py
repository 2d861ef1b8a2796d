"""Parameters that a run leaves as they are, by patterns of their names."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn

from pixart.errors import InputError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters that match any pattern out of training; averages and checkpoints keep them."""
    names = [name for name, _ in model.named_parameters()]
    frozen = match_names(names, patterns)
    if len(frozen) == len(names):
        raise InputError(f"train.freeze: {list(patterns)} match every parameter: nothing is left to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def match_names(names: Iterable[str], patterns: Sequence[str], setting: str = "train.freeze") -> set[str]:
    """The names that match a shell pattern: * is any text, dots included, ? a character, [0-9] one of a range.

    Raises:
        InputError: a pattern matches nothing; `setting` is where it stands.
    """
    names, frozen = list(names), set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise InputError(f"{setting}: '{pattern}' matches no parameter; near it are {_near(pattern, names)}")
        frozen.update(found)
    return frozen


def _near(pattern: str, names: list[str]) -> str:
    # a block's names stand once, whichever block is asked for
    number = next(iter(re.findall(r"\d+", pattern)), "0")
    shown = {re.sub(r"^blocks\.\d+", f"blocks.{number}", name): name for name in names}
    shown = {near: name for near, name in shown.items() if near in names} | {name: name for name in names}
    plain = pattern.replace("*", "")
    return ", ".join(difflib.get_close_matches(plain, list(shown), n=3, cutoff=0.0))
