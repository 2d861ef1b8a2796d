"""A linear layer that is at the processor's limit in fp32, too.

torch multiplies fp32 matrices on x86 with MKL, which leaves a third of an AMD processor unused; oneDNN, which comes
with torch and already serves its convolutions and bf16, does not. Nothing changes on a GPU, in other dtypes, under
autocast or where torch compiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

BOTH_LIBRARIES = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


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


class Linear(nn.Linear):
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
