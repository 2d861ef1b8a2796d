"""Throughput of training samples: our feature store against the authors' layout; and an index of 25 million samples."""

import gc
import json
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixart.data.batches import BucketBatches
from pixart.data.buckets import Bucket, bucket_table
from pixart.data.images import Record
from pixart.data.samples import Drawing, collate
from pixart.device import resident
from pixart.features.build import EncodedBatch, Share, finish, note_file, write_captions, write_samples
from pixart.features.samples import FeatureDataset
from pixart.features.store import INDEX, VERSION, FeatureStore, caption_file, digest_manifest, sample_file
from pixart.files import MANIFEST, write_json

WIDTH, LENGTH = 4096, 120  # of T5-XXL's states in PixArt-α


def make_layouts(folder: Path, resolution: int, count: int, tokens: tuple[int, int], seed: int = 0) -> None:
    """Write random latents and captions of `tokens` (from, to) tokens as a store and in the authors' layout.

    The authors' layout has two files per sample: captions padded to 120 tokens in fp16, latents in fp32.
    """
    rng, side = np.random.default_rng(seed), resolution // 8
    lengths = rng.integers(tokens[0], tokens[1], count, endpoint=True)
    bucket = Bucket(1.0, resolution, resolution)
    captions = [f"caption {i:06d}" for i in range(count)]
    records = [
        Record(f"{i:06d}.png", folder, (caption,), (1.0,), 1024, 1024, bucket) for i, caption in enumerate(captions)
    ]
    plan = {
        "buckets": [[1.0, resolution, resolution]],
        "resolution": resolution,
        "every": 1,
        "text_length": LENGTH,
        "text_clean": True,
        "samples": count,
        "captions": count,
        "source": "random",
        "mirrored": False,
        "latent_dtype": "float16",
        "text_dtype": "bfloat16",
        "batch": 16,
        "caption_batch": 64,
        "samples_per_shard": 4096,
        "captions_per_shard": 2048,
    }
    store, official = folder / "store", folder / "official"
    store.mkdir(parents=True)
    official.mkdir()
    write_json(store / "vae.json", {"latent_channels": 4, "downsample": 8, "scale": 0.18215, "weights": "random"})
    write_json(store / "text.json", {"model": "random", "width": WIDTH, "weights": "random"})
    save_file({"null": torch.zeros(LENGTH, WIDTH), "null_tokens": torch.tensor(1)}, store / "prompts.safetensors")
    note_file(store / "prompts.safetensors", 0, [])

    def states(texts: list[str]) -> list[Tensor]:
        return [_normal((lengths[int(text[8:])], WIDTH), seed + int(text[8:])).bfloat16() for text in texts]

    def latents(batches: list[list[int]]) -> Iterator[EncodedBatch]:
        for batch in batches:
            both = torch.stack([_normal((1, 2, 4, side, side), i) for i in batch])
            yield EncodedBatch(list(range(len(batch))), both.half(), [])

    numbers = {caption: i for i, caption in enumerate(captions)}
    write_captions(store, plan, captions, Share(), states, lambda _: None)
    write_samples(store, plan, records, numbers, Share(), latents, lambda _: None)
    finish(store, plan, [])
    mask = np.zeros((1, LENGTH), np.int64)
    for i in range(count):
        mask[:] = np.arange(LENGTH) < lengths[i]
        padded = _normal((1, LENGTH, WIDTH), seed + i).half().numpy()
        np.savez_compressed(official / f"{i:06d}.npz", caption_feature=padded, attention_mask=mask)
        np.save(official / f"{i:06d}.npy", _normal((8, side, side), i).numpy())


def _normal(shape: tuple, seed: int) -> Tensor:
    return torch.randn(*map(int, shape), generator=torch.Generator().manual_seed(seed))


class OfficialLayout(Dataset):
    """The authors' way of reading: a compressed `.npz` and a `.npy` per sample, padded captions, posterior noise."""

    def __init__(self, folder: Path):
        self.names = sorted(path.stem for path in folder.glob("*.npz"))
        self.folder = folder

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        path = self.folder / self.names[index]
        text = np.load(path.with_suffix(".npz"))
        mean, std = torch.from_numpy(np.load(path.with_suffix(".npy"))).chunk(2)
        return {
            "latents": mean + std * torch.randn_like(mean),
            "caption": torch.from_numpy(text["caption_feature"]),
            "mask": torch.from_numpy(text["attention_mask"])[None],
            "size": torch.tensor([1024.0, 1024.0]),
            "aspect_ratio": 1.0,
        }


def throughput(folder: Path, *, batch_size: int, workers: int, cold: bool) -> dict[str, float]:
    """Samples per second of both layouts through a DataLoader, one pass in random order."""
    count = len(list((folder / "official").glob("*.npz")))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    rates = {}
    for name in ("official", "store"):
        if cold:
            drop_cache(folder / name)
        options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        if name == "official":
            loader = DataLoader(OfficialLayout(folder / name), batch_size, sampler=order, drop_last=True, **options)
        else:
            store = FeatureStore(folder / name)
            batches = BucketBatches(store.bucket_numbers, batch_size, seed=0)
            loader = DataLoader(
                FeatureDataset([store], [None], Drawing(0)),
                batch_sampler=batches,
                collate_fn=partial(collate, length=LENGTH),
                **options,
            )
        begun, seen, total = time.perf_counter(), 0, count // batch_size * batch_size
        for batch in loader:
            seen += len(batch["latents"] if name == "official" else batch.latents)
            if seen >= total:
                break
        rates[name] = seen / (time.perf_counter() - begun)
        del loader, batch
        gc.collect()
    return rates


def drop_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from the disk next."""
    os.sync()
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def compare_layouts(folder: Path, resolution: int, count: int, tokens: tuple[int, int], **options) -> dict:
    """Build both layouts in `folder`, measure them with cold and warm page cache, and remove them."""
    make_layouts(folder, resolution, count, tokens)
    sizes = {name: folder_bytes(folder / name) / count for name in ("official", "store")}
    rates = {when: throughput(folder, cold=when == "cold", **options) for when in ("cold", "warm")}
    shutil.rmtree(folder)
    return {"resolution": resolution, "tokens": tokens, "samples": count, "bytes": sizes, "samples_per_second": rates}


def simulate_index(folder: Path, samples: int) -> dict[str, float]:
    """Open a store of `samples` samples in 40 buckets and resume in the middle of an epoch; only its index is real."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    per_file, table = 4096, bucket_table(256, 16)
    shards = -(-samples // per_file)
    starts = np.minimum(np.arange(shards + 1, dtype=np.int64) * per_file, samples)
    save_file(
        {
            "bucket": torch.from_numpy(rng.integers(0, len(table), samples, dtype=np.int16)),
            "hash": torch.from_numpy(rng.integers(0, 2**63, samples, dtype=np.int64)),
            "shard_start": torch.from_numpy(starts),
        },
        folder / INDEX,
    )
    names = [sample_file(i) for i in range(shards)] + [caption_file(i) for i in range(2 * shards)]
    for name in names:
        (folder / name).write_bytes(b"")
    manifest = {
        "version": VERSION,
        "buckets": [[b.ratio, b.height, b.width] for b in table],
        "mirrored": False,
        "captions": samples,
        "captions_per_shard": 2048,
        "problems": [],
        "files": {
            **{name: {"bytes": 0, "blake2b": ""} for name in names},
            INDEX: {"bytes": (folder / INDEX).stat().st_size, "blake2b": ""},
        },
    }
    manifest["checksum"] = digest_manifest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    before, begun = _memory(), time.perf_counter()
    store = FeatureStore(folder)
    batches = BucketBatches(store.bucket_numbers, 1024, seed=0)
    opened = time.perf_counter()
    batches.position = 3 * batches.per_epoch + batches.per_epoch // 2
    next(iter(batches))
    resumed = time.perf_counter()
    next(iter(batches))
    result = {
        "samples": samples,
        "open_seconds": opened - begun,
        "resume_seconds": resumed - opened,
        "next_batch_seconds": time.perf_counter() - resumed,
        "bytes_per_sample": (_memory() - before) / samples,
        "peak_bytes_per_sample": ((resident("VmHWM") or 0) - before) / samples,
    }
    shutil.rmtree(folder)
    return result


def _memory() -> int:
    """Resident memory of this process in bytes, mapped files included; 0 if not on Linux."""
    gc.collect()
    return resident("VmRSS") or 0
