"""Everything that happens once, before the first step: the run's folder, data, text states, model and optimizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import Tensor
from torch.utils.data import DataLoader

from pixart.buckets import bucket_table
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.checkpoint.start import start_from
from pixart.config import dump_yaml, load_config, to_dict
from pixart.data.batches import BucketBatches, derive_seed
from pixart.data.dataset import Captions, ImageDataset, collate, encode_captions
from pixart.data.images import Record, scan_images
from pixart.data.openmoji import build_openmoji
from pixart.diffusion.schedule import Schedule, make_schedule
from pixart.errors import InputError
from pixart.model.autoencoder import Autoencoder, load_autoencoder
from pixart.model.pixart import PixArt
from pixart.model.text import TextEncoder
from pixart.pipeline import encode_null
from pixart.train.config import TrainConfig
from pixart.train.ema import make_ema
from pixart.train.optimizer import make_optimizer
from pixart.train.state import TrainState, load_checkpoint
from pixart.train.watch import check_trackers, start_trackers

# changing these under a run that goes on is normal; anything else would make it another run
FREE_TO_CHANGE = {
    "output", "resume", "sample", "prompts", "evaluate", "train.steps", "train.accumulation", "train.compile",
    "train.gradient_checkpointing", "train.log_every", "train.sample_every", "train.validate_every", "train.save_every",
    "train.keep", "train.trackers", "data.workers", "data.cache", "data.folder",
}  # fmt: skip


@dataclass
class Data:
    """Records and text states of a run."""

    train: list[Record]
    held_out: list[Record]
    captions: Captions
    null: Tensor | None  # the null caption, if it is not the model's own
    report: str


@dataclass
class Session:
    """A run that is ready for its next step."""

    run: Path
    data: Data
    state: TrainState
    loader: DataLoader  # this process's micro-batches, from the next one on
    schedule: Schedule
    autoencoder: Autoencoder
    resumed: bool


def start(config: TrainConfig) -> Session:
    """Open or resume the run. What can be wrong shows here: cheap checks first, nothing is overwritten.

    Raises:
        InputError: anything wrong with the configuration, the data or the run's folder.
    """
    check_shapes(config)
    accelerator = make_accelerator(config)
    run, checkpoint = open_run(config, accelerator)
    data = load_data(config, accelerator)
    accelerator.print(data.report)
    state = build_state(config, accelerator, data.null, fresh=checkpoint is None)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
        accelerator.print(f"going on from {checkpoint}")
    batches, loader = make_batches(config, accelerator, data, state.progress.step)
    accelerator.print(
        f"{batches.per_epoch} batches of {config.train.batch_size} an epoch, {batches.dropped} images left over; "
        f"{sum(p.numel() for p in state.model.parameters()) / 1e6:.1f} M parameters; "
        f"{accelerator.num_processes} × {accelerator.device.type}; output {run}"
    )
    start_trackers(accelerator, config)
    autoencoder = load_autoencoder(config.vae, device=accelerator.device)
    return Session(run, data, state, loader, make_schedule(config.diffusion), autoencoder, checkpoint is not None)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Raises InputError for a precision the device does not have, or a tracker that is not there."""
    check_trackers(config.train.trackers)
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.mixed_precision fp16 needs a GPU; take bf16 or no on this machine")
    AcceleratorState._reset_state()  # a process may train more than once, and in another precision
    try:
        return Accelerator(
            mixed_precision=config.train.mixed_precision,
            log_with=list(config.train.trackers) or None,
            project_config=ProjectConfiguration(project_dir=config.output, logging_dir=config.output),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise InputError(f"train.mixed_precision {config.train.mixed_precision}: {error}") from None


def open_run(config: TrainConfig, accelerator: Accelerator) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to go on from, if any.

    Raises:
        InputError: `resume: never` meets a run; or the folder holds a run with another configuration.
    """
    run = Path(config.output)
    stored, checkpoint = run / "config.yaml", newest_checkpoint(run, accelerator.print)
    if stored.exists():
        if config.resume == "never" and checkpoints(run):
            raise InputError(f"{run} holds a run already; choose another output, or set resume=auto to go on with it")
        # through the dataclass: a key that came after the run began has its default there
        before, now = _flatten(to_dict(load_config(TrainConfig, stored))), _flatten(to_dict(config))
        changed = [f"{key}: {before.get(key)!r} → {now.get(key)!r}" for key in sorted({*before, *now})
                   if before.get(key) != now.get(key) and not _is_free(key)]  # fmt: skip
        if changed and checkpoint is not None:
            raise InputError(
                f"{run} holds a run with another configuration ({'; '.join(changed)}); "
                "choose another output for the new one, or take the changes back to go on"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            stored.write_text(dump_yaml(config), encoding="utf-8")
        except OSError as error:
            raise InputError(f"output {run}: cannot be written ({error})") from None
    return run, checkpoint


def load_data(config: TrainConfig, accelerator: Accelerator) -> Data:
    """Scan the images, split off the held-out ones, encode every caption once and free the encoder."""
    data = config.data
    if data.prepare == "openmoji":
        with accelerator.main_process_first():
            build_openmoji(data.folder)
    multiple = config.model.patch_size * config.vae.downsample
    table = bucket_table(data.resolution, multiple, square=not data.aspect_ratios)
    scan = scan_images(data.folder, table, max_crop=data.max_crop)
    records = scan.records[:: data.every]
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

    report = [f"data {data.folder}:", scan.describe()]
    if data.every > 1:
        report.append(f"every {data.every}th of them is used: {len(records)}")
    if held_out:
        report.append(f"{len(held_out)} held out for validation, {len(train)} to train on")
    if cut:
        report.append(f"{cut} of {len(texts)} captions are longer than {config.text.length} tokens and are cut")
    return Data(train, held_out, captions, null, "\n".join(report))


def check_shapes(config: TrainConfig) -> None:
    """Refuse a model whose channels or native size are not those of the data, before anything is loaded."""
    if config.model.in_channels != config.vae.latent_channels:
        raise InputError(
            f"model.in_channels is {config.model.in_channels}, the autoencoder '{config.vae.kind}' has "
            f"{config.vae.latent_channels} channels; set it to {config.vae.latent_channels}"
        )
    side = config.data.resolution // config.vae.downsample
    if config.model.latent_size != side:
        raise InputError(
            f"model.latent_size is {config.model.latent_size}, but data.resolution {config.data.resolution} gives "
            f"latents of side {side}; set it to {side}"
        )


def build_state(config: TrainConfig, accelerator: Accelerator, null: Tensor | None, *, fresh: bool) -> TrainState:
    """Model, EMA and optimizer at step 0, the same in every process; a `fresh` run starts as `init_from` says."""
    torch.manual_seed(config.seed)
    model = PixArt(config.model)
    if fresh and config.init_from is not None:
        accelerator.print("\n".join([f"starting from {config.init_from}", *start_from(model, config.init_from)]))
    if null is not None:
        model.y_embedder.y_embedding[: len(null)] = null.float()
    model.to(accelerator.device)
    ema = make_ema(model)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    if config.train.compile:
        model.compile_blocks()
    optimizer = make_optimizer(model.parameters(), config.optimizer)
    wrapped = accelerator.prepare_model(model)
    return TrainState(model, wrapped, ema, accelerator.prepare_optimizer(optimizer), accelerator)


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


def _flatten(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)
