"""Samples and batches for training: pixels or latents, caption states, and every random number the sample will need.

All randomness of a sample is a function of (seed, pass, sample id) and drawn here, on the CPU: so a run does not
depend on the number of processes or workers, and two experiments see the same noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from pixart.data.batches import Key
from pixart.data.buckets import Bucket
from pixart.data.images import UNREADABLE, Record, load_image
from pixart.errors import InputError
from pixart.seeds import derive_seed

# lengths that captions of a batch are padded to, up to the model's own: few, so that few shapes are compiled
CAPTION_LENGTHS = (16, 32, 64, 128, 256)


@dataclass
class Batch:
    """What a training step takes. B samples of one bucket; L is the padded length of its captions."""

    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1]; None where there are latents
    latents: Tensor | None  # (B, C, h, w) scaled; None where there are pixels
    noise: Tensor  # (B, C, h, w) standard normal, to be added to the latents
    posterior_noise: Tensor | None  # as `noise`, for the posterior of the pixels' latents; zeros for its mean
    time: Tensor  # (B,) uniform in [0, 1); the schedule makes times of it
    caption: Tensor  # (B, L, caption_channels)
    caption_mask: Tensor  # (B, L) bool
    drop: Tensor  # (B,) uniform in [0, 1); below the dropout rate the caption is replaced by the null caption
    size: Tensor  # (B, 2) the original picture's height and width in pixels
    aspect_ratio: Tensor  # (B,) the bucket's rounded ratio
    weight: Tensor  # (B,) 1, or 0 for a sample that could not be read
    ids: list[str]
    problems: list[tuple[str, str]]  # (id, reason) of the unreadable ones

    def _map(self, change) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Tell the allocator that `stream` uses the tensors, which another stream has made."""
        self._map(lambda tensor: tensor.record_stream(stream))


@dataclass(frozen=True)
class Draws:
    """A sample's random numbers: all of them, always, so that using one or not does not change the others."""

    time: float
    drop: float
    flip: float
    caption: float
    top: float
    left: float
    noise: Tensor  # (C, h, w)
    posterior_noise: Tensor


def draw(seed: int, turn: int, sample_id: str, shape: tuple[int, int, int]) -> Draws:
    """The random numbers of a sample in one pass; uniform in [0, 1), normal for the latents' shape (C, h, w)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, turn, sample_id))
    return Draws(*torch.rand(6, generator=generator).tolist(), *torch.randn(2, *shape, generator=generator))


@dataclass(frozen=True)
class Captions:
    """Text states of all distinct captions, real tokens only: states[i] (L_i, caption_channels)."""

    states: list[Tensor]
    index: dict[str, int]

    def __getitem__(self, caption: str) -> Tensor:
        return self.states[self.index[caption]]


class ImageDataset(Dataset):
    """Captioned images with their captions' states, by (pass, index) keys; see `Batch` for what comes out."""

    def __init__(
        self,
        records: Sequence[Record],
        captions: Captions,
        *,
        seed: int,
        latent_channels: int,
        downsample: int,
        flip: bool = False,
        random_crop: bool = False,
        posterior_mean: bool = False,
        cache: bool = False,
    ):
        """
        Args:
            latent_channels, downsample: of the autoencoder, for the shape of the noise.
            flip: mirror half of the pictures.
            random_crop: crop anywhere, not in the middle.
            posterior_mean: take the mean of the autoencoder's posterior, no sample of it.
            cache: keep decoded pictures in memory; not with `random_crop`.
        """
        if cache and random_crop:
            raise InputError("data: cache keeps cropped pictures, so it cannot be on together with random_crop")
        self.records, self.captions, self.seed = records, captions, seed
        self.latent_channels, self.downsample = latent_channels, downsample
        self.flip, self.random_crop, self.posterior_mean = flip, random_crop, posterior_mean
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> dict:
        turn, index = key
        record = self.records[index]
        shape = (self.latent_channels, record.bucket.height // self.downsample, record.bucket.width // self.downsample)
        draws = draw(self.seed, turn, record.id, shape)
        image, problem = self._read(index, (draws.top, draws.left) if self.random_crop else (0.5, 0.5))
        if self.flip and draws.flip < 0.5:
            image = image[:, ::-1]
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1
        posterior_noise = torch.zeros_like(draws.noise) if self.posterior_mean else draws.posterior_noise
        return {
            "pixels": pixels,
            "posterior_noise": posterior_noise,
            "caption": self.captions[record.choose(draws.caption)],
            **common_values(draws, record, problem),
        }

    def _read(self, index: int, crop: tuple[float, float]) -> tuple[np.ndarray, str | None]:
        if self._cache is not None and index in self._cache:
            return self._cache[index], None
        record = self.records[index]
        try:
            image = load_image(record.picture, record.bucket, crop=crop)
        except UNREADABLE as error:
            return np.zeros((record.bucket.height, record.bucket.width, 3), np.uint8), f"unreadable: {error}"
        if self._cache is not None:
            self._cache[index] = image
        return image, None


class Sample(Protocol):
    """What `common_values` needs of an image: a `Record`, or one of a feature store."""

    id: str
    height: int  # of the original image
    width: int
    bucket: Bucket


def common_values(draws: Draws, sample: Sample, problem: str | None) -> dict:
    """The entries of a sample that do not depend on where it comes from."""
    return {
        "noise": draws.noise,
        "time": draws.time,
        "drop": draws.drop,
        "size": (float(sample.height), float(sample.width)),
        "aspect_ratio": sample.bucket.ratio,
        "weight": float(problem is None),
        "id": sample.id,
        "problem": problem,
    }


def collate(samples: list[dict], *, length: int | None = None) -> Batch:
    """Samples of one bucket → a batch; captions are padded to the longest, or with `length`, the longest there may be,
    to the next of `CAPTION_LENGTHS`.

    Raises:
        InputError: a caption without tokens; attention over it would give NaN for the whole picture.
    """
    for sample in samples:
        if not len(sample["caption"]):
            raise InputError(f"{sample['id']}: its caption has no token")
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
        caption=caption,
        caption_mask=torch.arange(padded)[None, :] < lengths[:, None],
        ids=[s["id"] for s in samples],
        problems=[(s["id"], s["problem"]) for s in samples if s["problem"]],
    )


def stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors, out=empty_batch(tensors[0].dtype, len(tensors), *tensors[0].shape))


def empty_batch(dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory for a batch: in a loader's worker shared with the training process, so that it is filled only once."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # what torch's own collate does
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def pad_length(longest: int, length: int | None) -> int:
    """What captions are padded to: the next of `CAPTION_LENGTHS`, and no more than `length`."""
    if length is None:
        return longest
    return max(longest, min(next((step for step in CAPTION_LENGTHS if step >= longest), length), length))


def encode_captions(encoder, captions: Sequence[str], *, dtype: torch.dtype, batch_size: int = 64) -> Captions:
    """Text states of every distinct caption, longer ones cut to the model's length; encoded in order of length.

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
