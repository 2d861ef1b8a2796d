"""Requests → images, in batches, as they arrive; memory grows with the look-ahead, not with their number."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoint import ModelCard
from pixart.diffusion import make_schedule
from pixart.diffusion.sampling import SampleConfig
from pixart.encoders.autoencoder import Autoencoder
from pixart.errors import InputError
from pixart.inference.latents import Size, check_finite, decode, resize_and_crop, sample_latents, to_images
from pixart.inference.request import Drawn, Request, check_negative, strength_of
from pixart.inference.start import Sources, check_start, put_back
from pixart.model import PixArt

KEPT_TEXTS = 64  # minimum number of prompts whose states a stream keeps; at most 5 MB each, for T5-XXL in fp32
# indices of the requests, the step just done (from 0), the latents after it, the clean latents that it predicted; if a
# tensor is returned, it replaces the latents
StreamCallback = Callable[[Sequence[int], int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Job:
    """A request with its position in the stream."""

    index: int
    request: Request
    size: Size  # to generate
    output: Size  # to return
    skipped: bool

    @property
    def kind(self) -> tuple:
        """Equal for requests that can be drawn in one batch."""
        request = self.request
        conditions = tuple((name, value.shape) for name, value in sorted(request.conditions.items()))
        start = strength_of(request), request.mask is None
        return self.size, self.output, start, request.negative is None, conditions


class Texts:
    """Prompts' states; the most recent ones are kept, so that equal prompts are encoded once."""

    def __init__(self, encode: Callable[[Sequence[str]], list[Tensor]]):
        self.encode = encode
        self._states: OrderedDict[str, Tensor] = OrderedDict()

    def load(self, texts: Iterable[str]) -> None:
        """Encode those of `texts` that are not there yet, and drop the oldest of the others."""
        texts = list(dict.fromkeys(texts))
        missing = [text for text in texts if text not in self._states]
        self._states.update(zip(missing, self.encode(missing) if missing else [], strict=True))
        for text in texts:
            self._states.move_to_end(text)
        while len(self._states) > max(KEPT_TEXTS, len(texts)):
            self._states.popitem(last=False)

    def __getitem__(self, text: str) -> Tensor:
        return self._states[text]


@dataclass(frozen=True)
class Studio:
    """A pipeline's parts and one stream's settings."""

    model: PixArt
    card: ModelCard
    autoencoder: Autoencoder
    config: SampleConfig  # resolved
    encode: Callable[[Sequence[str]], list[Tensor]]  # prompts → states (L_i, C) of their real tokens
    null: Callable[[], Tensor | None]  # the null caption, as `encode_null` returns it
    batch_size: int
    look_ahead: int
    output: str
    callback: StreamCallback | None
    skip: Callable[[int, Request], bool] | None

    def draw(self, requests: Iterable[Request]) -> Iterator[Drawn]:
        """Images in the order of the requests. All requests of a look-ahead are checked before any of them is encoded
        or drawn."""
        prompts, negatives = Texts(self.encode), Texts(self.encode)
        sources, numbered = Sources(self.card, self.autoencoder), enumerate(requests)
        while window := [self.plan(i, request, sources) for i, request in islice(numbered, self.look_ahead)]:
            if all(job.skipped for job in window):
                continue
            given = [job.request for job in window]
            null = None
            if self.config.guidance != 1 and any(request.negative is None for request in given):
                null = self.null()
            prompts.load(request.prompt for request in given if request.prompt is not None)
            negatives.load(request.negative for request in given if request.negative is not None)
            for batch in group(window, self.batch_size):
                if jobs := [job for job in batch if not job.skipped]:
                    yield from self._draw_batch(jobs, prompts, negatives, null, sources)

    def plan(self, index: int, request: Request, sources: Sources) -> Job:
        """Check a request and choose its size.

        Raises:
            InputError: it cannot be drawn.
        """
        if not isinstance(request, Request):
            raise InputError(f"stream: got {type(request).__name__}, expected pixart.Request records")
        if request.negative is not None:
            check_negative(None, self.config.guidance)
        states, channels = request.text_embeddings, self.card.model.caption_channels
        if states is not None and (states.ndim != 2 or states.shape[1] != channels):
            raise InputError(f"text_embeddings: got {tuple(states.shape)}, expected (L, {channels}) for each image")
        check_start(request, self.config, make_schedule(self.card.diffusion))
        (size, output), _ = sources.read(request)
        return Job(index, request, size, output, self.skip is not None and self.skip(index, request))

    def _draw_batch(
        self, jobs: list[Job], prompts: Texts, negatives: Texts, null: Tensor | None, sources: Sources
    ) -> Iterator[Drawn]:
        first, requests, indices = jobs[0], [job.request for job in jobs], [job.index for job in jobs]
        captions = [prompts[r.prompt] if r.text_embeddings is None else r.text_embeddings for r in requests]
        away = null if first.request.negative is None else [negatives[r.negative] for r in requests]
        given, device = [sources.read(r)[1] for r in requests], next(self.model.parameters()).device
        strength, callback = strength_of(first.request), self.callback

        def after_step(step: int, x: Tensor, x0: Tensor) -> Tensor | None:
            return None if callback is None else callback(indices, step, x, x0)

        latents = sample_latents(
            self.model,
            self.card,
            captions,
            away,
            [r.seed for r in requests],
            self.config,
            height=first.size[0] // self.autoencoder.downsample,
            width=first.size[1] // self.autoencoder.downsample,
            conditions=_stack(requests),
            callback=after_step,
            start=None if strength is None else sources.start(given, strength, device),
        )
        names = [f"'{(r.prompt or '')[:60]}' with seed {r.seed}" for r in requests]
        check_finite(latents, names, next(self.model.parameters()).dtype, "latents")
        for job, results in zip(jobs, self._finish(latents, given, first.output, names), strict=True):
            yield Drawn(job.index, job.request, **results)

    def _finish(
        self, latents: Tensor, sources: Sequence[Any], size: Size, names: Sequence[str]
    ) -> Iterator[Mapping[str, Any]]:
        if self.output == "latent":
            return ({"latents": row} for row in latents)
        pixels = decode(self.autoencoder, latents)
        check_finite(pixels, names, getattr(self.autoencoder, "dtype", pixels.dtype), "pixels after the VAE")
        if sources[0] is not None:
            pixels = put_back(sources, pixels)
        pixels = resize_and_crop(pixels, size)
        if self.output == "pixels":
            return ({"pixels": row} for row in pixels)
        return ({"image": image} for image in to_images(pixels))


def group(jobs: Sequence[Job], batch_size: int) -> Iterator[list[Job]]:
    """Batches of consecutive jobs of the same kind, with at most `batch_size` jobs."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == batch_size or job.kind != batch[0].kind):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _stack(requests: Sequence[Request]) -> dict[str, Tensor]:
    return {name: torch.stack([r.conditions[name] for r in requests]) for name in requests[0].conditions}
