"""FLOPs of a PixArt from its config: matrix products and convolutions, two FLOPs a multiply-add.

These are the operations that torch's `FlopCounterMode` counts, and the counts are equal to its own. Not counted, here
as there: biases, norms, activations, softmax, modulation, residuals, positions; about 1 % of an XL/2.

Letters: B batch, N image tokens, M compressed image tokens (keys and values), L caption tokens, D width.
"""

from pixart.errors import InputError
from pixart.model.embed import FREQUENCIES
from pixart.model.pixart import PixArtConfig


def forward_flops(config: PixArtConfig, height: int, width: int, caption_tokens: int, batch: int = 1) -> int:
    """FLOPs of one `PixArt.forward` on latents of height × width and captions padded to `caption_tokens`.

    Padding is counted: it is computed. A caption that went through `encode_caption` before saves its part.

    Raises:
        InputError: a side is not a positive multiple of the patch size.
    """
    return _around_blocks(config, height, width, caption_tokens, batch) + _blocks(
        config, height, width, caption_tokens, batch
    )


def training_flops(
    config: PixArtConfig, height: int, width: int, caption_tokens: int, batch: int = 1, *, checkpointing: bool = False
) -> int:
    """FLOPs of a forward and backward: three forwards, as every product's gradient is two products of its size.

    With `checkpointing` the blocks' second forward is added: the work done, where without it is the work that the model
    needs, which is what "model FLOPs utilisation" divides by the peak (arXiv 2204.02311, appendix B). Gradients of the
    network's inputs, which nobody computes, are counted too: 0.13 % of α-256, less of larger ones.
    """
    flops = 3 * forward_flops(config, height, width, caption_tokens, batch)
    return flops + checkpointing * _blocks(config, height, width, caption_tokens, batch)


def _around_blocks(config: PixArtConfig, height: int, width: int, length: int, batch: int) -> int:
    dim, patch = config.hidden_size, config.patch_size
    tokens = _tokens(config, height, width)
    total = _product(tokens, config.in_channels * patch**2, dim)  # patches
    total += _number_embedder(dim) + _product(1, dim, 6 * dim)  # time, and t_block
    if config.micro_conditions:
        total += 3 * _number_embedder(dim // 3)  # height, width, aspect ratio
    total += _product(length, config.caption_channels, dim) + _product(length, dim, dim)  # caption
    total += _product(tokens, dim, config.out_channels * patch**2)  # final layer
    return batch * total


def _blocks(config: PixArtConfig, height: int, width: int, length: int, batch: int) -> int:
    dim, ratio = config.hidden_size, config.kv_ratio
    tokens, hidden = _tokens(config, height, width), int(config.hidden_size * config.mlp_ratio)
    rows, columns = height // config.patch_size, width // config.patch_size
    total = 0
    for i in range(config.depth):
        keys = tokens
        if i in config.kv_blocks and config.kv_compression == "conv":
            keys = (rows // ratio) * (columns // ratio)
            total += 2 * _product(keys, ratio**2, dim)  # a depthwise convolution of keys and of values
        elif i in config.kv_blocks:
            keys = -(-rows // ratio) * -(-columns // ratio)  # every ratio-th token, from the first
        total += _product(tokens, dim, 4 * dim) + _attention(tokens, keys, dim)
        total += _product(tokens, dim, 2 * dim) + _product(length, dim, 2 * dim) + _attention(tokens, length, dim)
        total += 2 * _product(tokens, dim, hidden)
    return batch * total


def _tokens(config: PixArtConfig, height: int, width: int) -> int:
    patch = config.patch_size
    if height < patch or width < patch or height % patch or width % patch:
        raise InputError(f"latent size {height} × {width}: expected positive multiples of the patch size {patch}")
    return (height // patch) * (width // patch)


def _product(rows: int, inner: int, columns: int) -> int:
    """A (rows, inner) matrix times an (inner, columns) one."""
    return 2 * rows * inner * columns


def _attention(queries: int, keys: int, dim: int) -> int:
    """Scores and their weighted sum of values, over all heads."""
    return 2 * _product(queries, dim, keys)


def _number_embedder(dim: int) -> int:
    return _product(1, FREQUENCIES, dim) + _product(1, dim, dim)
