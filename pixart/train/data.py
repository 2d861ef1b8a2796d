"""A run's data: what it trains on and holds out, from pictures or feature stores, and this process's batches."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixart.buckets import Bucket
from pixart.data.batches import BucketBatches
from pixart.data.dataset import Batch, Captions, FeatureDataset, ImageDataset, collate, encode_captions
from pixart.data.images import Record
from pixart.data.official import OfficialFeatures, is_official
from pixart.data.openmoji import build_openmoji
from pixart.data.sources import make_table, scan
from pixart.data.store import UNKNOWN, FeatureStore
from pixart.errors import InputError
from pixart.extract import autoencoder_fingerprint, encoder_dtype, fingerprint
from pixart.model.autoencoder import Autoencoder
from pixart.model.text import TextEncoder
from pixart.pipeline import encode_null
from pixart.seeds import derive_seed
from pixart.train.config import TrainConfig

MANY_CAPTIONS = 10_000  # above this, several processes that each encode them all are warned


@dataclass
class Part:
    """Samples for one use."""

    dataset: Dataset
    buckets: np.ndarray  # the bucket's number of every sample
    sets: list[tuple[int, float]]  # (number of samples, repeats an epoch) of each set that they come from

    def __len__(self) -> int:
        return len(self.buckets)

    def by_bucket(self, size: int) -> Iterator[list[int]]:
        """All samples once, in lists of one bucket and at most `size`."""
        for number in np.unique(self.buckets):
            samples = np.flatnonzero(self.buckets == number).tolist()
            yield from (samples[i : i + size] for i in range(0, len(samples), size))


@dataclass
class Data:
    """Samples and text states of a run."""

    train: Part
    held_out: Part
    captions: Captions  # of the prompts at least
    null: Tensor | None  # the null caption, if it is not the model's own
    records: list[Record]  # the training pictures; none with feature stores
    fingerprint: str  # of the training samples' ids, in their order
    places: list[Path]  # where some of it lies: if none of these is there any more, the data is gone
    report: str


def load_data(config: TrainConfig, accelerator: Accelerator, autoencoder: Autoencoder) -> Data:
    """Pictures and their captions' states, or feature stores; without the held-out samples.

    Raises:
        InputError: no usable data, or features that were not made for this configuration.
    """
    if config.data.features or config.data.mix:
        return load_features(config, accelerator, autoencoder)
    return load_pictures(config, accelerator)


def run_table(config: TrainConfig) -> list[Bucket]:
    """The buckets that a run's pictures are sorted into."""
    return make_table(config.data, config.model.patch_size * config.vae.downsample)


def load_pictures(config: TrainConfig, accelerator: Accelerator) -> Data:
    """Scan the images, split off the held-out ones, encode every caption once and free the encoder."""
    data = config.data
    if data.prepare == "openmoji":
        with accelerator.main_process_first():
            build_openmoji(data.folder)
    found = scan(data, run_table(config))
    records = found.records[:: data.every]
    hashes = np.array([derive_seed(record.id) for record in records])
    held = choose_held_out(hashes, config)
    train = [record for record, out in zip(records, held, strict=True) if not out]
    held_out = [record for record, out in zip(records, held, strict=True) if out]

    encoder = load_encoder(config, accelerator)
    texts = sorted({caption for record in records for caption in record.captions} | set(config.prompts))
    cut = sum(count > config.text.length for count in encoder.count_tokens(texts))
    captions = encode_captions(encoder, texts, dtype=getattr(torch, data.text_dtype))
    null = encode_null(encoder)
    encoder.close()

    report = [f"data {data.folder}:", found.describe(), *describe_split(config, len(train), len(held_out))]
    if accelerator.num_processes > 1 and len(texts) > MANY_CAPTIONS:
        report.append(
            f"warning: each of {accelerator.num_processes} processes encodes and holds all {len(texts)} captions at "
            "every start; scripts/extract.py encodes them once for all (data.features)"
        )
    if cut:
        report.append(f"{cut} of {len(texts)} captions are longer than {config.text.length} tokens and are cut")
    sizes = sorted({(record.bucket.height, record.bucket.width) for record in records})

    def part(records: list[Record]) -> Part:
        dataset = ImageDataset(
            records, captions, seed=config.seed, latent_channels=config.vae.latent_channels,
            downsample=config.vae.downsample, flip=data.flip, random_crop=data.random_crop,
            posterior_mean=data.posterior == "mean", cache=data.cache,
        )  # fmt: skip
        numbers = np.array([sizes.index((r.bucket.height, r.bucket.width)) for r in records], dtype=np.int16)
        return Part(dataset, numbers, [(len(records), 1.0)])

    some = [record.picture for record in train[:: max(len(train) // 16, 1)]]
    places = [picture for picture in some if isinstance(picture, Path)] or [Path(data.folder)]
    ids = hash_ids([hashes[~held]])
    return Data(part(train), part(held_out), captions, null, train, ids, places, "\n".join(report))


def load_features(config: TrainConfig, accelerator: Accelerator, autoencoder: Autoencoder) -> Data:
    """Open the stores and split off the held-out samples; the text encoder is loaded only for prompts they lack."""
    data = config.data
    repeats = {**({data.features: 1.0} if data.features else {}), **data.mix}
    stores = [open_features(folder, config, autoencoder) for folder in repeats]
    report = [f"features {folder}: {store.describe()}" for folder, store in zip(repeats, stores, strict=True)]
    held = [choose_held_out(store.hashes, config) for store in stores]

    def part(which: list[np.ndarray | None]) -> Part:
        numbers = [
            store.bucket_numbers if part is None else store.bucket_numbers[part]
            for store, part in zip(stores, which, strict=True)
        ]
        sets = [(len(part), often) for part, often in zip(numbers, repeats.values(), strict=True)]
        dataset = FeatureDataset(
            stores, which, seed=config.seed, flip=data.flip, posterior_mean=data.posterior == "mean"
        )
        return Part(dataset, np.concatenate(numbers) if len(numbers) > 1 else numbers[0], sets)

    train = part([np.flatnonzero(~out).astype(np.int32) if out.any() else None for out in held])
    held_out = part([np.flatnonzero(out).astype(np.int32) for out in held])
    report += describe_split(config, len(train), len(held_out))
    captions, null = prompt_states(config, accelerator, stores[0])
    ids = hash_ids([store.hashes[~out] for store, out in zip(stores, held, strict=True)])
    return Data(train, held_out, captions, null, [], ids, [store.folder for store in stores], "\n".join(report))


def open_features(folder: str, config: TrainConfig, autoencoder: Autoencoder) -> FeatureStore | OfficialFeatures:
    """A store, or the authors' folder, that fits the configuration.

    Raises:
        InputError: it does not fit; names everything that differs, with both values.
    """
    data, table, wrong = config.data, run_table(config), []
    if is_official(folder):
        store = OfficialFeatures(
            folder, table, resolution=data.resolution, downsample=autoencoder.downsample, scale=autoencoder.scale
        )
        if (width := store.caption(0).shape[1]) != config.model.caption_channels:
            wrong.append(f"the width of text states: {width} there, {config.model.caption_channels} here")
    else:
        store = FeatureStore(folder)
        wrong += _differences(store, config, table, autoencoder)
    if data.flip and not store.mirrored:
        wrong.append("data.flip is on, it has no mirrored latents (extract.mirrored)")
    if data.random_crop:
        wrong.append("data.random_crop is on, latents have one crop")
    if wrong:
        raise InputError(f"features {folder} do not fit this configuration: {'; '.join(wrong)}")
    return store


def _differences(
    store: FeatureStore, config: TrainConfig, table: list[Bucket], autoencoder: Autoencoder
) -> list[str]:  # fmt: skip
    manifest, data = store.manifest, config.data
    vae, text = manifest["vae"], manifest["text"]
    pairs = [
        ("data.resolution", manifest["resolution"], data.resolution),
        ("data.every", manifest["every"], data.every),
        ("the buckets", _sizes(store.buckets), _sizes(table)),
        ("the autoencoder's channels", vae["latent_channels"], config.vae.latent_channels),
        ("the autoencoder's scaling factor", vae["scale"], autoencoder.scale),
        ("the autoencoder's weights", vae["weights"], autoencoder_fingerprint(autoencoder)),
        ("the width of text states (model.caption_channels)", text["width"], config.model.caption_channels),
        ("text.length", manifest["text_length"], config.text.length),
        ("text.clean", manifest["text_clean"], config.text.clean),
    ]
    return [f"{name}: {there} there, {here} here" for name, there, here in pairs if there != here]


def _sizes(table: list[Bucket]) -> str:
    sizes = sorted((bucket.height, bucket.width) for bucket in table)
    return f"{len(sizes)}, from {sizes[0][0]}×{sizes[0][1]} to {sizes[-1][0]}×{sizes[-1][1]}"


def prompt_states(
    config: TrainConfig, accelerator: Accelerator, store: FeatureStore | OfficialFeatures
) -> tuple[Captions, Tensor | None]:
    """States of the config's prompts and the null caption, from the store as far as it has them."""
    states = {prompt: store.prompt(prompt) for prompt in config.prompts}
    if missing := [prompt for prompt, found in states.items() if found is None]:
        encoder = load_encoder(config, accelerator)
        here, there = fingerprint(encoder.model), store.text_weights
        if there not in (here, UNKNOWN):
            raise InputError(
                f"features {store.folder} were encoded by another text encoder than {config.text.model} "
                f"(weights {there} there, {here} here), which the prompts need that the store does not hold"
            )
        encoded = encode_captions(encoder, missing, dtype=getattr(torch, config.data.text_dtype))
        encoder.close()
        states |= {prompt: encoded[prompt] for prompt in missing}
    captions = Captions(list(states.values()), {prompt: i for i, prompt in enumerate(states)})
    if config.text.null == "buffer":
        return captions, None
    null, tokens = store.null_states()
    return captions, null if config.text.null == "empty" else null[:tokens]


def load_encoder(config: TrainConfig, accelerator: Accelerator) -> TextEncoder:
    """The text encoder, if its states fit the model."""
    encoder = TextEncoder.load(config.text, dtype=encoder_dtype(accelerator.device), device=accelerator.device)
    if encoder.width != config.model.caption_channels:
        raise InputError(
            f"text.model {config.text.model} has states of width {encoder.width}, "
            f"model.caption_channels is {config.model.caption_channels}; set it to {encoder.width}"
        )
    return encoder


def choose_held_out(hashes: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Which samples are held out: a property of an id and the seed, so that adding images moves none across the split.

    `hashes` are `derive_seed(id)`; mixed with the seed's by the finaliser of splitmix64 (Steele et al. 2014).
    """
    if not config.data.validation:
        return np.zeros(len(hashes), dtype=bool)
    with np.errstate(over="ignore"):
        x = hashes.astype(np.uint64) ^ np.uint64(derive_seed(config.seed, "split"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    held = x / 2.0**64 < config.data.validation
    if held.all():
        raise InputError(f"data.validation {config.data.validation} holds out all {len(held)} images")
    return held


def hash_ids(sets: list[np.ndarray]) -> str:
    """One text for all samples of a run, by their ids' hashes."""
    digest = hashlib.blake2b(digest_size=8)
    for hashes in sets:
        digest.update(np.ascontiguousarray(hashes, dtype=np.int64).tobytes())
    return digest.hexdigest()


def describe_split(config: TrainConfig, train: int, held_out: int) -> list[str]:
    lines = []
    if config.data.every > 1:
        lines.append(f"every {config.data.every}th of them is used: {train + held_out}")
    if held_out:
        lines.append(f"{held_out} held out for validation, {train} to train on")
    return lines


def make_batches(
    config: TrainConfig, accelerator: Accelerator, data: Data, position: int
) -> tuple[BucketBatches, DataLoader]:
    """This process's micro-batches from global batch `position` on."""
    batches = BucketBatches(
        data.train.buckets,
        config.train.batch_size,
        seed=config.seed,
        sets=data.train.sets,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        accumulation=config.train.accumulation,
        leftovers=config.data.leftovers,
        position=position,
    )
    return batches, DataLoader(
        data.train.dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, length=config.text.length),
        num_workers=config.data.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=config.data.workers > 0,
    )


def move_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on `device`; on a GPU copied from pinned memory on a stream of its own, beside the last step's work."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch.to(device)
        torch.cuda.current_stream(device).wait_stream(stream)
        moved.record_stream(torch.cuda.current_stream(device))
        yield moved
