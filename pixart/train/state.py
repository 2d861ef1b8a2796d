"""Everything that is needed to resume, as one record: taken from the state of a run, and loaded into one."""

import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from pixart.adapters.load import WEIGHTS as ADAPTED
from pixart.checkpoint.files import WEIGHTS, compare_shapes
from pixart.config import to_dict
from pixart.cpu import BOTH_LIBRARIES, uses_onednn
from pixart.diffusion.objective import Example
from pixart.errors import InputError
from pixart.provenance import revision, versions
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes, is_sharded, local, rows, whole
from pixart.train.optimizer_state import Moments, read_moments, take_moments
from pixart.train.parts import ADAPTER, MODEL, Parts, leaves_unused
from pixart.train.throughput import CallCounter

STATE = "training.pt"
KEPT = ".kept.safetensors"


@dataclass
class Progress:
    """Counters of a run. Each optimizer step takes one global batch, applied or not, so `step` is also the position in
    the data."""

    step: int = 0  # optimizer steps, applied or not; schedules, intervals and the data order count in these
    skipped: int = 0  # steps not applied, for any reason; known up to the last log or save
    skipped_in_row: int = 0  # of these, the latest consecutive ones: not finite, or above optimizer.skip_above
    spikes: int = 0  # steps skipped for a gradient norm above optimizer.skip_above
    images: int = 0
    seconds: float = 0.0  # of training, over all starts
    unreadable: dict[str, str] = field(default_factory=dict)  # id → reason, of images that could not be read
    # results of the steps that the checkpoint includes but metrics.jsonl does not yet, see `pixart.train.log.Watch`
    unlogged: dict = field(default_factory=dict)


@dataclass
class TrainState:
    """A run's state: everything that a checkpoint holds."""

    parts: Parts
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    processes: Processes
    progress: Progress = field(default_factory=Progress)
    base_weights: str | None = None  # mark of the network under an adapter
    base_fingerprint: str | None = None  # what adapters of earlier versions have in its place
    _wrapped: nn.Module | None = None

    def __post_init__(self):
        self.calls = CallCounter(self.parts.training, self.parts.network)

    def wrap(self, example: Example) -> nn.Module:
        """The training module as it is called: itself in one process or when sharded, else wrapped in torch's DDP. DDP
        must know whether a step leaves weights without a gradient, so it is made when the first example is known."""
        if self._wrapped is None:
            self._wrapped = self.parts.training
            if self.processes.count > 1 and not is_sharded(self.parts.network):
                before = _rng_state()
                with self.accelerator.autocast():
                    unused = any(self.processes.gather(leaves_unused(self.parts.training, example)))
                _restore_rng(before)  # a resumed run makes this call, too: dropout in the next step must not notice
                self.accelerator.ddp_handler.find_unused_parameters = unused
                with warnings.catch_warnings():  # torch 2.11 has no other name for this option
                    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                    self._wrapped = self.accelerator.prepare_model(self.parts.training)
        return self._wrapped


@dataclass
class Snapshot:
    """A copy of the state in CPU memory: what this process writes of a checkpoint."""

    step: int
    modules: dict[str, dict[str, Tensor]]  # by their place in the checkpoint; complete, in the main process only
    moments: Moments  # the optimizer state: this process's rows
    record: dict  # written by the main process
    weights: dict[str, list[str]]  # by place, the tensors that must be finite: the trained ones and their averages
    same: dict[str, str]  # places that hold the same as another one

    def not_finite(self) -> list[str]:
        """The weights and averages that contain an infinity or a NaN, which a good checkpoint must not."""
        return [
            f"{place}/{name}"
            for place, names in self.weights.items()
            for name in names
            if name in self.modules[place] and not torch.isfinite(self.modules[place][name]).all()
        ]


class Staging:
    """Buffers in CPU memory that are reused by the next save; pinned if there is a GPU, for fast copies."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Start copying a tensor. The copy is complete when `finish` returns, and valid until the next one of that
        name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    @staticmethod
    def finish() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@torch.no_grad()
def take_snapshot(state: TrainState, config: TrainConfig, staging: Staging) -> Snapshot:
    """Copy the state to the CPU; all processes call it. Sharded models are gathered one tensor at a time."""
    main = state.accelerator.is_main_process
    places = module_places(state.parts)
    modules: dict[str, dict[str, Tensor]] = {place: {} for place in places}
    for place, module in places.items():
        for name, tensor in module.state_dict().items():
            full = whole(tensor)
            if main:
                modules[place][name] = staging.copy(f"{place}/{name}", full)
    moments = take_moments(state.optimizer, dict(state.parts.named_parameters()), staging.copy, main=main)
    scaler = state.accelerator.scaler
    record = {
        "optimizer": moments.record,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "progress": {**vars(state.progress), "unreadable": dict(state.progress.unreadable)},
        "rng": state.processes.gather(_rng_state()),
        "config": to_dict(config),
        "processes": state.processes.count,
        "onednn": uses_onednn(state.parts.network),
        "versions": versions(),
        "revision": revision(),
    }
    weights = {
        place: [name for name, _ in module.named_parameters()]
        for place, module in places.items()
        if not place.endswith(KEPT)
    }
    staging.finish()
    return Snapshot(state.progress.step, modules, moments, record, weights, same_places(state.parts))


def module_places(parts: Parts) -> dict[str, nn.Module]:
    """Where in a checkpoint each module is stored: the network (or its adapter) and its average as folders that can be
    sampled from, the others as files. An average that shares the weights has no tensors to store, see `same_places`."""
    places: dict[str, nn.Module] = {}
    for name, module in parts.trained.items():
        place, average = _places(name)
        places[place] = module
        if name not in parts.shared:
            places[average] = parts.averages[name]
    return places | {f"parts/{name}{KEPT}": module for name, module in parts.kept.items()}


def same_places(parts: Parts) -> dict[str, str]:
    """The places of averages that share the weights → the places with their tensors."""
    return {average: place for place, average in map(_places, sorted(parts.shared))}


def _places(name: str) -> tuple[str, str]:
    """Where a trained module and its average are stored."""
    if name in (MODEL, ADAPTER):
        return "model", "ema"
    return f"parts/{name}.safetensors", f"parts/{name}.ema.safetensors"


def load_checkpoint(state: TrainState, checkpoint: Path) -> list[str]:
    """Load a checkpoint's weights, averages, optimizer, scaler, counters and random state into `state`, bit for bit.

    Each process reads its own rows, whatever the number of processes that wrote them.

    Returns:
        notes for the user, one per line.
    """
    for place, module in module_places(state.parts).items():
        path = checkpoint / place
        _load_weights(module, path if path.suffix else path / (WEIGHTS if MODEL in state.parts.trained else ADAPTED))
    try:
        record = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        read_moments(checkpoint, record["optimizer"], state.optimizer, dict(state.parts.named_parameters()))
        state.progress = Progress(**record["progress"])
        written_by = f"{record['processes']} × {record['config']['train']['parallel']}"
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint / STATE}: does not fit this run's optimizer ({error})") from None
    if state.accelerator.scaler is not None and record["scaler"] is not None:
        state.accelerator.scaler.load_state_dict(record["scaler"])
    # of every process; in earlier versions of the main one alone
    rng = record["rng"] if isinstance(record["rng"], list) else [record["rng"]]
    if state.processes.rank < len(rng):
        _restore_rng(rng[state.processes.rank])
    notes = []
    now = f"{state.processes.count} × {'fsdp' if is_sharded(state.parts.network) else 'ddp'}"
    if now != written_by:
        notes.append(f"written by {written_by}, resumed with {now}")
    products, onednn = ("torch's", "oneDNN's"), uses_onednn(state.parts.network)
    # checkpoints from before this was a setting: every CPU that could use oneDNN did
    before = record.get("onednn", BOTH_LIBRARIES and state.accelerator.device.type == "cpu")
    if onednn != before:
        notes.append(
            f"written with {products[before]} matrix product, resumed with {products[onednn]}: results are equal up to "
            "rounding, not bit for bit"
        )
    return notes


@torch.no_grad()
def _load_weights(module: nn.Module, path: Path) -> None:
    tensors = module.state_dict()
    if not path.is_file():
        raise InputError(f"{path} is missing: this run's objective has modules that the checkpoint does not have")
    with safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if difference := compare_shapes({name: tuple(t.shape) for name, t in tensors.items()}, found):
            raise InputError(f"{path} does not fit the model of its config; {difference}")
        for name, tensor in tensors.items():
            start, stop = rows(tensor)
            if start < stop:
                local(tensor).copy_(file.get_slice(name)[start:stop])


def _rng_state() -> dict:
    # samples' numbers are drawn from (seed, epoch, sample id); this state is for dropout and for the user's own code
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(internal), gauss],
        "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_rng(rng: dict) -> None:
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
