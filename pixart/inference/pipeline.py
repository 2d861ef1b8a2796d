"""From prompts to images. An image depends on its prompt, its seed and the settings, never on its batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pixart.adapters.apply import Loras
from pixart.adapters.load import load_with_card
from pixart.adapters.lora_files import name_lora, read_lora
from pixart.arguments import checked, say
from pixart.checkpoint import ModelCard
from pixart.checkpoint.save import Format, export_model
from pixart.device import check_device
from pixart.diffusion import make_schedule
from pixart.diffusion.sampling import SampleConfig, resolve
from pixart.encoders.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from pixart.encoders.text import TextEncoder, encode_null
from pixart.errors import InputError
from pixart.inference.checks import MOST_IMAGES, check_counts, check_embeddings, negative_each, seed_each
from pixart.inference.latents import with_null_mode
from pixart.inference.parts import check_width, fetch_parts, loading_part
from pixart.inference.request import Drawn, ImageSource, Request, make_requests
from pixart.inference.results import Images, describe
from pixart.inference.start import count_steps
from pixart.inference.stream import StreamCallback, Studio
from pixart.model import PixArt

Embeddings = tuple[Tensor, Tensor]  # states (B, L, C) and mask (B, L), 1 = a token; what `TextEncoder.encode` returns
# indices of the images, the step just done (from 0), the latents after it, the clean latents that it predicted; if a
# tensor is returned, it replaces the latents
StepCallback = Callable[[range, int, Tensor, Tensor], Tensor | None]


class Pipeline:
    """A model with its text encoder and autoencoder: prompts in, images out."""

    def __init__(
        self,
        model: PixArt,
        card: ModelCard,
        autoencoder: Autoencoder,
        text: TextEncoder | None,
        *,
        offload_text: bool = False,
    ):
        self.model, self.card, self.autoencoder, self.text = model, card, autoencoder, text
        self.offload_text = offload_text
        self._nulls: dict[str, Tensor | None] = {}  # by mode; kept when the text encoder is freed
        self.loras = Loras(model)

    def __repr__(self) -> str:
        return describe(self)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.model.parameters()).device

    @checked
    def to(self, device: torch.device | str) -> "Pipeline":
        """Move network, autoencoder and text encoder, in place → itself. With `offload_text` the text encoder stays on
        the CPU.

        Raises:
            InputError: torch cannot use the device, or the text encoder is in 8 or 4 bits and cannot be moved; nothing
                has been moved then.
        """
        check_device(device)
        moving = self.text if self.text is not None and not self.offload_text else None
        if moving is not None:
            moving.check_movable()
        self.model.to(device)
        self.autoencoder.to(device)
        if moving is not None:
            moving.to(device)
        return self

    @checked
    def load_lora(self, source: str | Path, *, strength: float = 1.0, name: str | None = None) -> str:
        """Add an adapter of any tool to the network's weights; several add up. Calls cost nothing more.

        Args:
            source: LoRA, DoRA, LoHa or LoKr: a file, a folder of PEFT, diffusers or LyCORIS, or a run of ours.
            strength: factor of the change; 1 is as trained.
            name: for `unload_lora` and `set_strength`; by default the file's or folder's name.

        Returns:
            the name.

        Raises:
            InputError: it is no adapter of this network, or the name is taken.
        """
        path = Path(source)
        name = name or name_lora(path)
        self.loras.load(name, read_lora(path), strength)
        return name

    @checked
    def unload_lora(self, name: str | None = None) -> None:
        """Take out one adapter, by default all: the weights are what they were, bit for bit.

        Raises:
            InputError: none of that name is loaded.
        """
        self.loras.unload(name)

    @checked
    def set_strength(self, name: str, strength: float) -> None:
        """Change how strongly a loaded adapter acts; 0 is not at all.

        Raises:
            InputError: none of that name is loaded, or the strength is not finite.
        """
        self.loras.set_strength(name, strength)

    @checked
    def save_pretrained(self, folder: str | Path, *, format: Format = "ours") -> list[str]:
        """Write the model with all that sampling needs, completely or not at all; `from_pretrained(folder)` loads it.

        A text encoder and a VAE that exist only on this machine are copied; others are referred to by their Hub ids.

        Args:
            folder: a new folder, or a new .pth or .safetensors file with format "official".
            format: as in `pixart.export_model`; "diffusers-pipeline" is a folder that diffusers can load.

        Returns:
            lines that say what was done with a text encoder and VAE that exist only on this machine.

        Raises:
            InputError: the folder exists already, or the format cannot express the model.
            OSError: the disk is full or not writable.
        """
        return export_model(self.model, folder, format, card=self.card)

    @classmethod
    @checked
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        ema: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        overrides: dict[str, Any] | None = None,
        load_text: bool = True,
        quantize_text: Literal["8bit", "4bit"] | None = None,
        offload_text: bool = False,
        save_memory: bool = False,
        compile: bool = False,
        extensions: Iterable[str | Path] = (),
    ) -> "Pipeline":
        """Load a model with its text encoder and autoencoder.

        Args:
            source: anything that `pixart.checkpoint.load_model` takes, which also gets `ema`, `revision` and
                `overrides`. A pipeline folder of diffusers includes its own text encoder and VAE.
            text_encoder, vae: folders or Hub ids, in place of those that the source includes or its card names.
            load_text: False leaves the text encoder out; prompts must then be given as `text_embeddings`.
            quantize_text: as `quantize` of `TextEncoder.load`.
            offload_text: keep the text encoder on the CPU except while it encodes.
            save_memory: decode images one by one, and large ones in tiles.
            compile: `torch.compile` the network's blocks; worthwhile for many images on a GPU.
            extensions: your own Python files that register what the model uses, see `pixart.extensions`.

        Raises:
            InputError: the device or a part is missing, or a part does not fit the model; the message says where it was
                looked for.
        """
        check_device(device)
        if offload_text and quantize_text:
            raise InputError(
                "offload_text and quantize_text: an encoder in 8 or 4 bits cannot be moved; use only one of them"
            )
        fetch_parts(source, revision, text=load_text and text_encoder is None, vae=vae is None)
        model, card = load_with_card(
            source, ema=ema, dtype=dtype, device=device, overrides=overrides, revision=revision, extensions=extensions
        )
        if text_encoder is not None:
            card = replace(card, text=replace(card.text, model=str(text_encoder)))
        if vae is not None:
            if card.vae.kind == "identity":
                raise InputError(f"{source} is a model of pixels, which takes no vae")
            card = replace(card, vae=AutoencoderConfig(card.vae.kind, str(vae), card.vae.scale))
        with loading_part("VAE", "vae", source, vae, card.vae.source):
            autoencoder = load_autoencoder(card.vae, dtype=dtype, device=device)
        text = None
        if load_text:
            with loading_part("text encoder", "text_encoder", source, text_encoder, card.text.model):
                home = "cpu" if offload_text else device
                text = TextEncoder.load(card.text, dtype=dtype, device=home, quantize=quantize_text)
            check_width(text, card)
        if save_memory:
            autoencoder.save_memory()
        if compile:
            model.compile_blocks()
        return cls(model, card, autoencoder, text, offload_text=offload_text)

    @checked
    def __call__(
        self,
        prompts: str | Sequence[str] | None,
        seeds: int | Sequence[int] = 0,
        config: SampleConfig | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: float | None = None,
        sizes: Literal["exact", "official"] = "exact",
        negative_prompts: str | Sequence[str] | None = None,
        null: Literal["buffer", "empty", "empty_own_mask"] | None = None,
        images_per_prompt: int = 1,
        text_embeddings: Embeddings | None = None,
        batch_size: int = 16,
        truncate: bool = False,
        output: Literal["image", "latent", "pixels"] = "image",
        callback: StepCallback | None = None,
        progress: bool | Callable[[int], None] = False,
        conditions: Mapping[str, Tensor] | None = None,
        image: ImageSource | Sequence[ImageSource] | None = None,
        latents: Tensor | None = None,
        strength: float | None = None,
        mask: ImageSource | Sequence[ImageSource] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Draw `images_per_prompt` images of each prompt; images of the same prompt follow each other.

        Args:
            prompts: None with `text_embeddings`, the states and mask of prompts that are already encoded.
            seeds: one per image; or one number, the seed of each prompt's first image, to which its next images add 1.
            config: by default the model's recommendation.
            steps, guidance, sampler: in place of those of `config`.
            height, width: in pixels; by default the model's native size.
            aspect_ratio: height / width, in place of both: selects the official size with the nearest ratio.
            sizes: "exact" generates the requested size; "official" generates the official size with the nearest ratio,
                then resizes and crops to the requested size.
            negative_prompts: one for all, or one for each prompt; they replace the null caption, with their own mask.
            null: a null caption (one of three, see `encode_null`) other than the one of the model's card.
            batch_size: images drawn at a time; does not change the images.
            truncate: truncate prompts that are longer than the model's text length, instead of refusing them.
            output: "pixels" are (B, 3, H, W) in [-1, 1], not clipped; "latent" are scaled latents, as generated.
            callback: called after each step of each batch with the batch's indices among all images, as a range; the
                number of the step just done, from 0; the latents after it, and the clean latents that it predicted,
                both (B, C, h, w) on the device. If it returns a tensor, this replaces the latents.
            progress: True shows a progress bar of steps; a function is called with the number of images just finished.
            conditions: further inputs of a network variant, (n, …) each for all n images.
            image: an image to start from in place of noise, one for all or one for each prompt. `strength` says how
                much noise is added to it; with a `mask`, only its white parts are redrawn. See `Request` for details
                and defaults.
            latents: clean scaled latents (1 or one for each prompt, C, h, w), in place of an image.

        Returns:
            with output "image" a list of images, prompt by prompt; else a tensor on the model's device, see `output`.

        Raises:
            InputError: an argument has a wrong type, names something that does not exist, or does not fit the others or
                the model; or a prompt is too long. All but the last are raised before any work.
        """
        check_counts(output, images_per_prompt, batch_size)
        config = self.settings(config, steps=steps, guidance=guidance, sampler=sampler)
        if (prompts is None) == (text_embeddings is None):
            raise InputError("prompts and text_embeddings: give exactly one of them")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        count = len(text_embeddings[0] if prompts is None else prompts)
        seeds = seed_each(seeds, count, images_per_prompt)
        negatives = negative_each(negative_prompts, count, null, config.guidance)
        if text_embeddings is not None:
            check_embeddings(*text_embeddings, self.card.model.caption_channels)
        requests = make_requests(
            prompts,
            None if text_embeddings is None else _real_tokens(*text_embeddings),
            seeds,
            images_per_prompt,
            {"negative": negatives, "image": image, "latents": latents, "mask": mask},
            conditions or {},
            height=height,
            width=width,
            aspect_ratio=aspect_ratio,
            sizes=sizes,
            strength=strength,
        )
        # all requests are checked before the first is drawn, and all prompts are encoded at once
        options = {"null": null, "batch_size": batch_size, "look_ahead": len(requests), "truncate": truncate}
        results = self._collect(requests, config, callback, progress, output=output, **options)
        return Images(results) if output == "image" else torch.stack(results)

    @checked
    def stream(
        self,
        requests: Iterable[Request],
        config: SampleConfig | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        null: Literal["buffer", "empty", "empty_own_mask"] | None = None,
        batch_size: int = 16,
        look_ahead: int | None = None,
        truncate: bool = False,
        output: Literal["image", "latent", "pixels"] = "image",
        callback: StreamCallback | None = None,
        skip: Callable[[int, Request], bool] | None = None,
    ) -> Iterator[Drawn]:
        """Draw requests from a stream, in order; memory does not grow with their number.

        Consecutive requests that fit together (same size, same kind of start, all with a negative prompt or all
        without) are drawn as one batch. `look_ahead` requests are read before the first of them is drawn.

        Args:
            requests: read as they are needed.
            config, steps, guidance, sampler, null, truncate, output: as in a call.
            batch_size: images drawn at a time; does not change the images.
            look_ahead: number of requests that are read, checked and have their prompts encoded at once; by default
                `batch_size`. With more of them, an offloaded text encoder is moved less often.
            callback: called after each step of each batch, with the indices of its requests.
            skip: called with index and request; if it returns True, the request is not drawn but keeps its place in the
                batches, so that the other images are the same bit for bit.

        Raises:
            InputError: at once for an invalid setting; for a request that cannot be drawn, before any request of its
                look-ahead is drawn.
        """
        check_counts(output, 1, batch_size)
        if look_ahead is not None and not 1 <= look_ahead <= MOST_IMAGES:
            raise InputError(f"look_ahead: got {say(look_ahead)}, expected 1 to {MOST_IMAGES}")
        config = self.settings(config, steps=steps, guidance=guidance, sampler=sampler)
        card = with_null_mode(self.card, null)
        return Studio(
            self.model,
            card,
            self.autoencoder,
            config,
            encode=lambda texts: self._encode(texts, truncate, batch_size),
            null=lambda: self.null_caption(card.text.null),
            batch_size=batch_size,
            look_ahead=look_ahead or batch_size,
            output=output,
            callback=callback,
            skip=skip,
        ).draw(requests)

    def _collect(
        self,
        requests: Sequence[Request],
        config: SampleConfig,
        callback: StepCallback | None,
        progress: bool | Callable[[int], None],
        *,
        batch_size: int,
        **options,
    ) -> list[Image.Image | Tensor]:
        """All results of a stream of requests of one kind; progress is reported batch by batch."""
        done, results = count_steps(requests[0], config, make_schedule(self.card.diffusion)), []
        total = -(-len(requests) // batch_size) * done
        with tqdm(total=total, desc="sampling", unit="step", disable=progress is not True) as bar:

            def after_step(part: Sequence[int], step: int, x: Tensor, x0: Tensor) -> Tensor | None:
                bar.update()
                return None if callback is None else callback(range(part[0], part[-1] + 1), step, x, x0)

            for drawn in self.stream(requests, config, batch_size=batch_size, callback=after_step, **options):
                results.append(drawn.result)
                if callable(progress) and (len(results) % batch_size == 0 or len(results) == len(requests)):
                    progress((len(results) - 1) % batch_size + 1)
        return results

    def settings(
        self,
        config: SampleConfig | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
    ) -> SampleConfig:
        """The settings that a call uses: those given, else those of `config` or the card, else the sampler's own."""
        given = {"steps": steps, "guidance": guidance, "sampler": sampler}
        given = {name: value for name, value in given.items() if value is not None}
        return resolve(replace(config or self.card.sample, **given), make_schedule(self.card.diffusion))

    @checked
    def encode(self, prompts: Sequence[str], *, truncate: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Prompts → text states of their real tokens, and the null caption if it is not the model's own."""
        if not prompts:
            raise InputError("prompts: got none, expected at least one")
        return self._encode(prompts, truncate, len(prompts)), self.null_caption(self.card.text.null)

    def null_caption(self, mode: str) -> Tensor | None:
        """As in `encode_null`; encoded once, and kept when the text encoder is freed."""
        if mode == "buffer" and not self.model.y_embedder.y_embedding.any():  # zeros: the file had none
            raise InputError("this model has no null caption of its own: its file had none; use null empty_own_mask")
        if mode not in self._nulls:
            if mode == "buffer":
                self._nulls[mode] = None
            else:
                with self._text_at_work() as text:
                    self._nulls[mode] = encode_null(text, mode)
        return self._nulls[mode]

    def free_text(self) -> None:
        """Free the text encoder's memory; afterwards prompts must be given as `text_embeddings`. The null caption is
        kept."""
        if self.text is not None:
            if self.card.text.null != "buffer":
                self.null_caption(self.card.text.null)
            self.text.close()
            self.text = None

    @contextmanager
    def _text_at_work(self) -> Iterator[TextEncoder]:
        """A context with the text encoder on the model's device."""
        if self.text is None:
            raise InputError("this pipeline has no text encoder: it was freed or not loaded; give text_embeddings")
        if not self.offload_text:
            yield self.text
            return
        self.text.to(next(self.model.parameters()).device)
        try:
            yield self.text
        finally:
            self.text.to("cpu")

    def _encode(self, prompts: Sequence[str], truncate: bool, batch_size: int) -> list[Tensor]:
        """Prompts → states (L_i, C) of their real tokens; equal prompts are encoded once."""
        texts = list(dict.fromkeys(prompts))
        states: dict[str, Tensor] = {}
        with self._text_at_work() as text:
            text.check_prompts(texts, truncate=truncate)
            for start in range(0, len(texts), batch_size):
                part = texts[start : start + batch_size]
                states.update(zip(part, _real_tokens(*text.encode(part, truncate=truncate)), strict=True))
        return [states[prompt] for prompt in prompts]


def _real_tokens(states: Tensor, mask: Tensor) -> list[Tensor]:
    """States (B, L, C) and mask (B, L) → for each prompt the states (L_i, C) of its real tokens."""
    return [row[kept.bool()] for row, kept in zip(states, mask, strict=True)]
