"""A linear layer that is at the processor's limit in fp32, too.

torch multiplies fp32 matrices on x86 with MKL, which leaves a third of an AMD processor unused; oneDNN, which comes
with torch and already serves its convolutions and bf16, does not. Nothing changes on a GPU, in other dtypes or under
autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        fp32 = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if x.is_cpu and fp32 and BOTH_LIBRARIES:
            return _Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
