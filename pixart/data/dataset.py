"""Samples and batches for training: pixels, caption states, and every random number the sample will need.

All randomness of a sample is a function of (seed, epoch, sample id) and drawn here, on the CPU: so a run does not
depend on the number of processes or workers, and two experiments see the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pixart.data.batches import Key, derive_seed
from pixart.data.images import UNREADABLE, Record, load_image
from pixart.errors import InputError


@dataclass
class Batch:
    """What a training step takes. B samples of one bucket; L is the longest caption's number of tokens."""

    pixels: Tensor  # (B, 3, H, W) in [-1, 1]
    noise: Tensor  # (B, C, h, w) standard normal, to be added to the latents
    posterior_noise: Tensor  # (B, C, h, w) standard normal, for the autoencoder's posterior
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


@dataclass(frozen=True)
class Captions:
    """Text states of all distinct captions, real tokens only: states[i] (L_i, caption_channels)."""

    states: list[Tensor]
    index: dict[str, int]

    def __getitem__(self, caption: str) -> Tensor:
        return self.states[self.index[caption]]


class ImageDataset(Dataset):
    """Images of a folder with their captions' states, by (epoch, index) keys; see `Batch` for what comes out."""

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
        cache: bool = False,
    ):
        """
        Args:
            latent_channels, downsample: of the autoencoder, for the shape of the noise.
            flip: mirror half of the pictures.
            random_crop: crop anywhere, not in the middle.
            cache: keep decoded pictures in memory; not with `random_crop`.
        """
        if cache and random_crop:
            raise InputError("data: cache keeps cropped pictures, so it cannot be on together with random_crop")
        self.records, self.captions, self.seed = records, captions, seed
        self.latent_channels, self.downsample = latent_channels, downsample
        self.flip, self.random_crop = flip, random_crop
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> dict:
        epoch, index = key
        record = self.records[index]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, record.id))
        # all of them, always, in this order: so that switching one on does not change the others
        time, drop, flip, caption, top, left = torch.rand(6, generator=generator).tolist()
        shape = (record.bucket.height // self.downsample, record.bucket.width // self.downsample)
        noise, posterior_noise = torch.randn(2, self.latent_channels, *shape, generator=generator)
        image, problem = self._read(index, (top, left) if self.random_crop else (0.5, 0.5))
        if self.flip and flip < 0.5:
            image = image[:, ::-1]
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1
        return {
            "pixels": pixels,
            "noise": noise,
            "posterior_noise": posterior_noise,
            "time": time,
            "caption": self.captions[record.choose(caption)],
            "drop": drop,
            "size": (float(record.height), float(record.width)),
            "aspect_ratio": record.bucket.ratio,
            "weight": float(problem is None),
            "id": record.id,
            "problem": problem,
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


def collate(samples: list[dict]) -> Batch:
    """Samples of one bucket → a batch, captions padded to the longest.

    Raises:
        InputError: a caption without tokens; attention over it would give NaN for the whole picture.
    """
    for sample in samples:
        if not len(sample["caption"]):
            raise InputError(f"{sample['id']}: its caption has no token")
    caption = torch.nn.utils.rnn.pad_sequence([s["caption"] for s in samples], batch_first=True)
    lengths = torch.tensor([len(s["caption"]) for s in samples])
    stacked = {name: torch.stack([s[name] for s in samples]) for name in ("pixels", "noise", "posterior_noise")}
    numbers = ("time", "drop", "size", "aspect_ratio", "weight")
    return Batch(
        **stacked,
        **{name: torch.tensor([s[name] for s in samples], dtype=torch.float32) for name in numbers},
        caption=caption,
        caption_mask=torch.arange(caption.shape[1])[None, :] < lengths[:, None],
        ids=[s["id"] for s in samples],
        problems=[(s["id"], s["problem"]) for s in samples if s["problem"]],
    )


def encode_captions(encoder, captions: Sequence[str], *, dtype: torch.dtype, batch_size: int = 64) -> Captions:
    """Text states of every distinct caption, longer ones cut to the model's length; encoded in order of length.

    `encoder` is a `pixart.model.text.TextEncoder`.
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
