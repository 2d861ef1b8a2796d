"""What happens once, before the first step: the run's folder, model and optimizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import Tensor
from torch.utils.data import DataLoader

from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.checkpoint.start import start_from
from pixart.config import dump_yaml, load_config, to_dict
from pixart.diffusion.schedule import Schedule, make_schedule
from pixart.errors import InputError
from pixart.model.autoencoder import Autoencoder, load_autoencoder
from pixart.model.pixart import PixArt
from pixart.train.check import check_sources
from pixart.train.config import TrainConfig
from pixart.train.data import Data, load_data, make_batches
from pixart.train.ema import make_ema
from pixart.train.freeze import freeze
from pixart.train.optimizer import make_optimizer
from pixart.train.state import TrainState, load_checkpoint
from pixart.train.watch import check_trackers, start_trackers

# changing these under a run that goes on is normal; anything else would make it another run
FREE_TO_CHANGE = {
    "output", "resume", "sample", "prompts", "evaluate", "train.steps", "train.accumulation", "train.compile",
    "train.gradient_checkpointing", "train.log_every", "train.sample_every", "train.validate_every", "train.save_every",
    "train.keep", "train.trackers", "train.peak_tflops", "data.workers", "data.cache", "data.folder",
}  # fmt: skip


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
    check_sources(config)
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
    freeze(model, config.train.freeze)
    optimizer = make_optimizer((p for p in model.parameters() if p.requires_grad), config.optimizer)
    wrapped = accelerator.prepare_model(model)
    return TrainState(model, wrapped, ema, accelerator.prepare_optimizer(optimizer), accelerator)


def _flatten(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)
