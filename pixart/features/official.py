"""The authors' feature folders, read in place: one `.npy` of latents and one `.npz` of caption states per image.

    data_info.json (or partition/data_info.json)      [{path, prompt, ratio, height, width}, …]
    img_vae_features_512resolution/noflip/A_B.npy     (2C, h, w): mean and standard deviation, unscaled
    caption_feature_wmask/A_B.npz                     caption_feature (1, L, W), padded; attention_mask (1, L)

An image `A/B.png` has the files `A_B`. Folders for several aspect ratios end in `ms` instead of `noflip`; those of
PixArt-Σ are named img_sdxl_vae_features_1024resolution_ms_new and caption_features_new.
"""

import json
import math
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pixart.data.buckets import Bucket
from pixart.data.images import Record
from pixart.data.items import Fields
from pixart.data.lists import LISTS, read_official
from pixart.errors import InputError
from pixart.features.store import UNKNOWN, Features
from pixart.files import digest_text, open_file
from pixart.seeds import derive_seed

MOST_BYTES = 64 << 20  # largest array in a caption's file: 4,096 tokens of 4,096 channels (T5-XXL) in fp32


class OfficialFeatures:
    """An official feature folder with the interface of a `FeatureStore`. Convert it for anything more than a trial."""

    mirrored = False
    text_weights = UNKNOWN
    arrays: tuple[str, ...] = ()

    def __init__(self, folder: str | Path, table: list[Bucket], *, resolution: int, downsample: int, scale: float):
        """Read the list and the headers of all latents.

        Args:
            table: the buckets; latents of other sizes are left out.
            downsample, scale: of the autoencoder, since the files do not record them.

        Raises:
            InputError: there is no list, no matching folder or several, or no usable features.
        """
        self.folder, self.scale = Path(folder), scale
        self.latents = find_features(self.folder, f"img*vae*{resolution}*", "latents")
        self.states = find_features(self.folder, "caption_feature*", "caption states")
        sizes = {(b.height // downsample, b.width // downsample): i for i, b in enumerate(table)}
        self.buckets, self.problems = table, []
        self.records: list[Record] = []
        numbers = []
        items = list(read_official(self.folder, Fields(["prompt"])))
        for item in tqdm(items, desc="reading headers", unit="file", disable=None):
            name = "_".join(item.id.rsplit("/", 1)).rsplit(".", 1)[0]
            prompt = item.fields.get("prompt")
            if item.problem or not isinstance(prompt, str) or item.size is None:
                self.problems.append((item.id, item.problem or "the list has no prompt, height or width for it"))
                continue
            try:
                shape = read_shape(self.latents / f"{name}.npy")
            except (OSError, ValueError) as error:
                self.problems.append((item.id, f"latents cannot be read: {error}"))
                continue
            if len(shape) != 3 or shape[1:] not in sizes or shape[0] % 2 or not shape[0]:
                self.problems.append((item.id, f"latents of shape {shape}, which fits no bucket"))
                continue
            if not (self.states / f"{name}.npz").is_file():
                self.problems.append((item.id, f"no caption states: {name}.npz is missing"))
                continue
            numbers.append(sizes[shape[1:]])
            self.records.append(
                Record(item.id, self.latents / f"{name}.npy", (prompt,), (1.0,), *item.size, table[numbers[-1]])
            )
        if not self.records:
            first = f"; the first: {self.problems[0][0]}: {self.problems[0][1]}" if self.problems else ""
            raise InputError(f"{self.folder}: none of its features can be used{first}")
        self.bucket_numbers = np.array(numbers, dtype=np.int16)
        self.hashes = np.array([derive_seed(record.id) for record in self.records], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.records)

    def moments(self, index: int) -> Tensor:
        """Mean and standard deviation of the scaled latents (2, C, h, w), fp32."""
        path = self.records[index].picture
        try:
            read_shape(path)
            with open_file(path) as file:
                both = torch.from_numpy(np.load(file)).float() * self.scale
            return both.unflatten(0, (2, -1))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{path}: latents cannot be read ({error})") from None

    @property
    def content(self) -> str:
        """A digest of ids and captions; the many feature files themselves are not read."""
        return digest_text(json.dumps([[record.id, record.captions] for record in self.records]))

    def get(self, index: int, *, mirrored: bool = False) -> Features:
        if mirrored:
            raise InputError(f"{self.folder} has no mirrored latents; turn data.flip off")
        record = self.records[index]
        mean, std = self.moments(index)
        return Features(record.id, mean, std, [index], [1.0], record.height, record.width, record.bucket)

    def caption(self, number: int) -> Tensor:
        """States (L, W) of a caption's real tokens, in the file's precision."""
        path = self.states / f"{self.records[number].picture.stem}.npz"
        try:
            _check_states(path)
            with open_file(path) as bytes, np.load(bytes) as file:
                states = torch.from_numpy(file["caption_feature"])[0]
                mask = torch.from_numpy(file["attention_mask"]).flatten().bool() if "attention_mask" in file else None
            return states if mask is None else states[mask]
        except InputError:
            raise
        except Exception as error:  # numpy and zipfile raise any kind on damaged files
            raise InputError(f"{path}: caption states cannot be read ({type(error).__name__}: {error})") from None

    def text(self, number: int) -> str:
        return self.records[number].captions[0]

    def prompt(self, text: str) -> Tensor | None:
        return None

    def null_states(self) -> tuple[Tensor, int]:
        raise InputError(f"{self.folder}: official features have no null states; set text.null to buffer")

    def describe(self) -> str:
        return f"{len(self):,} samples in the authors' layout, {len(self.problems)} left out"


def read_shape(path: Path) -> tuple[int, ...]:
    """The shape in the header of a `.npy` file, after checking that the file is long enough for it.

    Raises:
        OSError, ValueError: it is not a `.npy` file, is damaged, or holds Python objects, which could run code.
    """
    with open_file(path) as file:
        shape, dtype = _read_header(file)
        if (there := os.fstat(file.fileno()).st_size - file.tell()) < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"shape {shape} of {dtype}, but only {there:,} bytes of data")
    return shape


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject or any(length < 0 for length in shape):
        raise ValueError(f"shape {shape} of {dtype}, expected numbers; Python objects could run code")
    return shape, dtype


def _check_states(path: Path) -> None:
    """Refuse an archive whose arrays are larger than any caption's states, even if they are compressed to few bytes."""
    with open_file(path) as bytes, zipfile.ZipFile(bytes) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                shape, dtype = _read_header(file)
            if math.prod(shape) * dtype.itemsize > MOST_BYTES:
                raise InputError(f"{path}: {entry.filename} has shape {shape}, expected the states of one caption")


def is_official(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in LISTS)


def find_features(folder: Path, pattern: str, what: str) -> Path:
    """The only folder of features that matches `pattern`."""
    found = sorted(path for path in folder.glob(pattern) if path.is_dir())
    inner = [path / name for path in found for name in ("noflip", "ms") if (path / name).is_dir()]
    found = inner + [path for path in found if not any(path == deeper.parent for deeper in inner)]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise InputError(f"{folder}: expected one folder {pattern} with {what}, found {names}")
    return found[0]
