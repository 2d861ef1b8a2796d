"""Many processes: sharded models, what of a tensor is a process's own, and what they tell each other.

Weights, averages and moments are cut along their first dimension, process r of n holding rows r·⌈R/n⌉ to
(r+1)·⌈R/n⌉ of R. Gradients travel by accelerate's group (NCCL on GPUs); words between hosts by gloo groups of their
own, so that talking never waits for a device.
"""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pixart.cpu import use_onednn, uses_onednn
from pixart.errors import InputError, LostProcess
from pixart.model.pixart import PixArt

# optimizers that treat every number for itself, and so are right on a part of a matrix; Muon or Adafactor are not
ELEMENTWISE = ("adamw", "adam", "sgd", "momentum", "nadamw", "lion", "radam", "rmsprop")


class Processes:
    """The processes of a job, as this one sees them."""

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.control, self.saving = None, None  # the groups of the training thread and of the one that saves
        if self.count > 1:
            self.control, self.saving = (
                dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2)
            )

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list:
        """Every process's `value`, on all of them."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value, group=group or self.control)
        return values


class Agreement:
    """Flags that any process raises and all see after the same step.

    Their maximum travels by gloo on the CPU and a step late: it is posted before one step and read before the next. So
    no device is waited for, the network has a whole step's time, and yet everybody knows the same at the same place.
    """

    def __init__(self, processes: Processes):
        self.group = processes.control
        self._posted: tuple[dist.Work, Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Post this process's flags; what all of them posted at the call before (alone: at this one)."""
        if self.group is None:
            return flags
        values, before = torch.tensor(flags, dtype=torch.int32), self._posted
        self._posted = (dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True), values)
        return self._read(before) if before is not None else (False,) * len(flags)

    def drain(self) -> tuple[bool, ...]:
        """What was posted last, so that nothing is under way; all processes call it at the same place."""
        before, self._posted = self._posted, None
        return self._read(before) if before is not None else ()

    @staticmethod
    def _read(posted: tuple[dist.Work, Tensor]) -> tuple[bool, ...]:
        posted[0].wait()
        return tuple(posted[1].bool().tolist())


# what torch, gloo and NCCL say when another process is gone; DistNetworkError is of the store, which process 0 holds
_ENDED = (
    r"Connection (closed|reset|refused)|likely closed|Broken pipe|got 0 bytes|ncclRemoteError|remote process"
    r"|communicator was aborted"
)


def lost_process(error: RuntimeError, timeout: float) -> LostProcess | None:
    """What an error of torch.distributed means if it came from another process that ended or hangs."""
    text = " ".join(str(error).split())
    known = isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|Connection (closed|reset)|Broken pipe", text)
    if known and re.search(r"[Tt]imed ?out|[Tt]imeout", text):
        what = f"another process did not answer for {timeout:g} s (train.timeout): it is stuck or slow"
    elif known and re.search(_ENDED, text):
        what = "another process of this job has ended; what it said above, or its log, tells why"
    else:  # of this process itself, as a GPU that is taken or out of memory: told as it is
        return None
    return LostProcess(f"{what} ({text[:300]})")


# ------------------------------------------------------------------------------------------------ sharded models


def world_of_one(device: torch.device) -> None:
    """A process group for a run of one process that nobody launched; sharding needs one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shard(module: nn.Module, device: torch.device, *, trained: bool = True) -> None:
    """Shard a module in place over all processes, every PixArt in it block by block (FSDP2).

    A block's weights are gathered where it runs, in fp32, and autocast sees to the rest, as without sharding: gathered
    in bf16, the tables of adaLN would make the whole residual stream bf16, and the output errs three times as much.
    """
    world_of_one(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in module.modules():
        if isinstance(part, PixArt) and not isinstance(part, FSDPModule):
            for block in part.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    # a module that is never trained has no backward pass that would take its outer layers apart again
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trained else True)


def check_sharded(optimizer: str, mixed_precision: str) -> None:
    """Raises InputError for what is not right on sharded weights."""
    if optimizer not in ELEMENTWISE:
        raise InputError(
            f"train.parallel fsdp cuts matrices into rows, which optimizer '{optimizer}' needs whole; take one of "
            f"{', '.join(ELEMENTWISE)}, or train.parallel ddp"
        )
    if mixed_precision == "fp16":
        raise InputError("train.parallel fsdp takes mixed_precision bf16 or no, not fp16")


def is_sharded(module: nn.Module) -> bool:
    return isinstance(next(module.parameters()), DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together again; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 row of a tensor that this process holds."""
    total = len(tensor)
    if not isinstance(tensor, DTensor):
        return 0, total
    size = -(-total // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * size, total)
    return start, start + len(tensor.to_local())


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """`part` as this process's part of something sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part.to(tensor.device), tensor.device_mesh, tensor.placements, run_check=False,
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def whole_model(model: PixArt, *, main: bool) -> PixArt | None:
    """The model put together again in the main process, None in others; all processes call it."""
    if not is_sharded(model):
        return model if main else None
    tensors = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if main:
            tensors[name] = full
    if not main:
        return None
    with torch.device("meta"):
        copy = PixArt(model.config)
    copy.load_state_dict(tensors, assign=True)
    if uses_onednn(model):
        use_onednn(copy)
    return copy.eval().requires_grad_(False)


def gradient_sync(network: nn.Module, sync: bool) -> AbstractContextManager:
    """The context of one micro-step: gradients are reduced over the processes in the last one alone."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(sync)
        network.set_is_last_backward(sync)
    elif isinstance(network, DistributedDataParallel) and not sync:
        return network.no_sync()
    return nullcontext()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients down to a global norm of `limit` at most → their norm before, on the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [local(gradient) for gradient in gradients]
    norm = nn.utils.get_total_norm(parts)
    if isinstance(gradients[0], DTensor):
        squared = norm**2
        dist.all_reduce(squared)
        norm = squared.sqrt()
    torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
