"""From prompts to pictures. A picture depends on its prompt, its seed and the settings, never on its batch."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pixart.adapters.load import load_with_card
from pixart.arguments import checked
from pixart.checkpoint import ModelCard
from pixart.checkpoint.save import Format, export_model
from pixart.diffusion import make_schedule
from pixart.diffusion.sampling import SampleConfig, resolve
from pixart.encoders.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from pixart.encoders.text import TextEncoder, encode_null
from pixart.errors import InputError
from pixart.inference.latents import with_null_mode
from pixart.inference.request import Drawn, ImageSource, Request, check_negative, make_requests
from pixart.inference.results import Images, describe
from pixart.inference.start import count_steps
from pixart.inference.stream import StreamCallback, Studio
from pixart.model import PixArt

Embeddings = tuple[Tensor, Tensor]  # states (B, L, C) and mask (B, L), 1 = a token; what `TextEncoder.encode` returns
# which images, the step just done (from 0), latents after it, the clean ones that its prediction implied; a tensor
# returned goes on in the latents' place
StepCallback = Callable[[range, int, Tensor, Tensor], Tensor | None]


class Pipeline:
    """A model with its text encoder and autoencoder: prompts in, pictures out."""

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
        self._nulls: dict[str, Tensor | None] = {}  # by mode; they outlive the text encoder

    def __repr__(self) -> str:
        return describe(self)

    @property
    def device(self) -> torch.device:
        """The network's."""
        return next(self.model.parameters()).device

    @checked
    def to(self, device: torch.device | str) -> "Pipeline":
        """Move network, autoencoder and text encoder, in place → itself. With `offload_text` the last stays on the CPU.

        Raises:
            InputError: torch cannot use the device, or the text encoder is in 8 or 4 bits, which stays where it is;
                nothing has moved then.
        """
        _check_device(device)
        moving = self.text if self.text is not None and not self.offload_text else None
        if moving is not None:
            moving.check_movable()
        self.model.to(device)
        self.autoencoder.to(device)
        if moving is not None:
            moving.to(device)
        return self

    @checked
    def save_pretrained(self, folder: str | Path, *, format: Format = "ours") -> list[str]:
        """Write the model with all that sampling needs, whole or not at all; `from_pretrained(folder)` gives it back.

        A text encoder and a VAE that are on this machine alone are copied; others are named by their Hub ids.

        Args:
            folder: a new one; a .pth file with format "official".
            format: as `pixart.export_model`'s; "diffusers-pipeline" is a folder that diffusers opens.

        Returns:
            what became of a text encoder and VAE that are on this machine alone, as lines.

        Raises:
            InputError: it is there already, or the format cannot express the model.
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
            source: whatever `pixart.checkpoint.load_model` takes; `ema`, `revision` and `overrides` are for it. A
                pipeline folder of diffusers brings its own text encoder and VAE.
            text_encoder, vae: folders or Hub ids, in place of what the source brings or its card names.
            load_text: False leaves the text encoder out; prompts must then come as `text_embeddings`.
            quantize_text: as `TextEncoder.load`'s `quantize`.
            offload_text: keep the text encoder on the CPU, but while it encodes.
            save_memory: decode pictures one by one, and large ones in tiles.
            compile: `torch.compile` the network's blocks; pays for many images on a GPU.
            extensions: files of one's own that register what the model is made of, see `pixart.extensions`.

        Raises:
            InputError: the device or a part is not there, or a part does not fit the model; says where it was looked
                for.
        """
        _check_device(device)
        if offload_text and quantize_text:
            raise InputError("offload_text and quantize_text: an encoder in 8 or 4 bits cannot be moved; take one")
        fetch_parts(source, revision, text=load_text and text_encoder is None, vae=vae is None)
        model, card = load_with_card(
            source, ema=ema, dtype=dtype, device=device, overrides=overrides, revision=revision, extensions=extensions
        )  # fmt: skip
        if text_encoder is not None:
            card = replace(card, text=replace(card.text, model=str(text_encoder)))
        if vae is not None:
            if card.vae.kind == "identity":
                raise InputError(f"{source} is a model of pixels, it takes no vae")
            card = replace(card, vae=AutoencoderConfig(card.vae.kind, str(vae), card.vae.scale))
        with _part("VAE", "vae", source, vae, card.vae.source):
            autoencoder = load_autoencoder(card.vae, dtype=dtype, device=device)
        text = None
        if load_text:
            with _part("text encoder", "text_encoder", source, text_encoder, card.text.model):
                home = "cpu" if offload_text else device
                text = TextEncoder.load(card.text, dtype=dtype, device=home, quantize=quantize_text)
            _check_width(text, card)
        if save_memory:
            autoencoder.save_memory()
        if compile:
            model.compile_blocks()
        return cls(model, card, autoencoder, text, offload_text=offload_text)

    @checked
    def __call__(
        self, prompts: str | Sequence[str] | None, seeds: int | Sequence[int] = 0, config: SampleConfig | None = None,
        *, steps: int | None = None, guidance: float | None = None, sampler: str | None = None,
        height: int | None = None, width: int | None = None, aspect_ratio: float | None = None,
        sizes: Literal["exact", "official"] = "exact", negative_prompts: str | Sequence[str] | None = None,
        null: Literal["buffer", "empty", "empty_own_mask"] | None = None, images_per_prompt: int = 1,
        text_embeddings: Embeddings | None = None, batch_size: int = 16, truncate: bool = False,
        output: Literal["image", "latent", "pixels"] = "image", callback: StepCallback | None = None,
        progress: bool | Callable[[int], None] = False, conditions: Mapping[str, Tensor] | None = None,
        image: ImageSource | Sequence[ImageSource] | None = None, latents: Tensor | None = None,
        strength: float | None = None, mask: ImageSource | Sequence[ImageSource] | None = None,
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """Draw `images_per_prompt` images of each prompt, those of a prompt side by side.

        Args:
            prompts: None with `text_embeddings`, the states and mask of prompts encoded before.
            seeds: one for each image, or that of each prompt's first image, whose next ones have the next.
            config: the model's recommendation by default.
            steps, guidance, sampler: in place of those of `config`.
            height, width: in pixels; the model's native size where not given.
            aspect_ratio: height / width, in place of both: the official size with the nearest ratio.
            sizes: "official" generates in the official size with the nearest ratio, then resizes and crops to what
                was asked for; "exact" generates that.
            negative_prompts: one for all, or one for each prompt; in the null caption's place, under their own mask.
            null: another of the three null captions (see `encode_null`) than the model's card says.
            batch_size: images at a time; changes no image.
            truncate: cut prompts that are longer than the model's text length, rather than refuse them.
            output: "pixels" are (B, 3, H, W) in [-1, 1], not clipped; "latent" scaled latents, as generated.
            callback: called after each step of each batch with a range, which images of all; the number of the step
                just done, from 0; the latents after it and the clean ones that its prediction implied, both
                (B, C, h, w), on the device. A tensor that it returns takes the latents' place.
            progress: True shows a bar of steps; a function is called with the number of images just done.
            conditions: what a variant of the network takes besides, (n, …) each for all n images.
            image: where to start from in place of noise, one for all or one for each prompt: `strength` of the way
                back to noise, and with a `mask` only where it is white. See `Request` for these and their defaults.
            latents: clean scaled latents (1 or one for each prompt, C, h, w), in place of an image.

        Returns:
            with output "image" a list of them, prompt by prompt; else a tensor on the model's device, as `output` says.

        Raises:
            InputError: an argument is of another type, names nothing that there is, or does not fit the others or the
                model; a prompt is too long. All but the last before any work.
        """
        _check_counts(output, images_per_prompt, batch_size)
        config = self.settings(config, steps=steps, guidance=guidance, sampler=sampler)
        if (prompts is None) == (text_embeddings is None):
            raise InputError("prompts and text_embeddings: give one or the other")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        count = len(text_embeddings[0] if prompts is None else prompts)
        seeds = _one_each(seeds, count, images_per_prompt)
        negatives = _negatives(negative_prompts, count, null, config.guidance)
        requests = make_requests(
            prompts, None if prompts is not None else self._given(text_embeddings), seeds, images_per_prompt,
            {"negative": negatives, "image": image, "latents": latents, "mask": mask}, conditions or {},
            height=height, width=width, aspect_ratio=aspect_ratio, sizes=sizes, strength=strength,
        )  # fmt: skip
        # all are looked at before the first is drawn, and all prompts are encoded at once
        options = {"null": null, "batch_size": batch_size, "look_ahead": len(requests), "truncate": truncate}
        results = self._collect(requests, config, callback, progress, output=output, **options)
        return Images(results) if output == "image" else torch.stack(results)

    def stream(
        self, requests: Iterable[Request], config: SampleConfig | None = None, *, steps: int | None = None,
        guidance: float | None = None, sampler: str | None = None,
        null: Literal["buffer", "empty", "empty_own_mask"] | None = None, batch_size: int = 16,
        look_ahead: int | None = None, truncate: bool = False, output: Literal["image", "latent", "pixels"] = "image",
        callback: StreamCallback | None = None, skip: Callable[[int, Request], bool] | None = None,
    ) -> Iterator[Drawn]:  # fmt: skip
        """Draw requests as they come, in their order; memory does not grow with their number.

        Requests that follow each other and fit together (in size, start, negative prompt or none) are drawn as one
        batch: as many as `look_ahead` are read before the first of them is drawn.

        Args:
            requests: read as they are needed.
            config, steps, guidance, sampler, null, truncate, output: as of a call.
            batch_size: images at a time; changes no image.
            look_ahead: requests that are read, checked and have their prompts encoded at once; `batch_size` by
                default. More of them spare a text encoder that is offloaded some of its ways.
            callback: called after each step of each batch, with the indices of its requests.
            skip: called with index and request; those it is true for are not drawn, but keep their place in the
                batches, so that the others' images are the same bit for bit.

        Raises:
            InputError: a setting cannot be, at once; a request cannot be drawn, before any of its look-ahead is.
        """
        _check_counts(output, 1, batch_size)
        if look_ahead is not None and look_ahead < 1:
            raise InputError(f"look_ahead: got {look_ahead}, expected at least 1")
        config = self.settings(config, steps=steps, guidance=guidance, sampler=sampler)
        card = with_null_mode(self.card, null)
        return Studio(
            self.model, card, self.autoencoder, config,
            encode=lambda texts: self._encode(texts, truncate, batch_size),
            null=lambda: self.null_caption(card.text.null),
            batch_size=batch_size, look_ahead=look_ahead or batch_size, output=output, callback=callback, skip=skip,
        ).draw(requests)  # fmt: skip

    def _collect(
        self, requests: Sequence[Request], config: SampleConfig, callback: StepCallback | None,
        progress: bool | Callable[[int], None], *, batch_size: int, **options,
    ) -> list[Image.Image | Tensor]:  # fmt: skip
        """All that a stream of requests of one kind yields; progress is told batch by batch."""
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
        self, config: SampleConfig | None = None, *, steps: int | None = None, guidance: float | None = None,
        sampler: str | None = None,
    ) -> SampleConfig:  # fmt: skip
        """The settings that a call samples with: those given, else `config`'s or the card's, else the sampler's own."""
        given = {"steps": steps, "guidance": guidance, "sampler": sampler}
        given = {name: value for name, value in given.items() if value is not None}
        return resolve(replace(config or self.card.sample, **given), make_schedule(self.card.diffusion))

    def encode(self, prompts: Sequence[str], *, truncate: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Prompts → text states of their real tokens, and the null caption if it is not the model's own."""
        return self._encode(prompts, truncate, len(prompts)), self.null_caption(self.card.text.null)

    def null_caption(self, mode: str) -> Tensor | None:
        """As `encode_null`; encoded once, and kept when the text encoder is freed."""
        if mode == "buffer" and not self.model.y_embedder.y_embedding.any():  # what loading puts where a file has none
            raise InputError("this model has no null caption of its own: its file held none; take null empty_own_mask")
        if mode not in self._nulls:
            if mode == "buffer":
                self._nulls[mode] = None
            else:
                with self._text_at_work() as text:
                    self._nulls[mode] = encode_null(text, mode)
        return self._nulls[mode]

    def free_text(self) -> None:
        """Free the text encoder's memory; from now on prompts come as `text_embeddings`. The null caption is kept."""
        if self.text is not None:
            if self.card.text.null != "buffer":
                self.null_caption(self.card.text.null)
            self.text.close()
            self.text = None

    @contextmanager
    def _text_at_work(self) -> Iterator[TextEncoder]:
        """The text encoder, on the model's device while it is needed."""
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
            for start in range(0, len(texts), batch_size):
                part = texts[start : start + batch_size]
                states.update(zip(part, _real_tokens(*text.encode(part, truncate=truncate)), strict=True))
        return [states[prompt] for prompt in prompts]

    def _given(self, embeddings: Embeddings) -> list[Tensor]:
        """Text embeddings from the caller → states (L_i, C) of their real tokens."""
        states, mask = embeddings
        channels = self.card.model.caption_channels
        if states.ndim != 3 or states.shape[-1] != channels or mask.shape != states.shape[:2]:
            raise InputError(
                f"text_embeddings: got states {tuple(states.shape)} and mask {tuple(mask.shape)}, expected "
                f"(B, L, {channels}) and (B, L)"
            )
        return _real_tokens(states, mask)


def fetch_parts(source: str | Path, revision: str | None, *, text: bool, vae: bool) -> None:
    """Download what a pipeline on the Hub has beside its transformer, so that it is found there."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(/transformer)?", str(source))
    if Path(source).exists() or not match:
        return
    from huggingface_hub import snapshot_download

    patterns = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"] if vae else []
    patterns += ["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"] if text else []
    with suppress(OSError, ValueError):  # unreachable and not cached: what then is missing says so when it is loaded
        snapshot_download(match[1], revision=revision, allow_patterns=patterns)


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(
            f"device '{device}': torch cannot use it here ({reason}); expected cpu, or a GPU that torch sees, as cuda:0"
        ) from None


def _check_counts(output: str, images_per_prompt: int, batch_size: int) -> None:
    if output not in ("image", "latent", "pixels"):
        raise InputError(f"output: got '{output}', expected image, latent or pixels")
    if images_per_prompt < 1 or batch_size < 1:
        raise InputError(f"got images_per_prompt {images_per_prompt} and batch_size {batch_size}, expected at least 1")


def _one_each(seeds: int | Sequence[int], count: int, each: int) -> list[int]:
    """A seed for every picture."""
    if not count:
        raise InputError("got no prompt, expected at least one")
    if not isinstance(seeds, Sequence):
        return [int(seeds) + i for _ in range(count) for i in range(each)]
    if len(seeds) != count * each:
        raise InputError(f"got {len(seeds)} seeds, expected one for each of {count * each} pictures, or a number")
    return [int(seed) for seed in seeds]


def _negatives(
    prompts: str | Sequence[str] | None, count: int, null: str | None, guidance: float
) -> Sequence[str] | None:
    """A negative prompt for each of `count` prompts, if there are any."""
    if prompts is None:
        return None
    check_negative(null, guidance)
    prompts = [prompts] * count if isinstance(prompts, str) else prompts
    if len(prompts) != count:
        raise InputError(f"got {count} prompts and {len(prompts)} negative ones, expected one or as many")
    return prompts


def _real_tokens(states: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[kept.bool()] for row, kept in zip(states, mask, strict=True)]


def _check_width(text: TextEncoder, card: ModelCard) -> None:
    if text.width != card.model.caption_channels:
        raise InputError(
            f"text encoder '{card.text.model}' has states of width {text.width}, the model takes captions of width "
            f"{card.model.caption_channels}; give the encoder that it was trained with"
        )


@contextmanager
def _part(kind: str, option: str, source: str | Path, given: str | Path | None, named: str) -> Iterator[None]:
    """Loading a part of a pipeline: an error says where it was looked for, and how to give another."""
    try:
        yield
    except InputError as error:
        if given is not None:
            places = f"'{given}', as was given"
        elif Path(named).exists():  # the source's own
            places = f"'{named}'"
        else:
            places = f"{source} itself, which holds none, and '{named}'"
        flag = "--" + option.replace("_", "-")
        raise InputError(f"no {kind}: looked for {places}: {error}. Give another with {option}= or {flag}") from None
