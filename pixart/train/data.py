"""A run's data: what it trains on and what it holds out, and this process's batches of it."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from pixart.data.batches import BucketBatches, derive_seed
from pixart.data.dataset import Captions, ImageDataset, collate, encode_captions
from pixart.data.images import Record
from pixart.data.openmoji import build_openmoji
from pixart.data.sources import make_table, scan
from pixart.errors import InputError
from pixart.model.text import TextEncoder
from pixart.pipeline import encode_null
from pixart.train.config import TrainConfig


@dataclass
class Data:
    """Records and text states of a run."""

    train: list[Record]
    held_out: list[Record]
    captions: Captions
    null: Tensor | None  # the null caption, if it is not the model's own
    report: str


def load_data(config: TrainConfig, accelerator: Accelerator) -> Data:
    """Scan the images, split off the held-out ones, encode every caption once and free the encoder."""
    data = config.data
    if data.prepare == "openmoji":
        with accelerator.main_process_first():
            build_openmoji(data.folder)
    multiple = config.model.patch_size * config.vae.downsample
    found = scan(data, make_table(data, multiple))
    records = found.records[:: data.every]
    held_out = [record for record in records if _share(record.id, config.seed) < data.validation]
    names = {record.id for record in held_out}
    train = [record for record in records if record.id not in names]
    if not train:
        raise InputError(f"data.validation {data.validation} holds out all {len(records)} images")

    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    encoder = TextEncoder.load(config.text, dtype=dtype, device=accelerator.device)
    if encoder.width != config.model.caption_channels:
        raise InputError(
            f"text.model {config.text.model} has states of width {encoder.width}, "
            f"model.caption_channels is {config.model.caption_channels}; set it to {encoder.width}"
        )
    texts = sorted({caption for record in records for caption in record.captions} | set(config.prompts))
    cut = sum(count > config.text.length for count in encoder.count_tokens(texts))
    captions = encode_captions(encoder, texts, dtype=getattr(torch, data.text_dtype))
    null = encode_null(encoder)
    encoder.close()

    report = [f"data {data.folder}:", found.describe()]
    if data.every > 1:
        report.append(f"every {data.every}th of them is used: {len(records)}")
    if held_out:
        report.append(f"{len(held_out)} held out for validation, {len(train)} to train on")
    if cut:
        report.append(f"{cut} of {len(texts)} captions are longer than {config.text.length} tokens and are cut")
    return Data(train, held_out, captions, null, "\n".join(report))


def make_batches(
    config: TrainConfig, accelerator: Accelerator, data: Data, position: int
) -> tuple[BucketBatches, DataLoader]:
    """This process's micro-batches from global batch `position` on."""
    sizes = sorted({(record.bucket.height, record.bucket.width) for record in data.train})
    batches = BucketBatches(
        [sizes.index((record.bucket.height, record.bucket.width)) for record in data.train],
        config.train.batch_size,
        seed=config.seed,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        accumulation=config.train.accumulation,
        leftovers=config.data.leftovers,
        position=position,
    )
    return batches, DataLoader(
        make_dataset(config, data, data.train),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=config.data.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=config.data.workers > 0,
    )


def make_dataset(config: TrainConfig, data: Data, records: list[Record]) -> ImageDataset:
    return ImageDataset(
        records,
        data.captions,
        seed=config.seed,
        latent_channels=config.vae.latent_channels,
        downsample=config.vae.downsample,
        flip=config.data.flip,
        random_crop=config.data.random_crop,
        cache=config.data.cache,
    )


def _share(name: str, seed: int) -> float:
    """A number in [0, 1) that belongs to an image: adding images does not move others across the split."""
    return derive_seed(seed, name, "split") / 2**63
