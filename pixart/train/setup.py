"""What happens once, before the first step: the run's folder, model and optimizer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor
from torch.utils.data import DataLoader

from pixart.adapters.load import read_settings as read_adapter
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.checkpoint.init_from import start_from
from pixart.config import dump_yaml, flatten, load_config, meaning, resolve_paths, to_dict
from pixart.cpu import use_onednn
from pixart.data.given import load_given
from pixart.data.training_set import Data, draw_also, load_encoder, load_images, make_batches
from pixart.encoders.autoencoder import Autoencoder, load_autoencoder
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.errors import InputError
from pixart.evaluate.metric import Metric
from pixart.extensions import FOLDER, Extension, load_extensions
from pixart.features.training_set import load_features
from pixart.files import digest_file, write_file, write_text
from pixart.model.pixart import PixArt
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes, check_sharded, shard
from pixart.train.given import Given
from pixart.train.history import (
    CONFIG,
    ENCODERS,
    Changes,
    check_encoders,
    note_start,
    read_encoders,
    read_run_config,
    settle_draws,
)
from pixart.train.log import check_trackers, start_trackers
from pixart.train.metrics import open_metrics
from pixart.train.optimizer import freeze, make_optimizer
from pixart.train.parts import Parts, count_parameters, make_objective
from pixart.train.preflight import check_sources
from pixart.train.saving import remove_partial
from pixart.train.state import TrainState, load_checkpoint


@dataclass
class Session:
    """A run that is ready for its next step."""

    config: TrainConfig  # as it holds for this run
    run: Path
    data: Data
    state: TrainState
    loader: DataLoader  # this process's micro-batches, from the next one on
    autoencoder: Autoencoder
    resumed: bool
    base_weights: str | None  # fingerprint of the network under an adapter
    metrics: dict[str, Metric]  # of its validations


def resolve_run(config: TrainConfig) -> TrainConfig:
    """A run's configuration with absolute paths, so that its models sample, and it goes on, from any directory."""
    stored = Path(config.output) / CONFIG
    return resolve_paths(config, load_config(TrainConfig, stored, run_code=False) if stored.exists() else None)


def start(config: TrainConfig, given: Given = Given(), *, onednn: bool = False) -> Session:
    """Open or resume the run. What can be wrong shows here: cheap checks first, nothing is overwritten.

    `given` and `onednn` as in `build_state`.

    Raises:
        InputError: anything wrong with the configuration, the data or the run's folder.
    """
    extensions = load_extensions(config.extensions)
    config, notes = settle_draws(given.settle(config))
    check_shapes(config, given=given.data is not None)
    metrics = open_metrics(config)
    if config.train.parallel == "fsdp":
        check_sharded(config.optimizer.name, config.train.mixed_precision)
    check_sources(config, given=given.data is not None)
    accelerator = make_accelerator(config)
    processes = Processes(accelerator, config.train.timeout)
    run, checkpoint, changes = open_run(config, accelerator, processes, extensions)
    autoencoder = load_autoencoder(config.vae, device=accelerator.device)
    spec = config.data_spec
    if given.data is not None:
        data = load_given(spec, given.data, accelerator)
    elif config.data.features or config.data.mix:
        data = load_features(spec, accelerator, autoencoder)
    else:
        data = load_images(spec, accelerator, autoencoder)
    accelerator.print("\n".join([*notes, data.report]))
    encoders = fingerprint_encoders(config, data, autoencoder, accelerator, moved="text.model" in changes)
    notes = check_encoders(run, config, changes, encoders)
    state = build_state(
        config, accelerator, processes, data.null, fresh=checkpoint is None, given=given, onednn=onednn
    )  # fmt: skip
    draw_also(data, state.parts.objective.draws)
    base_weights = None if config.adapter is None else fingerprint(state.parts.network)
    if checkpoint is not None:
        check_base(checkpoint, base_weights, config)
        notes += load_checkpoint(state, checkpoint)
        accelerator.print("\n".join([f"going on from {checkpoint}", *notes]))
    if accelerator.is_main_process:
        for note in note_start(run, state, config, changes, data, encoders, given.names):
            accelerator.print(note)
    batches, loader = make_batches(
        spec, data, accelerator, batch_size=config.train.batch_size, accumulation=config.train.accumulation,
        position=state.progress.step,
    )  # fmt: skip
    accelerator.print(
        f"{batches.per_epoch} batches of {config.train.batch_size} an epoch, {batches.dropped} images left over; "
        f"{count_parameters(state.parts) / 1e6:.1f} M parameters; "
        f"{processes.count} × {accelerator.device.type}{' (fsdp)' * (config.train.parallel == 'fsdp')}; output {run}"
    )
    start_trackers(accelerator, config)
    return Session(config, run, data, state, loader, autoencoder, checkpoint is not None, base_weights, metrics)


def fingerprint_encoders(
    config: TrainConfig, data: Data, autoencoder: Autoencoder, accelerator: Accelerator, *, moved: bool
) -> dict[str, str]:
    """Fingerprints by `ENCODERS`; with features, too, a text encoder that has `moved` is read: the card names it."""
    text = data.text_weights
    if moved and (config.data.features or config.data.mix):
        encoder = load_encoder(config.data_spec, accelerator)
        text = fingerprint(encoder.model)
        encoder.close()
    known = {"text.model": text, "vae.source": autoencoder_fingerprint(autoencoder)}
    return {key: value for key, value in known.items() if value is not None}


def make_accelerator(config: TrainConfig, *, cpu: bool = False) -> Accelerator:
    """`cpu` leaves a GPU alone. Raises InputError for a precision the device lacks, or a tracker that is not there."""
    check_trackers(config.train.trackers)
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.mixed_precision fp16 needs a GPU; take bf16 or no on this machine")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its sums with it alone
        torch.use_deterministic_algorithms(True)
    # a process may train more than once, in another precision and with new groups of processes
    AcceleratorState._reset_state(reset_partial_state=True)
    # on a GPU the words between hosts must be the first to run out of time: they make a message, NCCL ends the process
    patience = config.train.timeout * (1.25 if torch.cuda.is_available() else 1.0)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            # torchrun's processes find each other on CPUs only if they are told that these are meant
            cpu=cpu or (count > 1 and not torch.accelerator.is_available()),
            mixed_precision=config.train.mixed_precision,
            log_with=list(config.train.trackers) or None,
            project_config=ProjectConfiguration(project_dir=config.output, logging_dir=config.output),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=patience)),
            ],
        )
    except ValueError as error:
        raise InputError(f"train.mixed_precision {config.train.mixed_precision}: {error}") from None
    if accelerator.num_processes != count:
        raise InputError(f"{count} processes were launched, but accelerate sees {accelerator.num_processes}")
    return accelerator


def open_run(
    config: TrainConfig, accelerator: Accelerator, processes: Processes, extensions: Sequence[Extension] = ()
) -> tuple[Path, Path | None, Changes]:
    """The run's folder, the checkpoint to go on from, if any, and what changed in the configuration since; the main
    process alone reads the checkpoint to check it.

    Raises:
        InputError: `resume: never` meets a run; or the folder holds a run with another configuration.
    """
    run = Path(config.output)
    stored = run / CONFIG
    checkpoint = processes.gather(newest_checkpoint(run, print) if processes.rank == 0 else None)[0]
    changes: dict[str, tuple] = {}
    if stored.exists():
        if config.resume == "never" and checkpoints(run):
            raise InputError(f"{run} holds a run already; choose another output, or set resume=auto to go on with it")
        # through the dataclass: a key that came after the run began has its default there
        before, now = flatten(to_dict(resolve_paths(read_run_config(run)))), flatten(to_dict(config))
        pairs = {key: (before.get(key), now.get(key)) for key in sorted({*before, *now})}
        if checkpoint is not None:
            changes = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        known = read_encoders(run)  # these may move: their weights are compared once they are loaded
        if other := {key: pair for key, pair in changes.items() if _is_fixed(key) and key not in known}:
            raise _another_configuration(run, other)
    if checkpoint is not None and not config.accept_changed_extensions:
        check_extensions(run, extensions)
    accelerator.wait_for_everyone()
    problem = None
    if accelerator.is_main_process:
        try:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            remove_partial(run)
            # a run that goes on keeps its configuration until it does; writing it shows whether the disk takes it
            text = dump_yaml(config) if checkpoint is None else stored.read_text(encoding="utf-8")
            write_text(stored, text)
            keep_extensions(run, extensions)
        except OSError as error:
            problem = str(error)
    if problem := processes.gather(problem)[0]:
        raise InputError(f"output {run}: cannot be written ({problem}); choose another, or make room")
    return run, checkpoint, changes


def _another_configuration(run: Path, other: Changes) -> InputError:
    said = "; ".join(f"{key}: {was!r} → {now!r}" for key, (was, now) in other.items())
    untold = [
        f". It holds no fingerprint of its encoder, by which {key} may change: start it once from where that was"
        for key in ENCODERS
        if key in other
    ]
    return InputError(
        f"{run} holds a run with another configuration ({said}). Take the changes back to go on, or choose another "
        f"output for a new run, which may start from this one's weights: init_from={run}{''.join(untold)}"
    )


def check_base(checkpoint: Path, base_weights: str | None, config: TrainConfig) -> None:
    """Refuse to go on with an adapter on another base than the one it was trained on so far."""
    if base_weights is None:
        return
    before = read_adapter(checkpoint / "model")[3]
    if before != base_weights:
        raise InputError(
            f"init_from {config.init_from}: not the base that {checkpoint.parents[1]} was trained on so far "
            f"(fingerprint {before} then, {base_weights} now); put that back, or choose another output for a new run"
        )


def check_extensions(run: Path, extensions: Sequence[Extension]) -> None:
    """Refuse to go on with other code than a run was trained with so far."""
    kept = {path.name: digest_file(path) for path in (run / FOLDER).glob("*.py")}
    given = {extension.path.name: extension.digest for extension in extensions}
    if changed := sorted(name for name in kept.keys() | given.keys() if kept.get(name) != given.get(name)):
        raise InputError(
            f"extensions: {', '.join(changed)} is not what {run} was trained with so far, of which {run / FOLDER} has "
            "the copies; give these, or go on with the change by accept_changed_extensions=true"
        )


def keep_extensions(run: Path, extensions: Sequence[Extension]) -> None:
    """Copy a run's extensions into its folder, in place of those of earlier starts."""
    names = {extension.path.name for extension in extensions}
    for old in (run / FOLDER).glob("*.py"):
        if old.name not in names:
            old.unlink()
    for extension in extensions:
        if not (run / FOLDER / extension.path.name).exists() or extension.path.parent != (run / FOLDER).resolve():
            content = extension.path.read_bytes()
            write_file(run / FOLDER / extension.path.name, lambda path, content=content: path.write_bytes(content))


def check_shapes(config: TrainConfig, *, given: bool = False) -> None:
    """Refuse a model whose channels or native size are not those of the data, before anything is loaded; `given`
    samples have the sizes that they have."""
    if config.model.in_channels != config.vae.latent_channels:
        raise InputError(
            f"model.in_channels is {config.model.in_channels}, the autoencoder '{config.vae.kind}' has "
            f"{config.vae.latent_channels} channels; set it to {config.vae.latent_channels}"
        )
    side = config.data.resolution // config.vae.downsample
    if config.model.latent_size != side and not given:
        raise InputError(
            f"model.latent_size is {config.model.latent_size}, but data.resolution {config.data.resolution} gives "
            f"latents of side {side}; set it to {side}"
        )


def build_state(
    config: TrainConfig, accelerator: Accelerator, processes: Processes, null: Tensor | None, *, fresh: bool,
    given: Given = Given(), onednn: bool = False,
) -> TrainState:  # fmt: skip
    """Model, EMA and optimizer at step 0, the same in every process; a `fresh` run starts as `init_from` says, or with
    the network and the objective that are `given`, and `onednn` has all of them multiply by oneDNN on a CPU."""
    torch.manual_seed(config.seed)
    model = PixArt(config.model) if given.model is None else given.model.train()
    if config.init_from is not None and (fresh or config.adapter is not None):
        notes = start_from(model, config.init_from, diffusion=config.diffusion)
        accelerator.print("\n".join([f"starting from {config.init_from}", *notes]))
    if null is not None:
        model.y_embedder.y_embedding[: len(null)] = null.float()
    model.to(accelerator.device)
    if given.objective is None:
        objective = make_objective(config.objective, config.diffusion, model, config.seed)
    else:
        objective = given.make_objective(model)
    objective.to(accelerator.device)
    for module in (model, objective) if onednn else ():
        use_onednn(module)
    parts = Parts.of(model, objective, config.adapter, config.seed)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    if config.train.compile:
        model.compile_blocks()
    if config.adapter is None:
        freeze(model, config.train.freeze)
    if config.train.parallel == "fsdp":  # accelerate's own way knows no CPU, and its prepare_model no sharded model
        for module in parts.trained.values():
            shard(module, accelerator.device)
        for module in (*parts.averages.values(), *parts.kept.values()):
            shard(module, accelerator.device, trained=False)
        shard(parts.training, accelerator.device)
    trained = {name: p for name, p in parts.named_parameters() if p.requires_grad}
    return TrainState(parts, make_optimizer(trained, config.optimizer), accelerator, processes)


def _is_fixed(key: str) -> bool:
    return meaning(TrainConfig, key, "resume") == "fixed"
