"""A feature store: latents and caption states of a data set, computed once, with random access to memory-mapped files.

    manifest.json               settings it was made with, counts, a checksum per file and one of the manifest itself
    samples-00000.safetensors   latents (mean and standard deviation), ids, sizes, captions' numbers and weights
    captions-00000.safetensors  states of distinct captions, real tokens only, and their texts
    index.safetensors           bucket and hash of every sample: all that training holds in memory
    prompts.safetensors         the padded null states, and the states of the config's prompts

Tensors of different lengths are concatenated into one flat tensor, with another for the offsets at which they start
(`…_start`). Letters in shape comments: N samples, V variants (2 with mirrored images), C latent channels, h × w latent
size, L tokens, W width of the caption states.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pixart.arguments import say
from pixart.data.buckets import Bucket
from pixart.errors import InputError
from pixart.files import MANIFEST, digest_file, digest_text, inside, read_json
from pixart.invocation import command

VERSION = 1
UNKNOWN = "unknown"  # facts about the encoders that the authors' features do not record
INDEX, PROMPTS = "index.safetensors", "prompts.safetensors"
DAMAGED = "damaged.json"  # result of the last check, file → reason
OPEN_SHARDS = 2048  # mapped at once per process; Linux allows about 65,000


@dataclass(frozen=True)
class Features:
    """A sample of a store."""

    id: str
    mean: Tensor  # (C, h, w) fp32, scaled
    std: Tensor  # (C, h, w) fp32, scaled
    captions: list[int]  # numbers, as `FeatureStore.caption` takes them
    weights: list[float]  # of the captions, summing to 1
    height: int  # of the original image
    width: int
    bucket: Bucket


class FeatureStore:
    """A finished store. Opening it reads the manifest and the index; samples are read from mapped files on demand."""

    def __init__(self, folder: str | Path):
        """
        Raises:
            InputError: there is no finished store, its manifest was edited, or files are missing or of another size.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        check_files(self.folder, self.manifest)
        self.buckets = [Bucket(*bucket) for bucket in self.manifest["buckets"]]
        self.mirrored: bool = self.manifest["mirrored"]
        index = _open(self.folder / INDEX)
        self.bucket_numbers = index["bucket"].numpy()  # (N,) int16, into `buckets`
        self.hashes = index["hash"].numpy()  # (N,) int64, of the ids
        self._starts = index["shard_start"].numpy()  # (shards + 1,) index of each shard's first sample
        # tensors of a shard by its file name; each process and each worker maps the files itself
        self._shard = lru_cache(OPEN_SHARDS)(lambda name: _open(self.folder / name))

    def __reduce__(self):
        return FeatureStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.bucket_numbers)

    def describe(self) -> str:
        """A summary in one line."""
        manifest, text = self.manifest, self.manifest["text"]
        return (
            f"{len(self):,} samples, {manifest['captions']:,} captions encoded by {text['model']}, "
            f"{len(manifest['problems'])} left out"
        )

    @property
    def text_weights(self) -> str:
        """Fingerprint of the text encoder that made the states."""
        return self.manifest["text"]["weights"]

    @property
    def content(self) -> str:
        """A digest of its latents and states: of the checksums of their files."""
        files = sorted(self.manifest["files"].items())
        return digest_text(" ".join(file["blake2b"] for name, file in files if name not in (INDEX, PROMPTS)))

    def get(self, index: int, *, mirrored: bool = False) -> Features:
        """Sample `index`; with `mirrored`, the latents of the mirrored image."""
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
            _text(shard, "id", row),
            mean,
            std,
            shard["caption"][first:last].tolist(),
            shard["caption_weight"][first:last].tolist(),
            height,
            width,
            bucket,
        )

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that its samples have besides their latents."""
        return self.manifest.get("arrays", [])

    def array(self, name: str, index: int, *, mirrored: bool = False) -> Tensor:
        """An array of sample `index`, or of its mirrored image, as extracted; a view of the mapped file."""
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
        """States (length, W) of the empty text, padded as the encoder pads them, and the number of real tokens."""
        prompts = self._prompts()
        if "null" not in prompts:
            raise InputError(f"{self.folder} has no null states (official features have none); set text.null to buffer")
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
    """Concatenated tensors along their first axis, and the offsets (int64) at which each starts and the last ends."""
    lengths = torch.tensor([0] + [len(tensor) for tensor in tensors])
    return torch.cat(tensors), lengths.cumsum(0)


def join_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Concatenated texts as UTF-8, and the offsets at which each starts and the last ends."""
    return join(
        [
            torch.from_numpy(np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).copy())
            for text in texts
        ]
    )


def _text(shard: dict[str, Tensor], name: str, row: int) -> str:
    start, end = shard[f"{name}_start"][row : row + 2].tolist()
    return shard[name][start:end].numpy().tobytes().decode("utf-8", "surrogatepass")


def read_texts(path: Path, name: str) -> list[str]:
    """All texts `name` of one file; errors of safetensors are passed on."""
    with safe_open(path, framework="pt") as file:
        texts, starts = file.get_tensor(name), file.get_tensor(f"{name}_start").tolist()
    return [texts[i:j].numpy().tobytes().decode("utf-8", "surrogatepass") for i, j in itertools.pairwise(starts)]


def read_names(path: Path) -> list[str]:
    """The names of a file's tensors; errors of safetensors are passed on."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _open(path: Path) -> dict[str, Tensor]:
    """A file's tensors, mapped: nothing is read until it is used."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_check()}") from None


def _check() -> str:
    return f"check the store with: {command('extract')} CONFIG --verify"


def read_manifest(folder: Path) -> dict:
    """A store's manifest, verified by its checksum.

    Raises:
        InputError: it is missing, was edited, or is of another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"no feature store at {folder}; make it with: {command('extract')} CONFIG")
    if not path.exists():
        raise InputError(
            f"{folder} is not a finished feature store: it has no {MANIFEST}; start or resume extraction with: "
            f"{command('extract')} CONFIG"
        )
    manifest = read_json(path, expected="a store's manifest")
    if manifest.get("version") != VERSION:
        found = say(manifest.get("version"))
        raise InputError(f"{path}: version {found}, expected {VERSION}; extract again with this version of pixart")
    if manifest.get("checksum") != digest_manifest(manifest):
        raise InputError(f"{path} has been edited since it was written; undo the change, or extract again")
    return manifest


def digest_manifest(manifest: dict) -> str:
    """Checksum of a manifest without its checksum entry."""
    return digest_text(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True))


def check_files(folder: Path, manifest: dict) -> None:
    """Refuse a store if files are missing or have another size; costs one `stat` per file."""
    wrong = []
    for name, file in manifest["files"].items():
        try:
            size = (folder / inside(name, "a file")).stat().st_size
        except (OSError, ValueError):
            wrong.append(f"{name} is missing")
            continue
        if size != file["bytes"]:
            wrong.append(f"{name} has {size:,} bytes, expected {file['bytes']:,}")
    if (folder / DAMAGED).exists():
        wrong += [f"{name} {reason}" for name, reason in read_json(folder / DAMAGED).items()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{folder} is damaged: {'; '.join(wrong[:5])}{more}. Extract again: intact files are kept")


def verify(folder: str | Path) -> list[str]:
    """`find_damage`, as lines."""
    return describe_damage(find_damage(folder))


def describe_damage(damage: Mapping[str, str]) -> list[str]:
    """One line per file."""
    return [f"{name} {what}" if what.startswith("has ") else f"{name}: {what}" for name, what in damage.items()]


def find_damage(folder: str | Path) -> dict[str, str]:
    """The damaged files of a store with the reason; empty if there are none. Every file is read and its checksum
    compared.

    Raises:
        InputError: there is no finished store, or its manifest was edited.
    """
    folder = Path(folder)
    damage = {}
    for name, file in read_manifest(folder)["files"].items():
        try:
            if digest_file(folder / inside(name, "a file")) != file["blake2b"]:
                damage[name] = "has changed since it was written"
        except (OSError, ValueError) as error:
            damage[name] = getattr(error, "strerror", None) or str(error)
    return damage
