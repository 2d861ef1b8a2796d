"""Several processes: sharded models, each process's part of a tensor, and messages between processes.

Weights, averages and optimizer state are sharded along their first dimension: process r of n holds rows r·⌈R/n⌉ to
(r+1)·⌈R/n⌉ of R. Gradients are reduced in accelerate's process group (NCCL on GPUs). Control messages use gloo groups
of their own, so that they never wait for a device.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

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

T = TypeVar("T")
# optimizers that update each number independently, and so can work on a part of a matrix; Muon and Adafactor cannot
ELEMENTWISE = ("adamw", "adam", "sgd", "momentum", "nadamw", "lion", "radam", "rmsprop")


class Processes:
    """The processes of a job, as this one sees them."""

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.control, self.saving = None, None  # groups of the training thread and the saving thread
        if self.count > 1:
            self.control, self.saving = (
                dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2)
            )

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list:
        """The `value` of every process, in all of them."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def from_main(self, find: Callable[[], T]) -> T:
        """What `find` returns in the main process, in all of them.

        Raises:
            InputError: in all processes, if `find` raised it in the main one.
        """
        found = problem = None
        if self.rank == 0:
            try:
                found = find()
            except InputError as error:
                problem = str(error)
        found, problem = self.gather((found, problem))[0]
        if problem is not None:
            raise InputError(problem)
        return found


class Agreement:
    """Flags that any process can raise and that all processes see after the same step.

    The flags are reduced (by maximum) over gloo on the CPU, one step late: posted before one step and read before the
    next. So nothing waits for a device, the reduction has a whole step's time, and all processes still act on the same
    flags at the same step.
    """

    def __init__(self, processes: Processes):
        self.group = processes.control
        self._posted: tuple[dist.Work, Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Post this process's flags → the maximum of what all posted at the previous call (of one process: these)."""
        if self.group is None:
            return flags
        values, before = torch.tensor(flags, dtype=torch.int32), self._posted
        self._posted = (dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True), values)
        return self._read(before) if before is not None else (False,) * len(flags)

    def drain(self) -> tuple[bool, ...]:
        """Read what was posted last, so that no reduction is pending; all processes call it at the same point."""
        before, self._posted = self._posted, None
        return self._read(before) if before is not None else ()

    @staticmethod
    def _read(posted: tuple[dist.Work, Tensor]) -> tuple[bool, ...]:
        posted[0].wait()
        return tuple(posted[1].bool().tolist())


# messages of torch, gloo and NCCL when another process is gone; the store, which process 0 holds, adds DistNetworkError
_ENDED = (
    r"Connection (closed|reset|refused)|likely closed|Broken pipe|got 0 bytes|ncclRemoteError|remote process"
    r"|communicator was aborted"
)


def lost_process(error: RuntimeError, timeout: float) -> LostProcess | None:
    """A clear error in place of one of torch.distributed that comes from another process having ended or hung."""
    text = " ".join(str(error).split())
    known = isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|Connection (closed|reset)|Broken pipe", text)
    if known and re.search(r"[Tt]imed ?out|[Tt]imeout", text):
        what = f"another process did not respond for {timeout:g} s (train.timeout): it is stuck or slow"
    elif known and re.search(_ENDED, text):
        what = "another process of this job has ended; its output above or its log says why"
    else:  # an error of this process itself, e.g. a GPU in use or out of memory: left as it is
        return None
    return LostProcess(f"{what} ({text[:300]})")


# ------------------------------------------------------------------------------------------------ sharded models


def world_of_one(device: torch.device) -> None:
    """A process group for a run of one process without a launcher, since sharding needs a group."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shard(module: nn.Module, device: torch.device, *, trained: bool = True) -> None:
    """Shard a module in place over all processes, each PixArt in it block by block (FSDP2).

    A block's weights are gathered in fp32 when it runs, and autocast chooses the precision, as without sharding. If
    they were gathered in bf16, the adaLN tables would make the whole residual stream bf16, and the output's error would
    be three times as large.
    """
    world_of_one(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in module.modules():
        if isinstance(part, PixArt) and not isinstance(part, FSDPModule):
            for block in part.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    # a module that is never trained has no backward pass after which FSDP would reshard its outer layers
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trained else True)


def check_sharded(optimizer: str | None, mixed_precision: str) -> None:
    """Raises InputError for an optimizer (None: of weights that are not sharded) or a precision that does not work with
    sharded weights."""
    if optimizer is not None and optimizer not in ELEMENTWISE:
        raise InputError(
            f"train.parallel fsdp shards matrices by rows, but optimizer '{optimizer}' needs whole matrices; use "
            f"one of {', '.join(ELEMENTWISE)}, or train.parallel ddp"
        )
    if mixed_precision == "fp16":
        raise InputError("train.parallel fsdp works with mixed_precision bf16 or no, not fp16")


def is_sharded(module: nn.Module) -> bool:
    return isinstance(next(module.parameters()), DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all processes; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 of the rows of a tensor that this process holds."""
    total = len(tensor)
    if not isinstance(tensor, DTensor):
        return 0, total
    size = -(-total // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * size, total)
    return start, start + len(tensor.to_local())


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """`part` as this process's part of a tensor sharded like `tensor`."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def whole_model(model: PixArt, *, main: bool) -> PixArt | None:
    """The full model in the main process, None in others; all processes call it."""
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
    """The context of one micro-step: gradients are reduced over the processes only in the last one."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(sync)
        network.set_is_last_backward(sync)
    elif isinstance(network, DistributedDataParallel) and not sync:
        return network.no_sync()
    return nullcontext()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are whole in every process, beside a sharded network: all in one
    reduction. A process that did not use a parameter adds zeros."""
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not whole or dist.get_world_size() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(whole, flat.split([p.numel() for p in whole]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit` → the norm before, on the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [local(gradient) for gradient in gradients]
    norm = nn.utils.get_total_norm(parts)
    if isinstance(gradients[0], DTensor):
        squared = norm**2
        dist.all_reduce(squared)
        norm = squared.sqrt()
    torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
