"""What makes a CPU fast and is no part of any layer: oneDNN's matrix product, and freed memory that is kept.

Commands ask for both; a program that imports pixart may, too. The third of its kind, threads that wait passively, must
be asked for before torch is loaded: `pixart.commands` does so.
"""

import ctypes
import gc
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# ------------------------------------------------------------------------------------------------ oneDNN's product

BOTH_LIBRARIES = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def use_onednn(model: nn.Module, on: bool = True) -> int:
    """Multiply the fp32 matrices of a model's `nn.Linear` layers by oneDNN, in place; with `on=False` by torch again.

    On x86 torch takes MKL, which leaves a third of an AMD processor unused; oneDNN, which comes with torch and serves
    its convolutions and bf16, does not. Its product errs twice as much (5.6e-7 of its size, MKL's 2.6e-7). Nothing
    changes on a GPU, in other dtypes, under autocast, in forward-mode derivatives or where torch compiles, nor in
    names, tensors and state dicts. Layers on a CPU whose class is `nn.Linear` itself are taken: a subclass, as a
    quantised layer's, has a product of its own.

    Returns:
        number of layers that changed: 0 the second time, and where torch lacks one of the two libraries.
    """
    before, after = (nn.Linear, _OneDnnLinear) if on else (_OneDnnLinear, nn.Linear)
    layers = [module for module in model.modules() if type(module) is before]
    if on:
        layers = [layer for layer in layers if BOTH_LIBRARIES and layer.weight.device.type == "cpu"]
    for layer in layers:
        layer.__class__ = after  # its tensors, hooks and name stay; nothing that holds the layer has to know
    return len(layers)


def uses_onednn(model: nn.Module) -> bool:
    """Whether `use_onednn` took any of a model's layers."""
    return any(type(module) is _OneDnnLinear for module in model.modules())


class _OneDnnLinear(nn.Linear):
    """`nn.Linear`, with oneDNN's product where torch would take MKL's."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_for_mkl(x, self.weight):
            return _Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def _is_for_mkl(x: Tensor, weight: Tensor) -> bool:
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # inductor chooses products of its own, and forward-mode derivatives need torch's
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

# glibc gives large blocks back to the system as soon as they are freed, and the system hands each out again page by
# page, zeroed: on a CPU that was 13 to 23 % of the VAE's time, and up to a fifth of the network's with its gradients
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Have this process keep for its next allocations what it frees, from now on. → whether it will: Linux with glibc.

    The peak stays what it was, but the process does not shrink below it until `give_memory_back`. Commands all ask
    for this; a program that imports pixart may, before its work.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


def give_memory_back() -> None:
    """Return all that is freed to the system, where this process keeps it."""
    gc.collect()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
