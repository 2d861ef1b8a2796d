"""What happens once, before the first step: the run's folder, model and optimizer."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor
from torch.utils.data import DataLoader

from pixart.adapters.base import is_mark, mark_base
from pixart.adapters.load import read_settings as read_adapter
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.checkpoint.init_from import start_from
from pixart.config import dump_yaml, flatten, load_config, meaning, resolve_paths, to_dict
from pixart.data.given import load_given
from pixart.data.training_set import Data, draw_also, load_encoder, load_images, make_batches
from pixart.encoders.autoencoder import Autoencoder, load_autoencoder
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.errors import InputError
from pixart.evaluate.metric import Metric
from pixart.extensions import FOLDER, Extension, load_extensions
from pixart.features.training_set import load_features
from pixart.files import digest_file, write_file, write_text
from pixart.model.pixart import PixArt, PixArtConfig
from pixart.seeds import derive_seed, fit_seed
from pixart.train.assemble import assemble, place
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes, check_sharded
from pixart.train.dreambooth import draw_class_images
from pixart.train.given import Given
from pixart.train.history import (
    CONFIG,
    ENCODERS,
    Changes,
    check_encoders,
    has_config,
    note_start,
    read_encoders,
    read_run_config,
    settle_draws,
)
from pixart.train.lock import RunLock
from pixart.train.metrics import open_metrics
from pixart.train.optimizer import make_optimizer
from pixart.train.parts import count_parameters, make_objective
from pixart.train.preflight import check_sources
from pixart.train.saving import remove_partial
from pixart.train.state import TrainState, load_checkpoint
from pixart.train.trackers import check_trackers, start_trackers


@dataclass
class Session:
    """A run that is ready for its next step."""

    config: TrainConfig  # as settled for this run: paths absolute, draws and given objects filled in
    run: Path
    data: Data
    state: TrainState
    loader: DataLoader  # this process's micro-batches, starting with the next step's
    autoencoder: Autoencoder
    resumed: bool
    base_weights: str | None  # mark of the network under an adapter
    metrics: dict[str, Metric]  # computed at each validation
    reload: Callable[[int], DataLoader]  # micro-batches from the given step on, read without worker processes


def resolve_run(config: TrainConfig) -> TrainConfig:
    """A run's configuration with absolute paths, so that it can be resumed and sampled from in any directory."""
    run = Path(config.output)
    stored = load_config(TrainConfig, run / CONFIG, run_code=False) if has_config(run) else None
    return resolve_paths(config, stored)


def start(config: TrainConfig, given: Given = Given(), *, onednn: bool = False, lock: RunLock | None = None) -> Session:
    """Open or resume the run. All errors in the input show here, cheap checks first; nothing is overwritten.

    `given` and `onednn` are as in `build_state`; `lock` is taken before any file of the run is read or written.

    Raises:
        InputError: something is wrong with the configuration, the data or the run's folder, or another process is
            training into that folder.
    """
    extensions = load_extensions(config.extensions)
    config, notes = settle_draws(given.settle(config))
    check_shapes(config, given=given.data is not None)
    metrics = open_metrics(config)
    if config.train.parallel == "fsdp":
        # an adapter stays whole in every process, so any optimizer fits it
        check_sharded(config.optimizer.name if config.adapter is None else None, config.train.mixed_precision)
    check_sources(config, given=given.data is not None)
    accelerator = make_accelerator(config)
    processes = Processes(accelerator, config.train.timeout)
    run, checkpoint, changes = open_run(config, accelerator, processes, extensions, lock)
    autoencoder = load_autoencoder(config.vae, device=accelerator.device)
    spec = config.data_spec
    if config.dreambooth is not None and config.dreambooth.class_prompt is not None:
        draw_class_images(config, accelerator, autoencoder, fresh=checkpoint is None)
    if given.data is not None:
        data = load_given(spec, given.data, accelerator)
    elif config.data.features or config.data.mix:
        data = load_features(spec, accelerator, autoencoder)
    else:
        data = load_images(spec, accelerator, autoencoder)
    accelerator.print("\n".join([*notes, data.report]))
    encoders = fingerprint_encoders(config, data, autoencoder, accelerator, moved="text.model" in changes)
    notes = check_encoders(run, config, changes, encoders)
    state = build_state(config, accelerator, processes, data.null, fresh=checkpoint is None, given=given, onednn=onednn)
    draw_also(data, state.parts.objective.draws)
    if checkpoint is not None:
        check_base(checkpoint, state, config)
        notes += load_checkpoint(state, checkpoint)
        accelerator.print("\n".join([f"resuming from {checkpoint}", *notes]))
    if accelerator.is_main_process:
        for note in note_start(run, state, config, changes, data, encoders, given.names):
            accelerator.print(note)
    micro = partial(
        make_batches,
        data=data,
        accelerator=accelerator,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
    )
    batches, loader = micro(spec, position=state.progress.step)
    alone = replace(spec, data=replace(spec.data, workers=0))
    accelerator.print(
        f"{batches.per_epoch} batches of {config.train.batch_size} an epoch, {batches.dropped} images left over; "
        f"{count_parameters(state.parts) / 1e6:.1f} M parameters; "
        f"{processes.count} × {accelerator.device.type}{' (fsdp)' * (config.train.parallel == 'fsdp')}; output {run}"
    )
    start_trackers(accelerator, config, state.progress.step)
    return Session(
        config,
        run,
        data,
        state,
        loader,
        autoencoder,
        checkpoint is not None,
        state.base_weights,
        metrics,
        lambda step: micro(alone, position=step)[1],
    )


def fingerprint_encoders(
    config: TrainConfig, data: Data, autoencoder: Autoencoder, accelerator: Accelerator, *, moved: bool
) -> dict[str, str]:
    """Fingerprints of the encoders by their keys in `ENCODERS`. A run from features loads no text encoder, except one
    that has `moved`: it is loaded for its fingerprint, since the model card names it."""
    text = data.text_weights
    if moved and (config.data.features or config.data.mix):
        encoder = load_encoder(config.data_spec, accelerator)
        text = fingerprint(encoder.model)
        encoder.close()
    known = {"text.model": text, "vae.source": autoencoder_fingerprint(autoencoder)}
    return {key: value for key, value in known.items() if value is not None}


def make_accelerator(config: TrainConfig, *, cpu: bool = False) -> Accelerator:
    """Set up accelerate; `cpu` ignores a GPU. Raises InputError for a precision that the device does not support and
    for a tracker that is unknown or not installed."""
    check_trackers(config.train.trackers)
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.mixed_precision fp16 needs a GPU; set it to bf16 or no on this machine")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
    # a process may train more than once, each time with another precision and new process groups
    AcceleratorState._reset_state(reset_partial_state=True)
    # on a GPU the gloo groups of `Processes` must time out before NCCL: their error becomes a message, NCCL's own
    # timeout kills the process
    patience = config.train.timeout * (1.25 if torch.cuda.is_available() else 1.0)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            # without a GPU, accelerate joins torchrun's processes only if told to use the CPU
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
    config: TrainConfig,
    accelerator: Accelerator,
    processes: Processes,
    extensions: Sequence[Extension] = (),
    lock: RunLock | None = None,
) -> tuple[Path, Path | None, Changes]:
    """The run's folder, the checkpoint to resume from, if any, and what changed in the configuration since. Only the
    main process reads the checkpoint to verify it.

    Raises:
        InputError: the folder holds a run although `resume` is `never`, or a run with another configuration.
    """
    run = Path(config.output)
    stored = run / CONFIG
    if lock is not None:
        processes.from_main(lambda: lock.take(run, config.train.timeout))
    checkpoint = processes.from_main(lambda: find_checkpoint(run))
    changes: dict[str, tuple] = {}
    if has_config(run):
        if config.resume == "never" and checkpoints(run):
            raise InputError(f"{run} already holds a run; choose another output, or set resume=auto to resume it")
        # read through the dataclass, so that a key that is newer than the run has its default
        before, now = flatten(to_dict(resolve_paths(read_run_config(run)))), flatten(to_dict(config))
        pairs = {key: (before.get(key), now.get(key)) for key in sorted({*before, *now})}
        if checkpoint is not None:
            changes = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        known = read_encoders(run)  # their paths may change: the weights are compared once loaded
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
            # a resumed run keeps its old configuration until set-up has succeeded; rewriting it tests that the disk
            # can be written
            text = dump_yaml(config) if checkpoint is None else stored.read_text(encoding="utf-8")
            write_text(stored, text)
            keep_extensions(run, extensions)
        except OSError as error:
            problem = str(error)
    if problem := processes.gather(problem)[0]:
        raise InputError(f"output {run}: cannot be written ({problem}); choose another, or free some space")
    return run, checkpoint, changes


def find_checkpoint(run: Path) -> Path | None:
    """The newest good checkpoint of a run, or None if there are no checkpoints.

    Raises:
        InputError: there are checkpoints, but none is good or can be read. Starting again would overwrite the run.
    """
    there = checkpoints(run)
    found = newest_checkpoint(run, print)
    if found is None and there:
        raise InputError(
            f"{run} has {len(there)} checkpoints, and none of them is complete and readable (the warnings above say "
            "why). The run is not started again over them: make them readable (is their disk mounted, are their "
            f"permissions right?) or choose another output; to start without them, remove {run / 'checkpoints'}"
        )
    return found


def _another_configuration(run: Path, other: Changes) -> InputError:
    said = "; ".join(f"{key}: {was!r} → {now!r}" for key, (was, now) in other.items())
    untold = [
        f". {key} may change only if the run has recorded its encoder's fingerprint, which this one has not: start it "
        "once with the encoder at its old path"
        for key in ENCODERS
        if key in other
    ]
    return InputError(
        f"{run} holds a run with another configuration ({said}). Undo the changes to resume it, or choose another "
        f"output for a new run, which may start from this one's weights: init_from={run}{''.join(untold)}"
    )


def check_base(checkpoint: Path, state: TrainState, config: TrainConfig) -> None:
    """Refuse to resume an adapter on another base network than the one it has been trained on."""
    base_weights = state.base_weights
    if base_weights is None:
        return
    before = read_adapter(checkpoint / "model")[3]
    if not is_mark(before):
        base_weights = state.base_fingerprint
    if before != base_weights:
        raise InputError(
            f"init_from {config.init_from}: not the base that {checkpoint.parents[1]} has been trained on (fingerprint "
            f"{before} then, {base_weights} now); restore that base, or choose another output for a new run"
        )


def check_extensions(run: Path, extensions: Sequence[Extension]) -> None:
    """Refuse to resume a run with extensions that differ from those it has been trained with."""
    kept = {path.name: digest_file(path) for path in (run / FOLDER).glob("*.py")}
    given = {extension.path.name: extension.digest for extension in extensions}
    if changed := sorted(name for name in kept.keys() | given.keys() if kept.get(name) != given.get(name)):
        raise InputError(
            f"extensions: {', '.join(changed)} differs from what {run} has been trained with ({run / FOLDER} holds the "
            "copies); use the copies, or set accept_changed_extensions=true to resume with the change"
        )


def keep_extensions(run: Path, extensions: Sequence[Extension]) -> None:
    """Copy a run's extensions into its folder, replacing those of earlier starts."""
    names = {extension.path.name for extension in extensions}
    for old in (run / FOLDER).glob("*.py"):
        if old.name not in names:
            old.unlink()
    for extension in extensions:
        if not (run / FOLDER / extension.path.name).exists() or extension.path.parent != (run / FOLDER).resolve():
            content = extension.path.read_bytes()
            write_file(run / FOLDER / extension.path.name, lambda path, content=content: path.write_bytes(content))


def check_shapes(config: TrainConfig, *, given: bool = False) -> None:
    """Refuse a model whose channels or native size do not match the data, before anything is loaded. The size is not
    checked for `given` samples, which have any size."""
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
    config: TrainConfig,
    accelerator: Accelerator,
    processes: Processes,
    null: Tensor | None,
    *,
    fresh: bool,
    given: Given = Given(),
    onednn: bool = False,
) -> TrainState:
    """Model, EMA and optimizer at step 0, the same in every process.

    A `fresh` run starts from `init_from`, if set. A `given` network or objective is used in place of one made from the
    configuration. `onednn` makes them use oneDNN's matrix product on a CPU.
    """
    torch.manual_seed(fit_seed(config.seed))
    model = make_network(config.model) if given.model is None else given.model.train()
    if config.init_from is not None and (fresh or config.adapter is not None):
        notes = start_from(model, config.init_from, diffusion=config.diffusion)
        accelerator.print("\n".join([f"starting from {config.init_from}", *notes]))
    if null is not None:
        model.y_embedder.y_embedding[: len(null)] = null.float()
    marks = {} if config.adapter is None else {"base_weights": mark_base(model), "base_fingerprint": fingerprint(model)}
    place(model, config, accelerator.device)
    if given.objective is None:
        objective = make_objective(config.objective, config.diffusion, model, config.seed)
    else:
        objective = given.make_objective(model)
    objective.to(accelerator.device)
    parts = assemble(config, model, objective, onednn=onednn)
    optimizer = make_optimizer(parts.to_train(), config.optimizer)
    if processes.rank:  # what was made above is equal in all processes; from here on dropout must not be
        torch.manual_seed(derive_seed(config.seed, "process", processes.rank))
    return TrainState(parts, optimizer, accelerator, processes, **marks)


def make_network(config: PixArtConfig) -> PixArt:
    """A new network in the CPU's memory. Raises InputError if this machine has less memory than its weights take."""
    import psutil  # accelerate brings it

    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in PixArt(config).parameters()) * 4
    if needed > (total := psutil.virtual_memory().total):
        raise InputError(
            f"model: hidden_size {config.hidden_size} and depth {config.depth} make weights of {needed / 2**30:.4g} "
            f"GB, and this machine has {total / 2**30:.4g} GB of memory; choose smaller ones"
        )
    return PixArt(config)


def _is_fixed(key: str) -> bool:
    return meaning(TrainConfig, key, "resume") == "fixed"
