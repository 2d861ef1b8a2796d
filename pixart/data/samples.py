"""Samples and batches for training: pixels or latents, caption states, and every random number that a sample needs.

Every random number of a sample is a function of (seed, epoch, sample id, name of the number) and is drawn here, on the
CPU. So a run does not depend on the number of processes or workers, two experiments see the same noise, and an
experiment that draws additional numbers changes no others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from pixart.arguments import say
from pixart.data.arrays import Extras, Maker
from pixart.data.batches import Key
from pixart.data.buckets import Bucket
from pixart.data.decoding import UnreadableImage
from pixart.data.images import Record, load_record
from pixart.errors import InputError
from pixart.seeds import Draw, derive_seed

# lengths to which the captions of a batch are padded, up to the model's own; few, so that few shapes are compiled
CAPTION_LENGTHS = (16, 32, 64, 128, 256)


@dataclass
class Batch:
    """The input of a training step: B samples of one bucket; L is the padded length of their captions."""

    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1]; None if there are latents
    latents: Tensor | None  # (B, C, h, w) scaled; None if there are pixels
    noise: Tensor  # (B, C, h, w) standard normal, to be added to the latents
    posterior_noise: Tensor | None  # like `noise`, for the posterior of the pixels' latents; zeros give its mean
    time: Tensor  # (B,) uniform in [0, 1); the schedule turns it into timesteps
    caption: Tensor  # (B, L, caption_channels)
    caption_mask: Tensor  # (B, L) bool
    drop: Tensor  # (B,) uniform in [0, 1); below the dropout rate the caption is replaced by the null caption
    size: Tensor  # (B, 2) the original image's height and width in pixels
    aspect_ratio: Tensor  # (B,) the bucket's rounded ratio
    weight: Tensor  # (B,) 1, or 0 for a sample that could not be read
    ids: list[str]
    problems: list[tuple[str, str]]  # (id, reason) of the unreadable ones
    loss_weight: Tensor | None = None  # (B,) of the samples' losses in training; None is 1
    conditions: dict[str, Tensor] = field(default_factory=dict)  # further keywords of the network, (B, …) each
    targets: dict[str, Tensor] = field(default_factory=dict)  # arrays for the objective, (B, …) each
    draws: dict[str, Tensor] = field(default_factory=dict)  # random numbers for the objective, (B, …) each

    def _map(self, change) -> "Batch":
        changed = {}
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, dict):
                changed[name] = {key: change(tensor) for key, tensor in value.items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Tell the allocator that `stream` uses the tensors, which were allocated on another stream."""
        self._map(lambda tensor: tensor.record_stream(stream))


class Draws:
    """A sample's random numbers in one epoch. Each has its own generator, seeded by its name, so that using a number or
    not, or drawing more, changes no others."""

    def __init__(self, seed: int, epoch: int, sample_id: str, latent: tuple[int, int, int], patch_size: int = 1):
        """
        Args:
            latent: shape (C, h, w) of the sample's latents.
            patch_size: of the network, which has (h / patch_size) · (w / patch_size) tokens.
        """
        self.key, self.latent = (seed, epoch, sample_id), latent
        self.tokens = (latent[1] // patch_size) * (latent[2] // patch_size)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=self._generator(name))

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator(name))

    def of(self, name: str, draw: Draw) -> Tensor:
        """The random numbers that `draw` describes."""
        shape = {"sample": (), "token": (self.tokens,), "latent": self.latent}[draw.shape]
        return getattr(self, draw.kind)(name, *shape)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(*self.key, name))


class DrawsInOrder(Draws):
    """As in runs before format 2: one generator per sample, all numbers in a fixed order (`data.draws: in_order`)."""

    def __init__(self, seed: int, epoch: int, sample_id: str, latent: tuple[int, int, int], patch_size: int = 1):
        super().__init__(seed, epoch, sample_id, latent, patch_size)
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch, sample_id))
        numbers = torch.rand(6, generator=generator)
        self.known = dict(zip(("time", "drop", "flip", "caption", "top", "left"), numbers, strict=True))
        self.known["noise"], self.known["posterior_noise"] = torch.randn(2, *latent, generator=generator)

    def uniform(self, name: str, *shape: int) -> Tensor:
        return self.known[name] if name in self.known else super().uniform(name, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        return self.known[name] if name in self.known else super().normal(name, *shape)


DRAWS = {"by_name": Draws, "in_order": DrawsInOrder}


@dataclass(frozen=True)
class Drawing:
    """How a data set draws its samples' random numbers, and which extra entries the samples have."""

    seed: int
    patch_size: int = 1
    draws: str = "by_name"  # a key of DRAWS
    extras: Extras = field(default_factory=Extras)

    def __call__(self, epoch: int, sample_id: str, latent: tuple[int, int, int]) -> Draws:
        return DRAWS[self.draws](self.seed, epoch, sample_id, latent, self.patch_size)

    def common(self, draws: Draws, sample: "Sample", arrays: Mapping[str, Tensor], problem: str | None) -> dict:
        """The entries of a sample that do not depend on its source; `arrays` are by the names of their makers."""
        extras = self.extras
        return {
            "noise": draws.normal("noise", *draws.latent),
            "time": float(draws.uniform("time")),
            "drop": float(draws.uniform("drop")),
            "size": (float(sample.height), float(sample.width)),
            "aspect_ratio": sample.bucket.ratio,
            "weight": float(problem is None),
            "id": sample.id,
            "problem": problem,
            "conditions": {
                key: arrays[what] if isinstance(what, str) else draws.of(key, what)
                for key, what in extras.conditions.items()
            },
            "targets": {key: arrays[what] for key, what in extras.targets.items()},
            "draws": {key: draws.of(key, what) for key, what in extras.draws.items()},
        }


@dataclass(frozen=True)
class Captions:
    """Text states of all distinct captions, real tokens only: states[i] (L_i, caption_channels)."""

    states: list[Tensor]
    index: dict[str, int]

    def __getitem__(self, caption: str) -> Tensor:
        return self.states[self.index[caption]]


class ImageDataset(Dataset):
    """Captioned images with their captions' states, by (epoch, index) keys; see `Batch` for their content."""

    by_epoch = True  # keys are (epoch, index), see `pixart.data.given.TrainingData`

    def __init__(
        self,
        records: Sequence[Record],
        captions: Captions,
        drawing: Drawing,
        *,
        latent_channels: int,
        downsample: int,
        flip: bool = False,
        random_crop: bool = False,
        posterior_mean: bool = False,
        cache: bool = False,
        makers: Mapping[str, Maker] | None = None,
    ):
        """
        Args:
            drawing: draws the samples' random numbers.
            latent_channels, downsample: of the autoencoder, for the shape of the noise.
            flip: mirror half of the images.
            random_crop: crop at a random position instead of the center.
            posterior_mean: use the mean of the autoencoder's posterior instead of a sample from it.
            cache: keep decoded images in memory; not with `random_crop`.
            makers: functions that make the arrays that `drawing` asks for.
        """
        if cache and random_crop:
            raise InputError("data: cache keeps cropped images, so it cannot be on together with random_crop")
        self.records, self.captions, self.drawing = records, captions, drawing
        self.latent_channels, self.downsample = latent_channels, downsample
        self.flip, self.random_crop, self.posterior_mean = flip, random_crop, posterior_mean
        self.makers = makers or {}
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> dict:
        epoch, index = key
        record = self.records[index]
        shape = (self.latent_channels, record.bucket.height // self.downsample, record.bucket.width // self.downsample)
        draws = self.drawing(epoch, record.id, shape)
        crop = (float(draws.uniform("top")), float(draws.uniform("left"))) if self.random_crop else (0.5, 0.5)
        image, problem = self._read(index, crop)
        mirrored = self.flip and bool(draws.uniform("flip") < 0.5)
        if mirrored:
            image = image[:, ::-1]
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1
        noise = torch.zeros(shape) if self.posterior_mean else draws.normal("posterior_noise", *shape)
        arrays = {name: make(pixels[None], [record], mirrored)[0] for name, make in self.makers.items()}
        return {
            "pixels": pixels,
            "posterior_noise": noise,
            "caption": self.captions[record.choose(float(draws.uniform("caption")))],
            "loss_weight": record.loss_weight,
            **self.drawing.common(draws, record, arrays, problem),
        }

    def _read(self, index: int, crop: tuple[float, float]) -> tuple[np.ndarray, str | None]:
        if self._cache is not None and index in self._cache:
            return self._cache[index], None
        record = self.records[index]
        try:
            image = load_record(record, crop=crop)
        except UnreadableImage as error:
            return np.zeros((record.bucket.height, record.bucket.width, 3), np.uint8), f"unreadable: {error}"
        if self._cache is not None:
            self._cache[index] = image
        return image, None


class Sample(Protocol):
    """What `Drawing.common` needs to know of an image: a `Record`, or a sample of a feature store."""

    id: str
    height: int  # of the original image
    width: int
    bucket: Bucket


def collate(samples: list[dict], *, length: int | None = None) -> Batch:
    """Samples of one bucket → a batch. Captions are padded to the longest one, or, given their maximum `length`, to the
    next of `CAPTION_LENGTHS`.

    Raises:
        InputError: a caption has no tokens; attention over it would make the whole image NaN.
    """
    for sample in samples:
        if not len(sample["caption"]):
            raise InputError(f"{sample['id']}: its caption has no tokens")
    if len(shapes := sorted({tuple(sample["noise"].shape) for sample in samples})) > 1:
        raise InputError(
            f"a batch has latents of shapes {shapes[0]} and {shapes[1]}; samples of one bucket must have one shape: "
            "give the data set the attribute `buckets`, a number for each sample's size"
        )
    captions = [sample["caption"] for sample in samples]
    lengths = torch.tensor([len(caption) for caption in captions])
    padded = pad_length(int(lengths.max()), length)
    caption = empty_batch(captions[0].dtype, len(captions), padded, captions[0].shape[1])
    for row, states in zip(caption, captions, strict=True):
        row[: len(states)] = states
        row[len(states) :] = 0
    numbers = ("time", "drop", "size", "aspect_ratio", "weight")
    return Batch(
        **{
            name: stack([s[name] for s in samples]) if name in samples[0] else None
            for name in ("pixels", "latents", "noise", "posterior_noise")
        },
        **{name: torch.tensor([s[name] for s in samples], dtype=torch.float32) for name in numbers},
        loss_weight=torch.tensor([s.get("loss_weight", 1.0) for s in samples]),
        caption=caption,
        caption_mask=torch.arange(padded)[None, :] < lengths[:, None],
        ids=[s["id"] for s in samples],
        problems=[(s["id"], s["problem"]) for s in samples if s["problem"]],
        **{
            group: {name: stack([s[group][name] for s in samples]) for name in samples[0].get(group, ())}
            for group in ("conditions", "targets", "draws")
        },
    )


def stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors, out=empty_batch(tensors[0].dtype, len(tensors), *tensors[0].shape))


def empty_batch(dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory for a batch; in a loader's worker it is shared with the training process, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # as torch's own collate does
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def pad_length(longest: int, length: int | None) -> int:
    """The padded length of captions: the next of `CAPTION_LENGTHS`, but at most `length`."""
    if length is None:
        return longest
    return max(longest, min(next((step for step in CAPTION_LENGTHS if step >= longest), length), length))


def describe_captions(encoder, captions: Sequence[str]) -> list[str]:
    """Lines on the captions that the encoder does not take whole: emptied by cleaning, or truncated."""
    lines, emptied = [], encoder.emptied(captions)
    if emptied:
        lines.append(
            f"{len(emptied)} of {len(captions)} captions are empty after PixArt-α's cleaning (text.clean), and are "
            f"encoded as the empty text: {', '.join(map(say, emptied[:3]))}"
        )
    if cut := sum(count > encoder.config.length for count in encoder.count_tokens(captions)):
        lines.append(
            f"{cut} of {len(captions)} captions are longer than {encoder.config.length} tokens and are truncated"
        )
    return lines


def encode_captions(encoder, captions: Sequence[str], *, dtype: torch.dtype, batch_size: int = 64) -> Captions:
    """Text states of every distinct caption, truncated to the model's length; encoded in order of length.

    `encoder` is a `pixart.encoders.text.TextEncoder`.
    """
    from tqdm import tqdm

    distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))
    states: list[Tensor] = []
    with tqdm(total=len(distinct), desc="encoding captions", unit="caption", disable=len(distinct) < 1000) as bar:
        for start in range(0, len(distinct), batch_size):
            hidden, mask = encoder.encode(distinct[start : start + batch_size], truncate=True)
            lengths = mask.sum(1).tolist()
            states += [row[:length].to("cpu", dtype).clone() for row, length in zip(hidden, lengths, strict=True)]
            bar.update(len(lengths))
    return Captions(states, {caption: i for i, caption in enumerate(distinct)})
