"""The authors' feature folders, read where they lie: one `.npy` of latents and one `.npz` of caption states a picture.

    data_info.json (or partition/data_info.json)      [{path, prompt, ratio, height, width}, …]
    img_vae_features_512resolution/noflip/A_B.npy     (2C, h, w): mean and standard deviation, unscaled
    caption_feature_wmask/A_B.npz                     caption_feature (1, L, W), padded; attention_mask (1, L)

A picture `A/B.png` has the files `A_B`. Folders for many aspect ratios end in `ms` instead of `noflip`; Σ's are called
img_sdxl_vae_features_1024resolution_ms_new and caption_features_new.
"""

from pathlib import Path

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
from pixart.seeds import derive_seed


class OfficialFeatures:
    """An official feature folder with the interface of a `FeatureStore`. For more than a trial, convert it."""

    mirrored = False
    text_weights = UNKNOWN
    arrays: tuple[str, ...] = ()

    def __init__(self, folder: str | Path, table: list[Bucket], *, resolution: int, downsample: int, scale: float):
        """Read the list and the headers of all latents.

        Args:
            table: the buckets; latents of another size are left out.
            downsample, scale: of the autoencoder; the files do not say.

        Raises:
            InputError: no list, no or several folders that could be meant, or nothing usable.
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
                self.problems.append((item.id, item.problem or "the list lacks its prompt, height or width"))
                continue
            try:
                shape = np.load(self.latents / f"{name}.npy", mmap_mode="r").shape
            except (OSError, ValueError) as error:
                self.problems.append((item.id, f"latents cannot be read: {error}"))
                continue
            if len(shape) != 3 or shape[1:] not in sizes:
                self.problems.append((item.id, f"latents of shape {shape}, of no bucket"))
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
        both = torch.from_numpy(np.load(self.records[index].picture)).float() * self.scale
        return both.unflatten(0, (2, -1))

    def get(self, index: int, *, mirrored: bool = False) -> Features:
        if mirrored:
            raise InputError(f"{self.folder} has no mirrored latents; turn data.flip off")
        record = self.records[index]
        mean, std = self.moments(index)
        return Features(record.id, mean, std, [index], [1.0], record.height, record.width, record.bucket)

    def caption(self, number: int) -> Tensor:
        """States (L, W) of a caption's real tokens, in the file's precision."""
        with np.load(self.states / f"{self.records[number].picture.stem}.npz") as file:
            states = torch.from_numpy(file["caption_feature"])[0]
            mask = torch.from_numpy(file["attention_mask"]).flatten().bool() if "attention_mask" in file else None
        return states if mask is None else states[mask]

    def text(self, number: int) -> str:
        return self.records[number].captions[0]

    def prompt(self, text: str) -> Tensor | None:
        return None

    def null_states(self) -> tuple[Tensor, int]:
        raise InputError(f"{self.folder}: official features have no null states; set text.null to buffer")

    def describe(self) -> str:
        return f"{len(self):,} samples in the authors' layout, {len(self.problems)} left out"


def is_official(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in LISTS)


def find_features(folder: Path, pattern: str, what: str) -> Path:
    """The one folder of features that `pattern` means."""
    found = sorted(path for path in folder.glob(pattern) if path.is_dir())
    inner = [path / name for path in found for name in ("noflip", "ms") if (path / name).is_dir()]
    found = inner + [path for path in found if not any(path == deeper.parent for deeper in inner)]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise InputError(f"{folder}: expected one folder {pattern} of {what}, found {names}")
    return found[0]
