"""FLOPs of a PixArt: matrix products and convolutions, two FLOPs per multiply-add.

Counted by torch's FlopCounterMode on the meta device, so that network variants need no formula. Not counted: biases,
norms, activations, softmax, modulation, residuals and positions, about 1 % of an XL/2. Identical blocks are run once.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from pixart.errors import InputError
from pixart.model.pixart import PixArt, PixArtConfig

Shapes = Mapping[str, tuple[int, ...]]  # shapes of further conditions, without the batch dimension


class Count(NamedTuple):
    """FLOPs of one image."""

    total: int
    blocks: int  # the part of `total` spent in blocks
    parts: Mapping[str, int]  # the same total by the kinds of `PARTS`


# kinds of modules and parameters: name within the network or within a block → kind
PARTS = {
    "attn": "self-attention",
    "cross_attn": "cross-attention",
    "mlp": "MLP",
    "x_embedder": "patch embedding",
    "pos_embed": "patch embedding",
    "y_embedder": "caption projection",
    "final_layer": "final layer",
}
# the time and size embeddings, and what turns them into shifts, scales, gates and tokens
CONDITIONING = "conditioning"


def part_of(name: str) -> str:
    """The kind of a module or parameter of a PixArt, by its name: a value of `PARTS`, or `CONDITIONING`."""
    words = name.split(".")
    return PARTS.get(words[2] if words[0] == "blocks" and len(words) > 2 else words[0], CONDITIONING)


_MODELS: dict[str, PixArt] = {}  # models on the meta device, by the repr of their config
_COUNTS: dict[tuple, Count] = {}


def forward_flops(
    config: PixArtConfig, height: int, width: int, caption_tokens: int, batch: int = 1, conditions: Shapes | None = None
) -> int:
    """FLOPs of one `PixArt.forward` on latents of height × width and captions padded to `caption_tokens`.

    Padding counts, because it is computed. With captions already encoded by `encode_caption`, forward does less than
    this. `conditions` gives the shapes, without the batch dimension, of further inputs such as those of token routing.

    Raises:
        InputError: a side is not a positive multiple of the patch size.
    """
    return batch * _count(config, height, width, caption_tokens, conditions or {}).total


def flops_by_part(
    config: PixArtConfig, height: int, width: int, caption_tokens: int, conditions: Shapes | None = None
) -> dict[str, int]:
    """`forward_flops` of one image by the kinds of `PARTS`."""
    return dict(_count(config, height, width, caption_tokens, conditions or {}).parts)


def training_flops(
    config: PixArtConfig,
    height: int,
    width: int,
    caption_tokens: int,
    batch: int = 1,
    conditions: Shapes | None = None,
    *,
    checkpointing: bool = False,
) -> int:
    """FLOPs of a forward and backward pass: three times the forward, since the gradient of a product is two products.

    `checkpointing` adds the recomputed forward of the blocks (hardware FLOPs); without it these are the model FLOPs of
    "model FLOPs utilisation" (arXiv 2204.02311, appendix B). Gradients of the network's inputs are included although
    they are not computed: 0.13 % for α-256, less for larger models. Raises InputError as `forward_flops`.
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


class _Ledger:
    """FLOPs by kind: what a module computes is of its kind, except what a module inside it accounts for."""

    def __init__(self, counter: FlopCounterMode, stack: ExitStack):
        self.counter, self.stack = counter, stack
        self.parts: Counter[str] = Counter()
        self.skipped = 0  # of blocks that were not run, and already in `parts`
        self.blocks = 0

    def counts(self, module: nn.Module, method: str, kind: str) -> None:
        """Account for the calls of a method."""
        call = getattr(module, method)

        def counted(*arguments):
            before = self.unaccounted
            result = call(*arguments)
            self.parts[kind] += self.unaccounted - before
            return result

        self._replace(module, method, counted)

    def runs_once(self, block: nn.Module, known: dict[str, Counter[str]]) -> None:
        """Skip the block if one like it has been run, and account for the same again."""
        forward = block.forward

        def counted(x: Tensor, *arguments):
            shapes = [a.shape if isinstance(a, Tensor) else str(a) for a in (x, *arguments)]
            kind = str((_kind(block), shapes))
            if kind in known:
                self.parts.update(known[kind])
                self.skipped += known[kind].total()
            else:
                before, unaccounted = self.parts.copy(), self.unaccounted
                x = forward(x, *arguments)
                self.parts[CONDITIONING] += self.unaccounted - unaccounted
                known[kind] = self.parts - before
            self.blocks += known[kind].total()
            return x

        self._replace(block, "forward", counted)

    @property
    def total(self) -> int:
        return self.counter.get_total_flops() + self.skipped

    @property
    def unaccounted(self) -> int:
        return self.total - self.parts.total()

    def _replace(self, module: nn.Module, method: str, call: Callable) -> None:
        setattr(module, method, call)
        self.stack.callback(delattr, module, method)


def _run(model: PixArt, height: int, width: int, length: int, conditions: Shapes) -> Count:
    """Run a forward of one image; a block identical to an earlier one is skipped and its FLOPs are added."""
    config, known = model.config, {}
    with torch.device("meta"), ExitStack() as stack:
        stack.enter_context(_disable_current_modes())  # hides this from a FLOP counter around the call
        given = {name: torch.empty(1, *shape) for name, shape in conditions.items()}
        if config.micro_conditions:
            given |= {"size": torch.empty(1, 2), "aspect_ratio": torch.empty(1)}
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # exactly attention's two products
        ledger = _Ledger(stack.enter_context(FlopCounterMode(display=False)), stack)
        for name, module in model.named_children():
            if name != "blocks":
                ledger.counts(module, "forward", part_of(name))
        for block in model.blocks:
            for name, module in block.named_children():
                ledger.counts(module, "forward", part_of(f"blocks.0.{name}"))
            ledger.counts(block, "encode_caption", PARTS["cross_attn"])
            ledger.runs_once(block, known)
        x, t = torch.empty(1, config.in_channels, height, width), torch.empty(1)
        caption, mask = torch.empty(1, length, config.caption_channels), torch.ones(1, length, dtype=torch.bool)
        model(x, t, caption, mask, **given)
        return Count(ledger.total, ledger.blocks, ledger.parts)


def _kind(block: nn.Module) -> str:
    """Identifies equal blocks: their modules with all plain attributes, and the shapes of their weights."""
    plain = (int, float, str, tuple, type(None))
    parts = [
        (name, type(part).__name__, [(k, v) for k, v in vars(part).items() if isinstance(v, plain) and k != "forward"])
        for name, part in block.named_modules()
    ]
    return str((parts, [(name, tuple(p.shape)) for name, p in block.named_parameters()]))
