"""From text states to scaled latents, and what stands around that: null captions, sizes, pixels to pictures.

A picture depends on its caption, its seed and the settings, never on its batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixart.checkpoint import ModelCard
from pixart.data.buckets import SAMPLING_RATIOS_ALPHA, SIZES_1024, Bucket, bucket_table, nearest_bucket
from pixart.diffusion import guide, make_denoise, make_schedule
from pixart.diffusion.samplers import Callback, draw_noise
from pixart.diffusion.sampling import SAMPLERS, SampleConfig, resolve, sample, visited_times
from pixart.diffusion.schedule import Schedule
from pixart.diffusion.timesteps import last_steps
from pixart.encoders.autoencoder import Autoencoder
from pixart.errors import InputError
from pixart.model import PixArt
from pixart.model.pixart import CaptionContext

DECODED_PIXELS = 1 << 20  # at a time: a decoder takes 3 GB for a picture of 1024 px in fp32
ALPHA_LENGTH = 120  # tokens of PixArt-α's captions, which tell its models from Σ's
RATIOS = min(SIZES_1024), max(SIZES_1024)  # height / width, of the official sizes
Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Start:
    """Images that sampling modifies, or, with a mask, fills in."""

    latents: Tensor  # (B, C, h, w), clean and scaled
    strength: float  # in (0, 1]: the share of the steps that are done, from as much noise
    mask: Tensor | None = None  # (B, 1, h, w), 1 where the image is drawn anew, 0 where it is kept


def begin(
    start: Start, noise: Tensor, schedule: Schedule, config: SampleConfig, callback: Callback | None
) -> tuple[Tensor, list[float], Callback | None]:
    """x at the first time that is done, the times, and a callback that keeps what the mask keeps.

    The last int(steps · strength) times are done. Kept latents are put back after every step, with the noise of the
    next time, always the same one; after the last step they are the clean ones. Strength 1 begins with nothing but
    noise.

    Raises:
        InputError: the sampler cannot start midway, or the strength leaves no step.
    """
    times = start_times(config, schedule, start.strength)
    clean = start.latents.to(noise)

    def noised(t: float) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        return alpha * clean + sigma * noise

    x = noise if start.strength == 1 else noised(times[0])
    if start.mask is None:
        return x, times, callback
    mask = start.mask.to(noise)

    def keep(step: int, x: Tensor, x0: Tensor) -> Tensor:
        x = torch.lerp(noised(times[step + 1]) if step + 1 < len(times) else clean, x, mask)
        changed = None if callback is None else callback(step, x, x0)
        return x if changed is None else changed

    return x, times, keep


def start_times(config: SampleConfig, schedule: Schedule, strength: float) -> list[float]:
    """The times that a resolved config's sampler visits from an image: the last int(steps · strength) of all.

    Raises:
        InputError: as `begin`.
    """
    if not SAMPLERS[config.sampler].midway:
        raise InputError(f"sampler '{config.sampler}' is for one step from noise and cannot start from an image")
    return last_steps(visited_times(config, schedule), strength)


@torch.no_grad()
def sample_latents(
    model: PixArt,
    card: ModelCard,
    captions: Sequence[Tensor],
    null: Tensor | Sequence[Tensor] | None,
    seeds: Sequence[int],
    config: SampleConfig,
    *,
    height: int,
    width: int,
    callback: Callback | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    start: Start | None = None,
) -> Tensor:
    """Sample one image per caption and seed.

    Args:
        captions: text states (L_i, caption_channels) of the real tokens.
        null: the null caption as `encode_null` gives it; None means the model's own; a list (of such as `captions`)
            is one negative prompt for each, in the null caption's place under its own mask.
        height, width: of the latents.
        conditions: what a variant of the network takes besides, (B, …) each, the same under guidance's both branches.
        start: the images to start from, in place of noise.

    Returns:
        scaled latents (B, C, height, width), fp32.
    """
    if len(captions) != len(seeds):
        raise InputError(f"got {len(captions)} captions and {len(seeds)} seeds, expected as many")
    schedule = make_schedule(card.diffusion)
    config = resolve(config, schedule)
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    micro = {k: v.expand(len(seeds), *v.shape) for k, v in _micro_conditions(card, height, width, device).items()}
    given = {**micro, **{name: value.to(device) for name, value in (conditions or {}).items()}}

    def denoiser(context: CaptionContext):
        def network(x: Tensor, t: Tensor) -> Tensor:  # twice as many images under guidance
            times = len(x) // len(seeds)
            return model(x.to(dtype), t, context, **{k: torch.cat([v] * times) for k, v in given.items()})

        return make_denoise(network, schedule, card.diffusion)

    # every block's keys and values are made here, once; a step only reads them
    if config.guidance == 1:
        denoise = denoiser(model.encode_caption(*_pad(captions, device, dtype)))
    else:
        both = model.encode_caption(*_with_null(model, card, captions, null))
        denoise = guide(
            denoiser(both.first(len(captions))),
            None,
            schedule,
            config.guidance,
            together=denoiser(both),
            interval=(config.guidance_low, config.guidance_high),
            rescale=config.rescale,
        )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = draw_noise(generators, (card.model.in_channels, height, width), device)
    if start is None:
        return sample(denoise, noise, schedule, config, generators, callback)
    x, times, callback = begin(start, noise, schedule, config, callback)
    return sample(denoise, x, schedule, config, generators, callback, times=times)


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) → pixels (B, 3, H, W), a few pictures at a time."""
    few = max(DECODED_PIXELS // (latents[0, 0].numel() * autoencoder.downsample**2), 1)
    return torch.cat([autoencoder.decode(part) for part in latents.split(few)])


def _with_null(
    model: PixArt, card: ModelCard, captions: Sequence[Tensor], null: Tensor | Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Captions, then what they are guided away from → tokens (2B, L, C) and mask (2B, L), as `_pad`."""
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    if isinstance(null, (list, tuple)):
        if len(null) != len(captions):
            raise InputError(f"got {len(captions)} captions and {len(null)} negative ones, expected as many")
        return _pad([*captions, *null], device, dtype)
    null = model.y_embedder.y_embedding if null is None else null.to(device, dtype)
    if card.text.null == "empty_own_mask":
        return _pad([*captions, *[null] * len(captions)], device, dtype)
    tokens, mask = _pad(captions, device, dtype)
    if len(null) < tokens.shape[1]:
        raise InputError(f"a caption has {tokens.shape[1]} tokens, the null caption only {len(null)}")
    tokens = torch.cat([tokens, null[: tokens.shape[1]].expand_as(tokens)])
    return tokens, None if mask is None else torch.cat([mask, mask])


def _pad(captions: Sequence[Tensor], device, dtype) -> tuple[Tensor, Tensor | None]:
    """Captions (L_i, C) → tokens (B, L, C) and mask (B, L), None where nothing is padding: attention without a mask
    has the faster kernels."""
    for i, caption in enumerate(captions):
        if not len(caption):
            raise InputError(f"caption {i} has no token")
    lengths = torch.tensor([len(caption) for caption in captions])
    tokens = torch.nn.utils.rnn.pad_sequence([caption.to(device, dtype) for caption in captions], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]  # looked at on the CPU: no device waits
    return tokens, None if mask.all() else mask.to(device)


def _micro_conditions(card: ModelCard, height: int, width: int, device) -> dict[str, Tensor]:
    if not card.model.micro_conditions:
        return {}
    pixels = card.vae.downsample
    size = torch.tensor([height * pixels, width * pixels], dtype=torch.float32, device=device)
    return {"size": size, "aspect_ratio": size[0] / size[1]}


def with_null_mode(card: ModelCard, mode: str | None) -> ModelCard:
    """A card with another way to make the null caption, if one is given."""
    if mode not in (None, "buffer", "empty", "empty_own_mask"):
        raise InputError(f"null: got '{mode}', expected buffer, empty or empty_own_mask")
    return card if mode is None else replace(card, text=replace(card.text, null=mode))


# ---------------------------------------------------------------------------------------------------- sizes, pixels


def official_sizes(card: ModelCard) -> list[Bucket]:
    """The sizes that the authors sample a model of this native size from; α's are 33, Σ's 40."""
    pixels = card.vae.downsample
    table = bucket_table(card.model.latent_size * pixels, card.model.patch_size * pixels)
    if card.model.caption_length == ALPHA_LENGTH:
        return [bucket for bucket in table if bucket.ratio in SAMPLING_RATIOS_ALPHA]
    return table


def choose_size(
    card: ModelCard,
    *,
    height: int | None = None,
    width: int | None = None,
    aspect_ratio: float | None = None,
    sizes: Literal["exact", "official"] = "exact",
) -> tuple[Size, Size]:
    """The size to generate in and the size to hand out, in pixels; as `Pipeline.__call__` describes them."""
    if sizes not in ("exact", "official"):
        raise InputError(f"sizes: got '{sizes}', expected exact or official")
    if aspect_ratio is not None:
        if height is not None or width is not None:
            raise InputError("aspect_ratio and height or width: give one or the other")
        if not RATIOS[0] <= aspect_ratio <= RATIOS[1]:
            low, high = RATIOS
            raise InputError(f"aspect_ratio: got {aspect_ratio:.4g}, expected height / width from {low} to {high}")
        bucket = nearest_bucket(official_sizes(card), aspect_ratio, 1)
        return (bucket.height, bucket.width), (bucket.height, bucket.width)
    native = card.model.latent_size * card.vae.downsample
    wanted = (native if height is None else height, native if width is None else width)
    if min(wanted) < 1:
        raise InputError(f"size {wanted[0]} × {wanted[1]} px: both sides must be positive")
    if sizes == "official":
        bucket = nearest_bucket(official_sizes(card), *wanted)
        return (bucket.height, bucket.width), wanted
    multiple = card.model.patch_size * card.vae.downsample
    if wanted[0] % multiple or wanted[1] % multiple:
        raise InputError(
            f"size {wanted[0]} × {wanted[1]} px: both sides must be multiples of {multiple}; "
            "or ask for sizes 'official', which resizes and crops"
        )
    return wanted, wanted


def resize_and_crop(pixels: Tensor, size: Size) -> Tensor:
    """Pixels (B, 3, H, W) → (B, 3, *size): scaled to cover it, bilinear as the authors do, and cut at the centre."""
    height, width = pixels.shape[2:]
    if (height, width) == size:
        return pixels
    scale = max(size[0] / height, size[1] / width)
    covering = max(int(height * scale), size[0]), max(int(width * scale), size[1])
    pixels = F.interpolate(pixels, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return pixels[:, :, top : top + size[0], left : left + size[1]]


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] → 8-bit pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]
