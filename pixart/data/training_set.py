"""A run's data from images, split into training and held-out samples; `pixart.features.training_set` does the same for
feature stores."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixart.data.arrays import ArrayContext, Extras, open_array
from pixart.data.batches import BucketBatches
from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.data.images import Record
from pixart.data.prepare import prepare
from pixart.data.samples import Batch, Captions, Drawing, ImageDataset, collate, describe_captions, encode_captions
from pixart.data.sources import make_table, scan
from pixart.data.workers import leave_signals, lost_worker
from pixart.encoders.autoencoder import Autoencoder, AutoencoderConfig
from pixart.encoders.fingerprint import fingerprint
from pixart.encoders.text import TextConfig, TextEncoder, encode_null, encoder_dtype
from pixart.errors import InputError
from pixart.invocation import command
from pixart.seeds import Draw, derive_seed

MANY_CAPTIONS = 10_000  # above this, warn if several processes each encode all captions


@dataclass(frozen=True)
class DataSpec:
    """The part of a run's configuration that determines its samples."""

    data: DataConfig
    vae: AutoencoderConfig
    text: TextConfig
    patch_size: int  # of the network, in latent pixels
    caption_channels: int  # width of the text states that the network takes
    prompts: tuple[str, ...]  # for sample grids; their states are kept, too
    seed: int
    extras: Extras = field(default_factory=Extras)

    @property
    def drawing(self) -> Drawing:
        """How the samples' random numbers are drawn."""
        return Drawing(self.seed, self.patch_size, self.data.draws or "by_name", self.extras)

    @property
    def held_out_drawing(self) -> Drawing:
        """The same for the held-out samples; independent of `seed`, so that runs of several seeds are validated
        alike."""
        return replace(self.drawing, seed=self.split_seed)

    @property
    def split_seed(self) -> int:
        """The seed of the held-out share and of validation's times and noise."""
        return self.data.split_seed or 0

    @property
    def table(self) -> list[Bucket]:
        """The buckets into which the images are sorted."""
        return make_table(self.data, self.patch_size * self.vae.downsample)


@dataclass
class Part:
    """The samples for one purpose: training or validation."""

    dataset: Dataset
    buckets: np.ndarray  # the bucket number of every sample
    sets: list[tuple[int, float]]  # (number of samples, repeats per epoch) of each set that they come from

    def __len__(self) -> int:
        return len(self.buckets)

    def by_bucket(self, size: int) -> Iterator[list[int]]:
        """All samples once, in lists of at most `size` samples of one bucket."""
        for number in np.unique(self.buckets):
            samples = np.flatnonzero(self.buckets == number).tolist()
            yield from (samples[i : i + size] for i in range(0, len(samples), size))


@dataclass
class Data:
    """Samples and text states of a run."""

    train: Part
    held_out: Part
    captions: Captions  # at least of the prompts
    null: Tensor | None  # the null caption, if it is not the model's own
    records: list[Record]  # the training images; empty with feature stores
    fingerprint: str  # of the training samples' ids, in order
    held_out_fingerprint: str  # the same for the held-out samples
    text_weights: str | None  # fingerprint of the encoder that made the text states; None if unknown
    places: list[Path]  # some of its files or folders: if none of them exists any more, the data is gone
    report: str
    # kind of content → fingerprint of the content behind the ids, as far as known without reading every image
    contents: dict[str, str] = field(default_factory=dict)


def load_images(spec: DataSpec, accelerator: Accelerator, autoencoder: Autoencoder) -> Data:
    """Scan the images, split off the held-out ones, encode every caption once, and free the encoder."""
    data = spec.data
    if data.prepare:
        with accelerator.main_process_first():
            prepare(data)
    train, held_out, report = _find_records(spec)
    if data.shuffle_captions:
        train = exchange_captions(train, spec.split_seed)
        report.append("data.shuffle_captions: every training image has the captions of another one")
    others = _find_regularization(data, spec.table, report)
    # as many of the others as of the images to learn, in every epoch
    sets = [(len(train), len(others) / len(train)), (len(others), 1.0)] if others else None
    train = [*train, *others]
    records = [*train, *held_out]

    encoder = load_encoder(spec, accelerator)
    texts = sorted({caption for record in records for caption in record.captions} | set(spec.prompts))
    described = describe_captions(encoder, texts)
    captions = encode_captions(encoder, texts, dtype=getattr(torch, data.text_dtype))
    null, text_weights = encode_null(encoder), fingerprint(encoder.model)
    encoder.close()

    if accelerator.num_processes > 1 and len(texts) > MANY_CAPTIONS:
        report.append(
            f"warning: each of {accelerator.num_processes} processes encodes and holds all {len(texts)} captions at "
            f"every start; encode them once for all: {command('extract')} CONFIG data.features=STORE"
        )
    report += described
    sizes = sorted({(record.bucket.height, record.bucket.width) for record in records})

    context = ArrayContext(autoencoder, accelerator.device)
    makers = {name: open_array(name, context) for name in spec.extras.arrays}

    def part(records: list[Record], drawing: Drawing, sets: list[tuple[int, float]] | None = None) -> Part:
        dataset = ImageDataset(
            records,
            captions,
            drawing,
            latent_channels=spec.vae.latent_channels,
            downsample=spec.vae.downsample,
            flip=data.flip,
            random_crop=data.random_crop,
            posterior_mean=data.posterior == "mean",
            cache=data.cache,
            makers=makers,
        )
        numbers = np.array([sizes.index((r.bucket.height, r.bucket.width)) for r in records], dtype=np.int16)
        return Part(dataset, numbers, sets or [(len(records), 1.0)])

    some = [record.picture for record in train[:: max(len(train) // 16, 1)]]
    places = [picture for picture in some if isinstance(picture, Path)] or [Path(data.folder)]
    prints = (hash_ids([_hash_records(part)]) for part in (train, held_out))
    parts = part(train, spec.drawing, sets), part(held_out, spec.held_out_drawing)
    contents = hash_contents(records)
    return Data(*parts, captions, null, train, *prints, text_weights, places, "\n".join(report), contents)


def _find_records(spec: DataSpec) -> tuple[list[Record], list[Record], list[str]]:
    """The images to train on, those held out, and lines for the report."""
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


def exchange_captions(records: Sequence[Record], seed: int) -> list[Record]:
    """The records in the same order, each with the captions of another one: the next in an order drawn from `seed`."""
    order = sorted(range(len(records)), key=lambda i: derive_seed(seed, "captions", records[i].id))
    found = list(records)
    for here, there in zip(order, [*order[1:], *order[:1]], strict=True):
        found[here] = replace(records[here], captions=records[there].captions, weights=records[there].weights)
    return found


def _find_regularization(data: DataConfig, table: list[Bucket], report: list[str]) -> list[Record]:
    """The images of `data.regularization`, with ids that no other image has; their description goes into `report`."""
    if not data.regularization:
        return []
    own = {"format": "auto", "images": None, "caption": data.regularization_caption}
    source = replace(data, folder=data.regularization, **own)
    found = scan(source, table)
    report += [f"data.regularization {data.regularization}, loss × {data.regularization_weight:g}:", found.describe()]
    return [
        replace(record, id=f"regularization/{record.id}", loss_weight=data.regularization_weight)
        for record in found.records
    ]


def _hash_records(records: list[Record]) -> np.ndarray:
    return np.array([derive_seed(record.id) for record in records], dtype=np.int64)


def load_encoder(spec: DataSpec, accelerator: Accelerator) -> TextEncoder:
    """Load the text encoder and check that its states fit the model."""
    encoder = TextEncoder.load(spec.text, dtype=encoder_dtype(accelerator.device), device=accelerator.device)
    if encoder.width != spec.caption_channels:
        raise InputError(
            f"text.model {spec.text.model} has states of width {encoder.width}, "
            f"but model.caption_channels is {spec.caption_channels}; set it to {encoder.width}"
        )
    return encoder


def choose_held_out(sets: Sequence[np.ndarray], spec: DataSpec) -> list[np.ndarray]:
    """Which samples of each set are held out. This depends only on the id and the split's seed, so that adding images
    moves none from one side to the other. If the share selects no sample at all, the closest one is held out.

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
    """A uniform number in [0, 1) for each id: its hash mixed with the seed's hash by the finaliser of splitmix64
    (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = hashes.astype(np.uint64) ^ np.uint64(derive_seed(seed, "split"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x / 2.0**64


def hash_ids(sets: list[np.ndarray]) -> str:
    """A digest of all samples of a run, from the hashes of their ids."""
    digest = hashlib.blake2b(digest_size=8)
    for hashes in sets:
        digest.update(np.ascontiguousarray(hashes, dtype=np.int64).tobytes())
    return digest.hexdigest()


def hash_contents(records: Sequence[Record]) -> dict[str, str]:
    """Fingerprints that notice changed images or captions under the same ids: of the captions, and of the sizes of the
    image files. File times are not used, since copying changes them."""
    texts, files = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for record in sorted(records, key=lambda record: record.id):
        texts.update(json.dumps([record.id, record.captions, record.weights]).encode())
        files.update(json.dumps([record.id, record.length, record.height, record.width]).encode())
    return {"captions": texts.hexdigest(), "images": files.hexdigest()}


def describe_split(spec: DataSpec, train: int, held_out: int) -> list[str]:
    lines = []
    if spec.data.every > 1:
        used = train if spec.data.validation_folder else train + held_out
        lines.append(f"every {spec.data.every}th image is used: {used}")
    if held_out:
        lines.append(f"{held_out} held out for validation, {train} to train on")
    return lines


def draw_also(data: Data, draws: Mapping[str, Draw]) -> None:
    """Set the random numbers that every sample draws for the objective, replacing the previous ones."""
    for part in (data.train, data.held_out):
        drawing = part.dataset.drawing
        part.dataset.drawing = replace(drawing, extras=replace(drawing.extras, draws=draws))


def make_batches(
    spec: DataSpec, data: Data, accelerator: Accelerator, *, batch_size: int, accumulation: int, position: int
) -> tuple[BucketBatches, DataLoader]:
    """This process's micro-batches from global batch `position` on; `batch_size` is the global batch size."""
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
    # the loader draws a seed for its workers at every start, which must not advance the global generator
    generator = torch.Generator().manual_seed(derive_seed(spec.seed, position, batches.rank, "workers"))
    return batches, DataLoader(
        data.train.dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, length=spec.text.length),
        num_workers=spec.data.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=spec.data.workers > 0,
        worker_init_fn=leave_signals,
        generator=generator,
    )


class MicroBatches:
    """This process's micro-batches on its device, one step's at a time.

    If a worker is lost, they are read in this process from then on, so that the step can finish and the run be saved.
    """

    def __init__(
        self, loader: DataLoader, reload: Callable[[int], DataLoader], device: torch.device, *, accumulation: int
    ):
        """`reload` makes a loader without workers that starts at a given step."""
        self.reload, self.device, self.accumulation = reload, device, accumulation
        self.lost = False  # whether a worker was lost
        self._batches = move_ahead(loader, device)

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of a step; steps must be taken in order."""
        try:
            return [next(self._batches) for _ in range(self.accumulation)]
        except Exception as error:
            if self.lost or not lost_worker(error):
                raise
        self.lost = True
        self._batches = move_ahead(self.reload(step), self.device)
        return [next(self._batches) for _ in range(self.accumulation)]


def _plain_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; an `InputError` of a loader's worker loses the traceback that torch puts before its text."""
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).rpartition(f"{InputError.__module__}.InputError: ")[2].strip()) from None


def move_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on `device`; for a GPU they are copied from pinned memory on a separate stream, during the previous
    step."""
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
