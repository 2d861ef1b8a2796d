"""A feature store: latents and caption states of a data set, computed once, read at random from mapped files.

    manifest.json               what it was made with, counts, a checksum per file, and one of itself
    samples-00000.safetensors   latents (mean and standard deviation), ids, sizes, captions' numbers and weights
    captions-00000.safetensors  states of distinct captions, real tokens only, and their texts
    index.safetensors           bucket and hash of every sample: all that training holds in memory
    prompts.safetensors         the padded null states, and those of the config's prompts

Tensors of different lengths lie end to end in one flat tensor beside the places where each starts (`…_start`).
Letters in shape comments: N samples, V variants (2 with mirrored pictures), C latent channels, h × w latent size,
L tokens, W width of the caption states.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart.data.buckets import Bucket
from pixart.errors import InputError
from pixart.files import MANIFEST, digest_file, digest_text

VERSION = 1
UNKNOWN = "unknown"  # what features do not say of the models that made them
INDEX, PROMPTS = "index.safetensors", "prompts.safetensors"
OPEN_SHARDS = 2048  # mapped at once in a process; systems allow some 65,000


@dataclass(frozen=True)
class Features:
    """A sample of a store."""

    id: str
    mean: Tensor  # (C, h, w) fp32, scaled
    std: Tensor  # (C, h, w) fp32, scaled
    captions: list[int]  # numbers, for `caption`
    weights: list[float]  # of the captions, summing to 1
    height: int  # of the original image
    width: int
    bucket: Bucket


class FeatureStore:
    """A finished store. Opening reads the manifest and the index; samples are read where they lie."""

    def __init__(self, folder: str | Path):
        """
        Raises:
            InputError: no finished store there, a manifest that was edited, or files missing or of another size.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        check_files(self.folder, self.manifest)
        self.buckets = [Bucket(*bucket) for bucket in self.manifest["buckets"]]
        self.mirrored: bool = self.manifest["mirrored"]
        index = _open(self.folder / INDEX)
        self.bucket_numbers = index["bucket"].numpy()  # (N,) int16, into `buckets`
        self.hashes = index["hash"].numpy()  # (N,) int64, of the ids
        self._starts = index["shard_start"].numpy()  # (shards + 1,) number of each shard's first sample
        # tensors of a shard by its file name; each process, and each worker, maps for itself
        self._shard = lru_cache(OPEN_SHARDS)(lambda name: _open(self.folder / name))

    def __reduce__(self):
        return FeatureStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.bucket_numbers)

    def describe(self) -> str:
        """A line for a person."""
        manifest, text = self.manifest, self.manifest["text"]
        return (
            f"{len(self):,} samples, {manifest['captions']:,} captions encoded by {text['model']}, "
            f"{len(manifest['problems'])} left out"
        )

    @property
    def text_weights(self) -> str:
        """Fingerprint of the text encoder that made the states."""
        return self.manifest["text"]["weights"]

    def get(self, index: int, *, mirrored: bool = False) -> Features:
        """Sample `index`; `mirrored` takes the latents of the mirrored picture."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[number])
        shard = self._shard(sample_file(number))
        bucket = self.buckets[shard["bucket"][row]]
        start, end = shard["latent_start"][row : row + 2].tolist()
        channels, pixels = self.manifest["vae"]["latent_channels"], self.manifest["vae"]["downsample"]
        shape = (1 + self.mirrored, 2, channels, bucket.height // pixels, bucket.width // pixels)
        mean, std = shard["latents"][start:end].view(shape)[int(mirrored)].float()
        first, last = shard["caption_start"][row : row + 2].tolist()
        height, width = shard["size"][row].tolist()
        return Features(
            _text(shard, "id", row), mean, std, shard["caption"][first:last].tolist(),
            shard["caption_weight"][first:last].tolist(), height, width, bucket,
        )  # fmt: skip

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that its samples have beside their latents."""
        return self.manifest.get("arrays", [])

    def array(self, name: str, index: int, *, mirrored: bool = False) -> Tensor:
        """An array of sample `index`, or of its mirrored image, as its maker gave it; a view of the mapped file."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row, shard = index - int(self._starts[number]), self._shard(sample_file(number))
        start, end = shard[f"array.{name}_start"][row : row + 2].tolist()
        shape = shard[f"array.{name}_shape"][row].tolist()
        return shard[f"array.{name}"][start:end].view(1 + self.mirrored, *shape)[int(mirrored)]

    def caption(self, number: int) -> Tensor:
        """States (L, W) of a caption's real tokens, a view of the mapped file."""
        shard, row = self._caption_shard(number)
        start, end = shard["states_start"][row : row + 2].tolist()
        return shard["states"][start:end]

    def text(self, number: int) -> str:
        shard, row = self._caption_shard(number)
        return _text(shard, "text", row)

    def prompt(self, text: str) -> Tensor | None:
        """States (L, W) of a prompt that was encoded with the store, if it was."""
        return self._prompts().get("prompt:" + text)

    def null_states(self) -> tuple[Tensor, int]:
        """States (length, W) of the empty text, padded, as the encoder makes them; and how many of them are real."""
        prompts = self._prompts()
        if "null" not in prompts:
            raise InputError(
                f"{self.folder} has no null states, as official features have none; set text.null to buffer"
            )
        return prompts["null"], int(prompts["null_tokens"])

    def _prompts(self) -> dict[str, Tensor]:
        return _open(self.folder / PROMPTS)

    def _caption_shard(self, number: int) -> tuple[dict[str, Tensor], int]:
        shard, row = divmod(number, self.manifest["captions_per_shard"])
        return self._shard(caption_file(shard)), row


def sample_file(number: int) -> str:
    return f"samples-{number:05d}.safetensors"


def caption_file(number: int) -> str:
    return f"captions-{number:05d}.safetensors"


def join(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors end to end along their first axis, and where each starts (and the last ends) as int64."""
    lengths = torch.tensor([0] + [len(tensor) for tensor in tensors])
    return torch.cat(tensors), lengths.cumsum(0)


def join_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Texts as UTF-8 end to end, and where each starts."""
    return join([torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy()) for text in texts])


def _text(shard: dict[str, Tensor], name: str, row: int) -> str:
    start, end = shard[f"{name}_start"][row : row + 2].tolist()
    return shard[name][start:end].numpy().tobytes().decode()


def _open(path: Path) -> dict[str, Tensor]:
    """A file's tensors, mapped: nothing is read before it is used."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {CHECK}") from None


CHECK = "check the store with: python scripts/extract.py CONFIG --verify"


def read_manifest(folder: Path) -> dict:
    """A store's manifest, if it is as it was written.

    Raises:
        InputError: there is none, it was edited, or it is of another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"no feature store at {folder}; make it with: python scripts/extract.py CONFIG")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no finished feature store: it has no {MANIFEST}; begin or go on with: "
            "python scripts/extract.py CONFIG"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise InputError(f"{path}: version {found}, expected {VERSION}; extract again with this version of pixart")
    if manifest.get("checksum") != digest_manifest(manifest):
        raise InputError(f"{path} has been edited since it was written; take the change back, or extract again")
    return manifest


def digest_manifest(manifest: dict) -> str:
    """Checksum of all of a manifest but the checksum."""
    return digest_text(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True))


def check_files(folder: Path, manifest: dict) -> None:
    """Refuse a store whose files are missing or have another size; costs one `stat` each."""
    wrong = []
    for name, file in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if size != file["bytes"]:
            wrong.append(f"{name} has {size:,} bytes, expected {file['bytes']:,}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{folder} is damaged: {'; '.join(wrong[:5])}{more}. Extract again: what is whole is kept")


def verify(folder: str | Path) -> list[str]:
    """What is damaged in a store: every file is read and its checksum compared. Empty if all is well.

    Raises:
        InputError: no finished store, or its manifest was edited.
    """
    folder = Path(folder)
    damage = []
    for name, file in read_manifest(folder)["files"].items():
        try:
            if digest_file(folder / name) != file["blake2b"]:
                damage.append(f"{name} has changed since it was written")
        except OSError as error:
            damage.append(f"{name}: {error.strerror}")
    return damage
