"""From prompts to pictures. A picture depends on its prompt, its seed and the settings, never on its batch."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pixart.checkpoint.files import ModelCard, load_model
from pixart.diffusion import guide, make_denoise, make_schedule
from pixart.diffusion.samplers import draw_noise
from pixart.diffusion.sampling import SampleConfig, resolve, sample
from pixart.errors import InputError
from pixart.grid import contact_sheet
from pixart.model.autoencoder import Autoencoder, load_autoencoder
from pixart.model.pixart import PixArt
from pixart.model.text import TextEncoder


@torch.no_grad()
def sample_latents(
    model: PixArt,
    card: ModelCard,
    captions: Sequence[Tensor],
    null: Tensor | None,
    seeds: Sequence[int],
    config: SampleConfig,
    *,
    height: int,
    width: int,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample one picture per caption and seed.

    Args:
        captions: text states (L_i, caption_channels) of the real tokens.
        null: the null caption as `encode_null` gives it; None means the model's own.
        height, width: of the latents.

    Returns:
        scaled latents (B, C, height, width), fp32.
    """
    if len(captions) != len(seeds):
        raise InputError(f"got {len(captions)} captions and {len(seeds)} seeds, expected as many")
    for i, caption in enumerate(captions):
        if not len(caption):
            raise InputError(f"caption {i} has no token")
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    schedule = make_schedule(card.diffusion)
    micro = _micro_conditions(card, height, width, device)

    tokens, mask = _pad(captions, device, dtype)
    null = model.y_embedder.y_embedding if null is None else null.to(device, dtype)
    if card.text.null == "empty_own_mask":
        all_tokens, all_masks = _pad([*captions, *[null] * len(captions)], device, dtype)
    else:
        if len(null) < tokens.shape[1]:
            raise InputError(f"a caption has {tokens.shape[1]} tokens, the null caption only {len(null)}")
        all_tokens = torch.cat([tokens, null[: tokens.shape[1]].expand_as(tokens)])
        all_masks = torch.cat([mask, mask])

    def network(caption, caption_mask):
        context = model.encode_caption(caption, caption_mask)
        return make_denoise(
            lambda x, t: model(x.to(dtype), t, context, **{k: v.expand(len(x), *v.shape) for k, v in micro.items()}),
            schedule,
            card.diffusion,
        )

    denoise = guide(
        network(tokens, mask),
        network(all_tokens, all_masks),
        schedule,
        config.guidance,
        interval=(config.guidance_low, config.guidance_high),
        rescale=config.rescale,
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = draw_noise(generators, (card.model.in_channels, height, width), device)
    return sample(denoise, x, schedule, config, generators, callback)


def _pad(captions: Sequence[Tensor], device, dtype) -> tuple[Tensor, Tensor]:
    """Captions (L_i, C) → tokens (B, L, C) and mask (B, L)."""
    lengths = torch.tensor([len(caption) for caption in captions])
    tokens = torch.nn.utils.rnn.pad_sequence([caption.to(device, dtype) for caption in captions], batch_first=True)
    return tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)


def _micro_conditions(card: ModelCard, height: int, width: int, device) -> dict[str, Tensor]:
    if not card.model.micro_conditions:
        return {}
    pixels = card.vae.downsample
    size = torch.tensor([height * pixels, width * pixels], dtype=torch.float32, device=device)
    return {"size": size, "aspect_ratio": size[0] / size[1]}


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] → 8-bit pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


class Pipeline:
    """A model with its text encoder and autoencoder: prompts in, pictures out."""

    def __init__(self, model: PixArt, card: ModelCard, autoencoder: Autoencoder, text: TextEncoder | None):
        self.model, self.card, self.autoencoder, self.text = model, card, autoencoder, text

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, ema: bool = True, dtype: torch.dtype = torch.float32, device="cpu"
    ) -> "Pipeline":
        """Load a model folder, or a run's newest good checkpoint, with the encoder and autoencoder its card names."""
        model, card = load_model(source, ema=ema, dtype=dtype, device=device)
        text = TextEncoder.load(card.text, dtype=dtype, device=device)
        return cls(model, card, load_autoencoder(card.vae, dtype=dtype, device=device), text)

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: SampleConfig | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        truncate: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """One picture per prompt and seed, in order.

        Args:
            config: the model's recommendation by default.
            height, width: in pixels; the model's native size if not given.
            truncate: cut prompts that are longer than the model's text length, rather than refuse them.
            progress: called with the number of pictures just done.
        """
        config = config or self.card.sample
        native = self.card.model.latent_size * self.autoencoder.downsample
        height, width = height or native, width or native
        multiple = self.card.model.patch_size * self.autoencoder.downsample
        if height % multiple or width % multiple:
            raise InputError(f"size {height} × {width} px: both sides must be multiples of {multiple}")
        resolve(config, make_schedule(self.card.diffusion))  # refuse before the text encoder's work
        captions, null = self.encode(prompts, truncate=truncate)
        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            latents = sample_latents(
                self.model, self.card, captions[part], null, seeds[part], config,
                height=height // self.autoencoder.downsample, width=width // self.autoencoder.downsample,
            )  # fmt: skip
            images += to_images(self.autoencoder.decode(latents))
            if progress is not None:
                progress(len(latents))
        return images

    def encode(self, prompts: Sequence[str], *, truncate: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Prompts → text states of their real tokens, and the null caption if it is not the model's own."""
        if self.text is None:
            raise InputError("this pipeline has no text encoder")
        states, mask = self.text.encode(prompts, truncate=truncate)
        captions = [row[:length] for row, length in zip(states, mask.sum(1).tolist(), strict=True)]
        return captions, encode_null(self.text)


def encode_null(text: TextEncoder) -> Tensor | None:
    """The null caption of a model (L, C), as its card's `text.null` says.

    "buffer": None, it is the model's own; "empty": the empty text padded to the model's length, to be taken under the
    prompt's mask; "empty_own_mask": the empty text's real tokens.
    """
    if text.config.null == "buffer":
        return None
    states, mask = text.encode([""], padding="max_length")
    return states[0] if text.config.null == "empty" else states[0][mask[0].bool()]


def save_samples(
    pipeline: Pipeline,
    prompts: Sequence[str],
    folder: str | Path,
    config: SampleConfig | None = None,
    *,
    seed: int = 0,
    count: int = 1,
    **options,
) -> list[Path]:
    """Draw `count` pictures of each prompt, with seeds from `seed` on, into PNGs and a contact sheet in `folder`.

    A PNG's text chunks hold prompt, seed, sampler, steps and guidance. `options` are those of `Pipeline.__call__`.
    """
    config = config or pipeline.card.sample
    if count < 1 or not prompts:
        raise InputError(f"got {len(prompts)} prompts and count {count}, expected at least one of each")
    name, steps = resolve(config, make_schedule(pipeline.card.diffusion))
    jobs = [(prompt, seed + i) for prompt in prompts for i in range(count)]
    images = pipeline([prompt for prompt, _ in jobs], [number for _, number in jobs], config, **options)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, ((prompt, number), image) in enumerate(zip(jobs, images, strict=True)):
        info = PngInfo()
        for key, value in {"prompt": prompt, "seed": number, "sampler": name, "steps": steps,
                           "guidance": config.guidance}.items():  # fmt: skip
            info.add_itxt(key, str(value))
        words = re.sub(r"[^\w]+", "-", prompt).strip("-")[:40]
        paths.append(folder / f"{i:03d}_{words}_seed{number}.png")
        image.save(paths[-1], pnginfo=info)
    contact_sheet([[image] for image in images], [prompt for prompt, _ in jobs]).save(folder / "contact_sheet.png")
    return paths
