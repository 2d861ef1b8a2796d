"""The training loop, top to bottom."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pixart.data.dataset import collate
from pixart.data.images import check_unreadable
from pixart.diffusion import make_schedule
from pixart.errors import InputError
from pixart.grid import contact_sheet
from pixart.model.autoencoder import load_autoencoder
from pixart.pipeline import sample_latents, to_images
from pixart.train.config import TrainConfig
from pixart.train.optimizer import learning_rate
from pixart.train.setup import (
    Data,
    build_state,
    check_shapes,
    load_data,
    make_accelerator,
    make_batches,
    make_dataset,
    open_run,
)
from pixart.train.state import TrainState, load_checkpoint, save_checkpoint
from pixart.train.step import batch_losses, train_step
from pixart.train.watch import Watch, start_trackers

# steps in a row with a non-finite loss or gradient that end a run; an fp16 loss scaler skips some to find its scale
MAX_SKIPPED = {"no": 10, "bf16": 10, "fp16": 30}


@dataclass
class RunResult:
    run: Path
    step: int
    finished: bool  # False when a signal ended it early; the same command goes on
    data: Data


def train(config: TrainConfig) -> RunResult:
    """Train as configured, going on from the newest good checkpoint in the run's folder if there is one.

    Raises:
        InputError: anything wrong with the configuration or the data, before the first step; or ten non-finite steps
            in a row, or more than 1 % unreadable images, after saving nothing worse than the last checkpoint.
    """
    autoencoder = load_autoencoder(config.vae)
    check_shapes(config, autoencoder)
    accelerator = make_accelerator(config)
    autoencoder.to(accelerator.device)
    run, checkpoint = open_run(config, accelerator)
    data = load_data(config, accelerator)
    accelerator.print(data.report)
    state = build_state(config, accelerator, data.null)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
        accelerator.print(f"going on from {checkpoint}")
    progress, steps = state.progress, config.train.steps
    batches, loader = make_batches(config, accelerator, data, progress.step)
    accelerator.print(
        f"{batches.per_epoch} batches of {config.train.batch_size} an epoch, {batches.dropped} images left over; "
        f"{sum(p.numel() for p in state.model.parameters()) / 1e6:.1f} M parameters; "
        f"{accelerator.num_processes} × {accelerator.device.type}; output {run}"
    )
    schedule = make_schedule(config.diffusion)
    start_trackers(accelerator, config)
    watch = Watch(accelerator, config, run, progress)
    saved_step = progress.step if checkpoint else -1
    problems: list[tuple[str, str]] = []  # images that could not be read since the last log

    with StopSignal() as stop:
        source = iter(loader)
        while progress.step < steps and not stop.agreed(accelerator):
            begun = time.perf_counter()
            micro_batches = [next(source) for _ in range(config.train.accumulation)]
            waited = time.perf_counter() - begun
            result = train_step(state, micro_batches, schedule, autoencoder, config)
            progress.seconds += time.perf_counter() - begun
            watch.add(result, waited)
            problems += [problem for batch in micro_batches for problem in batch.problems]
            if not result.applied:
                watch.say(f"step {progress.step}: loss {result.loss.item()} or its gradient is not finite; skipped")
                if progress.skipped_in_row >= MAX_SKIPPED[config.train.mixed_precision]:
                    raise InputError(
                        f"{progress.skipped_in_row} steps in a row were not finite, the last at step {progress.step}; "
                        f"lower optimizer.lr or optimizer.clip, then go on from the last checkpoint in {run}"
                    )

            step = progress.step
            if _due(step, config.train.log_every) or step == steps:
                _note_unreadable(state, problems, len(data.train), watch)
                problems.clear()
                watch.log(progress, learning_rate(config.optimizer, step - 1, steps))
            paused = time.perf_counter()
            if _due(step, config.train.validate_every):
                watch.write(step, validate(state, data, schedule, autoencoder, config))
            if _due(step, config.train.sample_every):
                draw_samples(state, data, autoencoder, config, run)
            if _due(step, config.train.save_every) and step < steps:
                try:
                    save_checkpoint(state, config, run)
                    saved_step = step
                except OSError as error:
                    watch.say(f"warning: step {step} could not be saved ({error}); training goes on")
            watch.pause(time.perf_counter() - paused)

    if saved_step != progress.step:
        try:
            save_checkpoint(state, config, run)
        except OSError as error:
            raise InputError(
                f"step {progress.step} could not be saved ({error}); earlier checkpoints are as they were"
            ) from None
    finished = progress.step >= steps
    watch.close()
    if not finished:
        accelerator.print(f"stopped by a signal and saved at step {progress.step}; the same command goes on")
    return RunResult(run, progress.step, finished, data)


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that all processes see after the same step; a second Ctrl-C ends at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, accelerator) -> bool:
        if accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(flag))


@torch.no_grad()
def validate(state: TrainState, data: Data, schedule, autoencoder, config: TrainConfig) -> dict[str, float]:
    """Loss of the averaged weights on the held-out images, in all and by quarter of the times, under fixed noise."""
    dataset = make_dataset(config, data, data.held_out)
    sums, counts = torch.zeros(4), torch.zeros(4)
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, record in enumerate(data.held_out):
        by_size.setdefault((record.bucket.height, record.bucket.width), []).append(i)
    size = max(config.train.batch_size // (config.train.accumulation * state.accelerator.num_processes), 1)
    for indices in by_size.values():
        for start in range(0, len(indices), size):
            # epoch -1: times and noise that no training step sees, the same at every validation
            batch = collate([dataset[-1, i] for i in indices[start : start + size]]).to(state.accelerator.device)
            with state.accelerator.autocast():
                losses = batch_losses(state.ema, state.ema, batch, schedule, autoencoder, config, dropout=False)
            quarter = (batch.time * 4).long().clamp(max=3).cpu()
            weight = batch.weight.cpu()
            sums.index_add_(0, quarter, losses["loss"].float().cpu() * weight)
            counts.index_add_(0, quarter, weight)
    result = {"validation_loss": (sums.sum() / counts.sum()).item()}
    for i in range(4):
        if counts[i]:
            result[f"validation_loss_q{i + 1}"] = (sums[i] / counts[i]).item()
    return result


def draw_samples(state: TrainState, data: Data, autoencoder, config: TrainConfig, run: Path) -> Path | None:
    """Sample the config's prompts from the averaged weights, seed by position, to `samples/` and the trackers."""
    accelerator = state.accelerator
    if not accelerator.is_main_process:
        return None
    captions = [data.captions[prompt] for prompt in config.prompts]
    side = config.model.latent_size
    latents = sample_latents(
        state.ema, config.card, captions, data.null, range(len(captions)), config.sample, height=side, width=side
    )
    images = to_images(autoencoder.decode(latents.to(accelerator.device)))
    sheet = contact_sheet([[image] for image in images], list(config.prompts))
    path = run / "samples" / f"step_{state.progress.step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            picture = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
            tracker.writer.add_image("samples", picture, state.progress.step, dataformats="HWC")
    return path


def _note_unreadable(state: TrainState, problems: list[tuple[str, str]], total: int, watch: Watch) -> None:
    """Name and count images that turned out unreadable, over all processes; too many stop the run."""
    if state.accelerator.num_processes > 1:
        everyones: list = [None] * state.accelerator.num_processes
        torch.distributed.all_gather_object(everyones, problems)
        problems = [problem for part in everyones for problem in part]
    known = state.progress.unreadable
    for name, reason in problems:
        if name not in known:
            known[name] = reason
            watch.say(f"warning: {name}: {reason}; skipped ({len(known)} so far)")
    if problems:
        check_unreadable(list(known.items()), len(known), total)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
