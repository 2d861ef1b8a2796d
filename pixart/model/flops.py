"""FLOPs of a PixArt, counted by torch on the meta device: matrix products and convolutions, two FLOPs a multiply-add.

So a variant brings no formula. Not counted, as by torch: biases, norms, activations, softmax, modulation, residuals,
positions; about 1 % of an XL/2. Blocks of one kind are counted once.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from pixart.errors import InputError
from pixart.model.pixart import PixArt, PixArtConfig

Shapes = Mapping[str, tuple[int, ...]]  # of further conditions, without the batch


class Count(NamedTuple):
    """FLOPs of one image."""

    total: int
    blocks: int  # of them, those of the blocks


_MODELS: dict[str, PixArt] = {}  # on the meta device, by their configurations
_COUNTS: dict[tuple, Count] = {}


def forward_flops(
    config: PixArtConfig, height: int, width: int, caption_tokens: int, batch: int = 1, conditions: Shapes | None = None
) -> int:
    """FLOPs of one `PixArt.forward` on latents of height × width and captions padded to `caption_tokens`.

    Padding is counted: it is computed. A caption that went through `encode_caption` before saves its part. `conditions`
    are the shapes of what else the network is given, as what routes tokens, without their batch.

    Raises:
        InputError: a side is not a positive multiple of the patch size.
    """
    return batch * _count(config, height, width, caption_tokens, conditions or {}).total


def training_flops(
    config: PixArtConfig, height: int, width: int, caption_tokens: int, batch: int = 1,
    conditions: Shapes | None = None, *, checkpointing: bool = False,
) -> int:  # fmt: skip
    """FLOPs of a forward and backward: three forwards, as every product's gradient is two products of its size.

    With `checkpointing` the blocks' second forward is added: the work done, where without it is the work that the model
    needs, which is what "model FLOPs utilisation" divides by the peak (arXiv 2204.02311, appendix B). Gradients of the
    network's inputs, which nobody computes, are counted too: 0.13 % of α-256, less of larger ones.
    """
    count = _count(config, height, width, caption_tokens, conditions or {})
    return batch * (3 * count.total + checkpointing * count.blocks)


def _count(config: PixArtConfig, height: int, width: int, length: int, conditions: Shapes) -> Count:
    patch = config.patch_size
    if height < patch or width < patch or height % patch or width % patch:
        raise InputError(f"latent size {height} × {width}: expected positive multiples of the patch size {patch}")
    key = repr(config), height, width, length, tuple(sorted(conditions.items()))
    if key not in _COUNTS:
        _COUNTS[key] = _run(_model(config), height, width, length, conditions)
    return _COUNTS[key]


def _model(config: PixArtConfig) -> PixArt:
    key = repr(config)
    if key not in _MODELS:
        with torch.device("meta"):
            _MODELS[key] = PixArt(config).requires_grad_(False)
    return _MODELS[key]


def _run(model: PixArt, height: int, width: int, length: int, conditions: Shapes) -> Count:
    """A forward of one image in which a block whose kind is known only adds what that kind took."""
    config, known, skipped, blocks = model.config, {}, 0, 0

    def counted(block: nn.Module, forward):
        def call(x: Tensor, *arguments):
            nonlocal skipped, blocks
            shapes = [a.shape if isinstance(a, Tensor) else str(a) for a in (x, *arguments)]
            kind = str((_kind(block), shapes))
            if kind in known:
                skipped, blocks = skipped + known[kind], blocks + known[kind]
                return x
            before = counter.get_total_flops()
            x = forward(x, *arguments)
            known[kind] = counter.get_total_flops() - before
            blocks += known[kind]
            return x

        return call

    with torch.device("meta"), ExitStack() as stack:
        stack.enter_context(_disable_current_modes())  # who counts around this call does not count it
        given = {name: torch.empty(1, *shape) for name, shape in conditions.items()}
        if config.micro_conditions:
            given |= {"size": torch.empty(1, 2), "aspect_ratio": torch.empty(1)}
        for block in model.blocks:
            stack.callback(setattr, block, "forward", block.forward)
            block.forward = counted(block, block.forward)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # whose products are those of attention, and no more
        counter = stack.enter_context(FlopCounterMode(display=False))
        model(
            torch.empty(1, config.in_channels, height, width), torch.empty(1),
            torch.empty(1, length, config.caption_channels), torch.ones(1, length, dtype=torch.bool), **given,
        )  # fmt: skip
        return Count(counter.get_total_flops() + skipped, blocks)


def _kind(block: nn.Module) -> str:
    """What tells kinds of blocks apart: their modules with all plain settings, and the shapes of their weights."""
    plain = (int, float, str, tuple, type(None))
    parts = [
        (name, type(part).__name__, [(k, v) for k, v in vars(part).items() if isinstance(v, plain) and k != "forward"])
        for name, part in block.named_modules()
    ]
    return str((parts, [(name, tuple(p.shape)) for name, p in block.named_parameters()]))
