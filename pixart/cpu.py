"""CPU optimisations outside of the layers: oneDNN's matrix product, and keeping freed memory.

The commands use both; programs that import pixart can do so, too. A third one, threads that wait passively, must be set
before torch is imported, which `pixart.commands` does.
"""

import ctypes
import gc
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from pixart.arguments import checked

# ------------------------------------------------------------------------------------------------ oneDNN's product

BOTH_LIBRARIES = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@checked
def use_onednn(model: nn.Module, on: bool = True) -> int:
    """Make a model's `nn.Linear` layers use oneDNN for fp32 matrix products, in place; `on=False` undoes this.

    On x86 torch uses MKL, which leaves a third of an AMD processor's speed unused. oneDNN, which comes with torch and
    computes its convolutions and bf16 products, does not. Its relative error is about twice as large (5.6e-7; MKL's is
    2.6e-7). Nothing changes on a GPU, for other dtypes, under autocast, in forward-mode derivatives or in compiled
    code, and names, tensors and state dicts stay the same. Only layers on a CPU whose class is exactly `nn.Linear` are
    changed, since a subclass, e.g. a quantised layer, has its own product.

    Returns:
        number of layers that were changed: 0 at a second call, or if torch lacks one of the two libraries.
    """
    before, after = (nn.Linear, _OneDnnLinear) if on else (_OneDnnLinear, nn.Linear)
    layers = [module for module in model.modules() if type(module) is before]
    if on:
        layers = [layer for layer in layers if BOTH_LIBRARIES and layer.weight.device.type == "cpu"]
    for layer in layers:
        layer.__class__ = after  # keeps its tensors, hooks and name, and all references to it
    return len(layers)


def uses_onednn(model: nn.Module) -> bool:
    """Whether `use_onednn` changed any of a model's layers."""
    return any(type(module) is _OneDnnLinear for module in model.modules())


class _OneDnnLinear(nn.Linear):
    """`nn.Linear` with oneDNN's product where torch would use MKL's."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_for_mkl(x, self.weight):
            return _Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def _is_for_mkl(x: Tensor, weight: Tensor) -> bool:
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # inductor chooses its own products, and forward-mode derivatives need torch's
    plain = not torch.compiler.is_compiling() and forward_ad._current_level < 0
    return BOTH_LIBRARIES and x.is_cpu and fp32 and plain


class _Product(torch.autograd.Function):
    """x (…, I) and weight (O, I) → x · weightᵀ + bias (…, O), by oneDNN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs: tuple, _output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _Product.apply(grad, weight.T, None) if need_x else None,
            _Product.apply(rows.T, x.flatten(0, -2).T, None) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


# --------------------------------------------------------------------------------------------- memory that is freed

# glibc returns large blocks to the system as soon as they are freed, and the system then has to zero every page again
# for the next allocation: on a CPU this took 13 to 23 % of the VAE's time, and up to a fifth of the network's with
# gradients
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # constants of mallopt(3)


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for its next allocations → whether this is supported (Linux with glibc).

    The peak memory stays the same, but the process does not shrink until `give_memory_back`. All commands call this;
    programs that import pixart can call it before they start working.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


def hold_only_what_is_used() -> bool:
    """Make this process return every large block as soon as it is freed → whether this is supported, as above.

    It is the opposite of `keep_freed_memory`, to measure what a computation needs: a heap also holds the gaps between
    blocks of different sizes, which took up to a sixth of a training step's memory.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_M_MMAP_THRESHOLD, 2**16))


def give_memory_back() -> None:
    """Return freed memory that this process has kept to the system."""
    gc.collect()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
