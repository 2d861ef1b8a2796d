"""A run's data: what it trains on and what it holds out, from images; feature stores do likewise."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixart.data.arrays import ARRAYS, ArrayContext, Extras
from pixart.data.batches import BucketBatches
from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.data.images import Record
from pixart.data.openmoji import build_openmoji
from pixart.data.samples import Batch, Captions, Drawing, ImageDataset, collate, encode_captions
from pixart.data.sources import make_table, scan
from pixart.encoders.autoencoder import Autoencoder, AutoencoderConfig
from pixart.encoders.fingerprint import fingerprint
from pixart.encoders.text import TextConfig, TextEncoder, encode_null, encoder_dtype
from pixart.errors import InputError
from pixart.seeds import Draw, derive_seed

MANY_CAPTIONS = 10_000  # above this, several processes that each encode them all are warned


@dataclass(frozen=True)
class DataSpec:
    """What of a run's configuration decides its samples."""

    data: DataConfig
    vae: AutoencoderConfig
    text: TextConfig
    patch_size: int  # of the network, in latents
    caption_channels: int  # width of the text states that the network takes
    prompts: tuple[str, ...]  # of sample grids; their states are kept too
    seed: int
    extras: Extras = field(default_factory=Extras)

    @property
    def drawing(self) -> Drawing:
        """How the samples' random numbers are drawn."""
        return Drawing(self.seed, self.patch_size, self.data.draws or "by_name", self.extras)

    @property
    def held_out_drawing(self) -> Drawing:
        """The same for the held-out ones: not of `seed`, so that runs of several seeds are validated alike."""
        return replace(self.drawing, seed=self.split_seed)

    @property
    def split_seed(self) -> int:
        """What the held-out share, and validation's times and noise, are drawn from."""
        return self.data.split_seed or 0

    @property
    def table(self) -> list[Bucket]:
        """The buckets that the images are sorted into."""
        return make_table(self.data, self.patch_size * self.vae.downsample)


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
    records: list[Record]  # the training images; none with feature stores
    fingerprint: str  # of the training samples' ids, in their order
    held_out_fingerprint: str  # likewise of the held-out ones
    text_weights: str | None  # fingerprint of the encoder that made the text states; None where nothing tells it
    places: list[Path]  # where some of it lies: if none of these is there any more, the data is gone
    report: str


def load_images(spec: DataSpec, accelerator: Accelerator, autoencoder: Autoencoder) -> Data:
    """Scan the images, set the held-out ones apart, encode every caption once and free the encoder."""
    data = spec.data
    if data.prepare == "openmoji":
        with accelerator.main_process_first():
            build_openmoji(data.folder)
    train, held_out, report = _find_records(spec)
    records = [*train, *held_out]

    encoder = load_encoder(spec, accelerator)
    texts = sorted({caption for record in records for caption in record.captions} | set(spec.prompts))
    cut = sum(count > spec.text.length for count in encoder.count_tokens(texts))
    captions = encode_captions(encoder, texts, dtype=getattr(torch, data.text_dtype))
    null, text_weights = encode_null(encoder), fingerprint(encoder.model)
    encoder.close()

    if accelerator.num_processes > 1 and len(texts) > MANY_CAPTIONS:
        report.append(
            f"warning: each of {accelerator.num_processes} processes encodes and holds all {len(texts)} captions at "
            "every start; scripts/extract.py encodes them once for all (data.features)"
        )
    if cut:
        report.append(f"{cut} of {len(texts)} captions are longer than {spec.text.length} tokens and are cut")
    sizes = sorted({(record.bucket.height, record.bucket.width) for record in records})

    context = ArrayContext(autoencoder, accelerator.device)
    makers = {name: ARRAYS[name](context) for name in spec.extras.arrays}

    def part(records: list[Record], drawing: Drawing) -> Part:
        dataset = ImageDataset(
            records, captions, drawing, latent_channels=spec.vae.latent_channels,
            downsample=spec.vae.downsample, flip=data.flip, random_crop=data.random_crop,
            posterior_mean=data.posterior == "mean", cache=data.cache, makers=makers,
        )  # fmt: skip
        numbers = np.array([sizes.index((r.bucket.height, r.bucket.width)) for r in records], dtype=np.int16)
        return Part(dataset, numbers, [(len(records), 1.0)])

    some = [record.picture for record in train[:: max(len(train) // 16, 1)]]
    places = [picture for picture in some if isinstance(picture, Path)] or [Path(data.folder)]
    prints = (hash_ids([_hash_records(part)]) for part in (train, held_out))
    parts = part(train, spec.drawing), part(held_out, spec.held_out_drawing)
    return Data(*parts, captions, null, train, *prints, text_weights, places, "\n".join(report))


def _find_records(spec: DataSpec) -> tuple[list[Record], list[Record], list[str]]:
    """The images to train on and those held out, and what there is to report."""
    data = spec.data
    found = scan(data, spec.table)
    records = found.records[:: data.every]
    report = [f"data {data.folder}:", found.describe()]
    if data.validation_folder:
        others = scan(replace(data, folder=data.validation_folder), spec.table)
        held_out = others.records
        report += [f"data.validation_folder {data.validation_folder}:", others.describe()]
    else:
        (held,) = choose_held_out([_hash_records(records)], spec)
        held_out = [record for record, out in zip(records, held, strict=True) if out]
        records = [record for record, out in zip(records, held, strict=True) if not out]
    return records, held_out, report + describe_split(spec, len(records), len(held_out))


def _hash_records(records: list[Record]) -> np.ndarray:
    return np.array([derive_seed(record.id) for record in records], dtype=np.int64)


def load_encoder(spec: DataSpec, accelerator: Accelerator) -> TextEncoder:
    """The text encoder, if its states fit the model."""
    encoder = TextEncoder.load(spec.text, dtype=encoder_dtype(accelerator.device), device=accelerator.device)
    if encoder.width != spec.caption_channels:
        raise InputError(
            f"text.model {spec.text.model} has states of width {encoder.width}, "
            f"model.caption_channels is {spec.caption_channels}; set it to {encoder.width}"
        )
    return encoder


def choose_held_out(sets: Sequence[np.ndarray], spec: DataSpec) -> list[np.ndarray]:
    """Which samples of each set are held out: a property of an id and the split's seed, so that adding images moves
    none across the split. A share that would hold out none of any set holds out the first in line.

    Args:
        sets: `derive_seed(id)` of every sample.
    """
    share = spec.data.validation
    if not share:
        return [np.zeros(len(hashes), dtype=bool) for hashes in sets]
    places = [_places(hashes, spec.split_seed) for hashes in sets]
    held = [part < share for part in places]
    if not any(part.any() for part in held):
        first = min(range(len(sets)), key=lambda i: places[i].min(initial=1.0))
        held[first][places[first].argmin()] = True
    for part in held:
        if part.all():
            raise InputError(f"data.validation {share} holds out all {len(part)} images")
    return held


def _places(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A uniform number in [0, 1) for each id: its hash mixed with the seed's by the finaliser of splitmix64 (Steele et
    al. 2014)."""
    with np.errstate(over="ignore"):
        x = hashes.astype(np.uint64) ^ np.uint64(derive_seed(seed, "split"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x / 2.0**64


def hash_ids(sets: list[np.ndarray]) -> str:
    """One text for all samples of a run, by their ids' hashes."""
    digest = hashlib.blake2b(digest_size=8)
    for hashes in sets:
        digest.update(np.ascontiguousarray(hashes, dtype=np.int64).tobytes())
    return digest.hexdigest()


def describe_split(spec: DataSpec, train: int, held_out: int) -> list[str]:
    lines = []
    if spec.data.every > 1:
        used = train if spec.data.validation_folder else train + held_out
        lines.append(f"every {spec.data.every}th of them is used: {used}")
    if held_out:
        lines.append(f"{held_out} held out for validation, {train} to train on")
    return lines


def draw_also(data: Data, draws: Mapping[str, Draw]) -> None:
    """Have every sample drawn with `draws` for the objective, in place of those that it is drawn with."""
    for part in (data.train, data.held_out):
        drawing = part.dataset.drawing
        part.dataset.drawing = replace(drawing, extras=replace(drawing.extras, draws=draws))


def make_batches(
    spec: DataSpec, data: Data, accelerator: Accelerator, *, batch_size: int, accumulation: int, position: int
) -> tuple[BucketBatches, DataLoader]:
    """This process's micro-batches from global batch `position` on; `batch_size` is that of a global batch."""
    batches = BucketBatches(
        data.train.buckets,
        batch_size,
        seed=spec.seed,
        sets=data.train.sets,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        accumulation=accumulation,
        leftovers=spec.data.leftovers,
        position=position,
    )
    return batches, DataLoader(
        data.train.dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, length=spec.text.length),
        num_workers=spec.data.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=spec.data.workers > 0,
    )


def _plain_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same, without the traceback that a loader's worker puts before the one line of an `InputError`."""
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).rpartition(f"{InputError.__module__}.InputError: ")[2].strip()) from None


def move_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on `device`; on a GPU copied from pinned memory on a stream of its own, beside the last step's work."""
    batches = _plain_errors(batches)
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
