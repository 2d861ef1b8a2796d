"""An optimizer's state in files: rows of tensors under their parameters' names, one file per process that holds rows.

Any number of processes can read what any other number wrote: each reads the rows it needs from whichever file has them.
torch's own distributed checkpoint either stores its index as a pickle or stores tensors only; this format needs no
pickle and also holds values that are not tensors.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixart.errors import InputError
from pixart.train.distributed import like, local, rows

FILE = "optimizer-{:05d}-of-{:05d}.safetensors"


@dataclass
class Moments:
    """One process's part of the optimizer state."""

    tensors: dict[str, Tensor]  # "parameter/key" → rows
    first: dict[str, int]  # the index of the first of these rows
    record: dict  # groups and all values that are not tensors: small, and the same in all processes


def take_moments(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    copy: Callable[[str, Tensor], Tensor],
    *,
    main: bool,
) -> Moments:
    """Copy (by `copy`) what this process writes: its rows of sharded tensors, and in the `main` process all others."""
    state, names = optimizer.state_dict(), _order(optimizer, parameters)
    tensors, first, other = {}, {}, {}
    states = {index: _flat(values) for index, values in state["state"].items()}
    for index, values in states.items():
        for key, value in values.items():
            name = f"{names[index]}/{key}"
            if not isinstance(value, Tensor):
                other.setdefault(names[index], {})[key] = value
            elif isinstance(value, DTensor) and len(local(value)):
                tensors[name], first[name] = copy(name, local(value)), rows(value)[0]
            elif main and not isinstance(value, DTensor):
                tensors[name], first[name] = copy(name, value), 0
    # an optimizer may hold tensors in a group, as Prodigy does, and change them while the checkpoint is written
    groups = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        | {"params": [names[i] for i in group["params"]]}
        for group in state["param_groups"]
    ]
    keys = {names[index]: sorted(set(values)) for index, values in states.items()}
    return Moments(tensors, first, {"groups": groups, "keys": keys, "other": other})


def _flat(values: dict) -> dict:
    """A parameter's state without the dictionary into which bitsandbytes wraps the 8-bit part of it; it reads both
    forms. Left in it, tensors would not be copied before training goes on and changes them."""
    inner = [key for key, value in values.items() if isinstance(value, dict)]
    return {key: value for key, value in values.items() if key not in inner} | {
        key: value for name in inner for key, value in values[name].items()
    }


def write_moments(folder: Path, moments: Moments, index: int, count: int) -> Path:
    """Write file `index` (from 0) of `count`. Raises OSError if it cannot be written."""
    path = folder / FILE.format(index + 1, count)
    try:
        save_file(moments.tensors, path, metadata={"first_rows": json.dumps(moments.first)})
    except SafetensorError as error:  # the library's own type for an I/O error
        raise OSError(str(error)) from None
    return path


@torch.no_grad()
def read_moments(
    folder: Path, record: dict, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> None:
    """Load a checkpoint's state into an optimizer.

    Raises:
        InputError: a file is missing, or the state belongs to other parameters.
    """
    names, files = _order(optimizer, parameters), MomentFiles(folder)
    stored = [name for group in record["groups"] for name in group["params"]]
    if stored != names:
        odd = sorted(set(stored) ^ set(names)) or "the same ones in another order"
        raise InputError(f"{folder}: its optimizer has other parameters than this run's: {odd}")
    state, index = {}, {name: i for i, name in enumerate(names)}
    for name, keys in record["keys"].items():
        parameter, values = parameters[name], dict(record["other"].get(name, {}))
        for key in set(keys) - set(values):
            total = files.shape(f"{name}/{key}")
            if total == tuple(parameter.shape):
                values[key] = like(files.read(f"{name}/{key}", *rows(parameter)), parameter)
            else:
                values[key] = files.read(f"{name}/{key}", 0, total[0] if total else 0)
        state[index[name]] = values
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in record["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _order(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> list[str]:
    """The names of an optimizer's parameters, in its own order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


class MomentFiles:
    """The rows that the files of a folder hold together."""

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("optimizer-*.safetensors"))
        count = int(re.search(r"-of-(\d+)", paths[0].name)[1]) if paths else 1
        if [path.name for path in paths] != [FILE.format(i + 1, count) for i in range(count)]:
            raise InputError(f"{folder}: expected {count} optimizer files, found {len(paths)}")
        self.folder = folder
        self.pieces: dict[str, list[tuple[int, tuple[int, ...], Path]]] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                for name, first in json.loads(file.metadata()["first_rows"]).items():
                    shape = tuple(file.get_slice(name).get_shape())
                    self.pieces.setdefault(name, []).append((first, shape, path))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.pieces:
            raise InputError(f"{self.folder}: its optimizer files have no {name}")
        shapes = [shape for _, shape, _ in self.pieces[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, from all files that hold some; a scalar is read whole."""
        pieces = sorted(self.pieces[name], key=lambda piece: piece[0])
        if not pieces[0][1]:
            with safe_open(pieces[0][2], "pt") as file:
                return file.get_tensor(name)
        parts = []
        for first, shape, path in pieces:
            low, high = max(start - first, 0), min(stop - first, shape[0])
            if low < high:
                with safe_open(path, "pt") as file:
                    parts.append(file.get_slice(name)[low:high])
        if sum(map(len, parts)) != stop - start:
            raise InputError(f"{self.folder}: its optimizer files lack rows of {name}")
        return torch.cat(parts) if parts else torch.empty(0, *pieces[0][1][1:])
