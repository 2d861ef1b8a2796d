"""Cases of attention alone, at the network's shapes: the kernels that a device has for them, and the cost of a mask."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixart.benchmark.measure import Call, Case, Settings
from pixart.benchmark.networks import PIXELS
from pixart.model import PixArtConfig

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
WIDER = 128  # a head width that kernels are optimised for; XL/2's is 72


def attention_case(settings: Settings) -> Case:
    """One block's self-attention: with torch's choice of kernel, with each kernel, and with heads padded to `WIDER`."""
    config, tokens = PixArtConfig.from_preset(settings.preset), _tokens(settings)
    q, k, v = (_random(settings, config, tokens) for _ in range(3))

    def padded() -> Tensor:
        width = q.shape[-1]
        wide = (F.pad(z, (0, WIDER - width)) for z in (q, k, v))
        return F.scaled_dot_product_attention(*wide, scale=width**-0.5)[..., :width]

    programs = _by_kernel(settings, lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v), None)
    if q.shape[-1] < WIDER:
        programs[f"heads of {WIDER}"] = _call(padded)
    return Case("attention", programs, images=settings.images, note=f"{tokens} tokens, heads of {q.shape[-1]}")


def cross_case(settings: Settings) -> Case:
    """One block's cross-attention to a batch of captions of different lengths.

    Ours attends, with a mask, to captions padded to the longest of the batch. The others: padded to the model's
    maximum; all captions as long as the longest, without a mask; no padding, image by image or as nested tensors.
    """
    config, tokens = PixArtConfig.from_preset(settings.preset), _tokens(settings)
    lengths = torch.linspace(settings.tokens / 8, settings.tokens, settings.images).long().clamp(min=1)
    longest, most = int(lengths.max()), max(config.caption_length, settings.tokens)
    mask = (torch.arange(most) < lengths[:, None])[:, None, None].to(settings.device)
    q, k, v = (_random(settings, config, count) for count in (tokens, most, most))
    short = [z[:, :, :longest].contiguous() for z in (k, v)]
    cut = mask[..., :longest].contiguous()

    programs = _by_kernel(settings, lambda: F.scaled_dot_product_attention(q, *short, attn_mask=cut), (q, *short), cut)
    programs[f"padded to {most}"] = _call(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    programs["no mask"] = _call(lambda: F.scaled_dot_product_attention(q, *short))
    programs["one by one"] = _call(lambda: _one_by_one(q, k, v, lengths.tolist()))
    if settings.cuda or "nested" in settings.programs:
        programs["nested"] = lambda: _nested(q, k, v, lengths.tolist())
    note = f"{tokens} tokens, captions of {int(lengths.min())} to {longest}, heads of {q.shape[-1]}"
    return Case("cross", programs, images=settings.images, note=note, same_work={"nested": "one by one"})


def _by_kernel(
    settings: Settings, attend: Call, inputs: tuple[Tensor, ...], mask: Tensor | None
) -> dict[str, Callable[[], Call]]:
    """`attend` with torch's choice of kernel, and on CUDA with each kernel that supports these inputs."""
    programs = {"ours": _call(attend)}
    if not settings.cuda:
        return programs
    asked = torch.backends.cuda.SDPAParams(*inputs, mask, 0.0, False, False)
    able = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
        "math": lambda _: True,
    }
    for name, kernel in KERNELS.items():
        if able[name](asked):
            programs[name] = _call(sdpa_kernel(kernel)(attend))
    return programs


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    rows = enumerate(counts)
    each = (F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n]) for i, n in rows)
    return torch.cat(list(each))


def _nested(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Call:
    def jagged(z: Tensor, counts: list[int]) -> Tensor:  # (B, H, N, E) → nested (B, H, n_i, E)
        rows = [row[:, :count].transpose(0, 1).contiguous() for row, count in zip(z, counts, strict=True)]
        return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)

    queries, keys, values = jagged(q, [q.shape[2]] * len(q)), jagged(k, counts), jagged(v, counts)
    attend = _call(lambda: F.scaled_dot_product_attention(queries, keys, values))()
    return lambda: attend().transpose(1, 2).values()


def _call(attend: Call) -> Callable[[], Call]:
    return lambda: torch.no_grad()(attend)


def _tokens(settings: Settings) -> int:
    side = PIXELS * PixArtConfig.from_preset(settings.preset).patch_size
    return settings.height // side * (settings.width // side)


def _random(settings: Settings, config: PixArtConfig, tokens: int) -> Tensor:
    """Random (B, H, tokens, E), in the memory layout of a linear layer's output."""
    shape = (settings.images, tokens, config.num_heads, config.hidden_size // config.num_heads)
    return torch.randn(shape, device=settings.device, dtype=settings.torch_dtype).transpose(1, 2)
