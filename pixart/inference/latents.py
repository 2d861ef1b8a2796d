"""From text states to scaled latents, with what this needs: null captions, sizes, pixels to images.

An image depends on its caption, its seed and the settings, never on its batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixart.arguments import say
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
from pixart.seeds import fit_seed

DECODED_PIXELS = 1 << 20  # decoded at a time; a 1024 px image takes 3 GB in fp32
ALPHA_LENGTH = 120  # caption length of PixArt-α, which distinguishes its models from PixArt-Σ's
RATIOS = min(SIZES_1024), max(SIZES_1024)  # range of height / width among the official sizes
MOST_PIXELS = 1 << 16  # maximum side of an image
Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Start:
    """Images from which sampling starts, or, with a mask, which it fills in."""

    latents: Tensor  # (B, C, h, w), clean and scaled
    strength: float  # in (0, 1]: the fraction of the steps that are done, starting from the noise level of the first
    mask: Tensor | None = None  # (B, 1, h, w), 1 where the image is redrawn, 0 where it is kept


def begin(
    start: Start, noise: Tensor, schedule: Schedule, config: SampleConfig, callback: Callback | None
) -> tuple[Tensor, list[float], Callback | None]:
    """x at the first time to be visited, the times, and a callback that restores what the mask keeps.

    Only the last int(steps · strength) times are visited. After every step, the kept latents are restored, with the
    same noise at the level of the next time; after the last step they are the clean ones. Strength 1 starts from pure
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
    """The times that a resolved config's sampler visits when it starts from an image: the last int(steps · strength).

    Raises:
        InputError: as in `begin`.
    """
    if not SAMPLERS[config.sampler].midway:
        raise InputError(f"sampler '{config.sampler}' does one step from noise and cannot start from an image")
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
        null: the null caption as `encode_null` returns it; None means the model's own; a list of text states (as for
            `captions`) is a negative prompt for each image, which replaces the null caption and has its own mask.
        height, width: of the latents.
        conditions: further inputs of a network variant, (B, …) each, the same in both branches of guidance.
        start: the images to start from, in place of noise.

    Returns:
        scaled latents (B, C, height, width), fp32.
    """
    if len(captions) != len(seeds):
        raise InputError(f"got {len(captions)} captions and {len(seeds)} seeds, expected the same number")
    schedule = make_schedule(card.diffusion)
    config = resolve(config, schedule)
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    micro = {k: v.expand(len(seeds), *v.shape) for k, v in _micro_conditions(card, height, width, device).items()}
    given = {**micro, **{name: value.to(device) for name, value in (conditions or {}).items()}}

    def denoiser(context: CaptionContext):
        def network(x: Tensor, t: Tensor) -> Tensor:  # with guidance, x holds twice as many images
            times = len(x) // len(seeds)
            return model(x.to(dtype), t, context, **{k: torch.cat([v] * times) for k, v in given.items()})

        return make_denoise(network, schedule, card.diffusion)

    # every block's keys and values of the captions are computed here, once for all steps
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
    generators = [torch.Generator().manual_seed(fit_seed(seed)) for seed in seeds]
    noise = draw_noise(generators, (card.model.in_channels, height, width), device)
    if start is None:
        return sample(denoise, noise, schedule, config, generators, callback)
    x, times, callback = begin(start, noise, schedule, config, callback)
    return sample(denoise, x, schedule, config, generators, callback, times=times)


class NonFinite(InputError):
    """A drawn image with NaN or infinite values, which would be stored as black."""


def check_finite(values: Tensor, names: Sequence[str], dtype: torch.dtype, what: str) -> None:
    """Refuse drawn latents or pixels (B, …) that are not finite; waits for the device.

    Args:
        names: of the images, for the message.
        dtype: in which they were computed.

    Raises:
        NonFinite: names the first of them.
    """
    finite = torch.isfinite(values).flatten(1).all(1).tolist()
    if all(finite):
        return
    short = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        cure = "float16 holds values up to 65504; use bfloat16 or float32"
    else:
        cure = f"{short} has the range it needs, so look at the model's weights, or lower guidance"
    count = f"{finite.count(False)} of {len(finite)} images have" if len(finite) > 1 else "the image has"
    raise NonFinite(f"{count} {what} that are not finite in {short}, {names[finite.index(False)]}: {cure}")


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) → pixels (B, 3, H, W), a few images at a time."""
    few = max(DECODED_PIXELS // (latents[0, 0].numel() * autoencoder.downsample**2), 1)
    return torch.cat([autoencoder.decode(part) for part in latents.split(few)])


def _with_null(
    model: PixArt, card: ModelCard, captions: Sequence[Tensor], null: Tensor | Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Captions, followed by what they are guided away from → tokens (2B, L, C) and mask (2B, L), as in `_pad`."""
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    if isinstance(null, (list, tuple)):
        if len(null) != len(captions):
            raise InputError(f"got {len(captions)} captions and {len(null)} negative ones, expected the same number")
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
    """Captions (L_i, C) → tokens (B, L, C) and mask (B, L), or None if there is no padding, since attention without a
    mask has faster kernels."""
    for i, caption in enumerate(captions):
        if not len(caption):
            raise InputError(f"caption {i} has no tokens")
    lengths = torch.tensor([len(caption) for caption in captions])
    tokens = torch.nn.utils.rnn.pad_sequence([caption.to(device, dtype) for caption in captions], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]  # on the CPU, so that nothing waits for a device
    return tokens, None if mask.all() else mask.to(device)


def _micro_conditions(card: ModelCard, height: int, width: int, device) -> dict[str, Tensor]:
    if not card.model.micro_conditions:
        return {}
    pixels = card.vae.downsample
    size = torch.tensor([height * pixels, width * pixels], dtype=torch.float32, device=device)
    return {"size": size, "aspect_ratio": size[0] / size[1]}


def with_null_mode(card: ModelCard, mode: str | None) -> ModelCard:
    """The card with another kind of null caption, if one is given."""
    if mode not in (None, "buffer", "empty", "empty_own_mask"):
        raise InputError(f"null: got {say(mode)}, expected buffer, empty or empty_own_mask")
    return card if mode is None else replace(card, text=replace(card.text, null=mode))


# ---------------------------------------------------------------------------------------------------- sizes, pixels


def official_sizes(card: ModelCard) -> list[Bucket]:
    """The sizes in which the authors sample from a model of this native size: 33 for PixArt-α, 40 for PixArt-Σ."""
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
    """The size to generate and the size to return, in pixels, as `Pipeline.__call__` describes them."""
    if sizes not in ("exact", "official"):
        raise InputError(f"sizes: got {say(sizes)}, expected exact or official")
    if aspect_ratio is not None:
        if height is not None or width is not None:
            raise InputError("got aspect_ratio and height or width; give one or the other")
        if not RATIOS[0] <= aspect_ratio <= RATIOS[1]:
            low, high = RATIOS
            got = f"{aspect_ratio:.4g}" if abs(aspect_ratio) < 1e9 else say(aspect_ratio)
            raise InputError(f"aspect_ratio: got {got}, expected height / width from {low} to {high}")
        bucket = nearest_bucket(official_sizes(card), aspect_ratio, 1)
        return (bucket.height, bucket.width), (bucket.height, bucket.width)
    native = card.model.latent_size * card.vae.downsample
    wanted = (native if height is None else height, native if width is None else width)
    if max(wanted) > MOST_PIXELS:
        raise InputError(f"size {say(wanted[0])} × {say(wanted[1])} px: expected sides of at most {MOST_PIXELS}")
    if min(wanted) < 1:
        raise InputError(f"size {wanted[0]} × {wanted[1]} px: both sides must be positive")
    if sizes == "official":
        bucket = nearest_bucket(official_sizes(card), *wanted)
        return (bucket.height, bucket.width), wanted
    multiple = card.model.patch_size * card.vae.downsample
    if wanted[0] % multiple or wanted[1] % multiple:
        raise InputError(
            f"size {wanted[0]} × {wanted[1]} px: both sides must be multiples of {multiple}; "
            "or set sizes to 'official', which resizes and crops"
        )
    return wanted, wanted


def resize_and_crop(pixels: Tensor, size: Size) -> Tensor:
    """Pixels (B, 3, H, W) → (B, 3, *size): scaled to cover the size (bilinear, as by the authors), center-cropped."""
    height, width = pixels.shape[2:]
    if (height, width) == size:
        return pixels
    scale = max(size[0] / height, size[1] / width)
    covering = max(int(height * scale), size[0]), max(int(width * scale), size[1])
    pixels = F.interpolate(pixels, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return pixels[:, :, top : top + size[0], left : left + size[1]]


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] → 8-bit images."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in array]
