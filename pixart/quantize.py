"""Frozen linear layers in 8 or 4 bits, and bitsandbytes, an extra that has the 4 bits and 8-bit optimizers.

A weight is dequantised for each product, forward and backward, as in QLoRA (arXiv 2305.14314): activations keep their
precision, and nothing larger than one layer's weight exists for longer than its product. bitsandbytes' own layers would
also do, but they change their bias and their packed weight at a call, and a network shares both with its average.
"""

import importlib
import logging
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pixart.errors import InputError, missing_extra

QUANTIZED = ("int8", "nf4")
BLOCK = 64  # numbers with a scale of their own in NF4


def load_bitsandbytes(purpose: str) -> ModuleType:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses a kernel not used here
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise missing_extra("bitsandbytes", "quantize", purpose) from None


def check_quantized(kind: str, setting: str) -> None:
    """Refuse a kind of `QUANTIZED` that this machine cannot compute; `setting` is what asks for it.

    Raises:
        InputError: bitsandbytes is not installed, or it cannot do without CUDA.
    """
    if kind == "int8":
        return
    bitsandbytes = load_bitsandbytes(f"{setting} {kind}")
    if torch.cuda.is_available():
        return
    try:
        QuantizedLinear(nn.Linear(64, 64), kind)(torch.ones(1, 64))
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:  # of versions for CUDA only
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{setting} {kind} needs CUDA: bitsandbytes {bitsandbytes.__version__} cannot do it on a CPU ({reason})"
        ) from None


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is frozen and quantised: "int8" with a scale for each row, or "nf4" in blocks of 64.

    Its tensors are buffers, and `weight` is computed.
    """

    def __init__(self, layer: nn.Linear, kind: str):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.register_parameter("bias", layer.bias)
        values, scales = _quantize(layer.weight.detach().float(), kind)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in fp32, as it acts."""
        return _dequantize(self.values, self.scales, self._shape, torch.float32)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, self.values, self.scales, bias, self._shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """x · weightᵀ + bias; keeps the quantised weight, which is there anyway, for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(values, scales)
        ctx.shape = shape
        return F.linear(x, _dequantize(values, scales, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad @ _dequantize(*ctx.saved_tensors, ctx.shape, grad.dtype), None, None, None, None


def quantized_weights(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names and sizes of the weights that are no parameters since they are quantised."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear):
            yield f"{name}.weight", layer.in_features * layer.out_features


def _quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A weight (O, I) → its quantised values and their scales."""
    if kind == "int8":
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.round(weight / scales[:, None]).to(torch.int8), scales
    if isinstance(weight, FakeTensor):  # an estimate needs no bitsandbytes
        count = weight.numel()
        return weight.new_empty(-(-count // 2), 1, dtype=torch.uint8), weight.new_empty(-(-count // BLOCK))
    functional = load_bitsandbytes(kind).functional
    values, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return values, state.absmax


def _dequantize(values: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (O, I)."""
    if values.dtype == torch.int8:
        return (values * scales[:, None]).to(dtype)  # the product is in fp32: fp16 has no numbers as small as scales
    if isinstance(values, FakeTensor):
        return values.new_empty(shape, dtype=dtype)
    # as one long row: bitsandbytes' kernel for a CPU (0.50) takes the wrong scales if rows are no multiple of a block
    row = (1, shape[0] * shape[1])
    return torch.ops.bitsandbytes.dequantize_4bit(values, scales, BLOCK, "nf4", row, dtype).view(shape)
