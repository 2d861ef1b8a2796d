"""The training loop, top to bottom."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pixart.data.images import check_unreadable
from pixart.errors import InputError
from pixart.train.config import TrainConfig
from pixart.train.data import Data
from pixart.train.looks import draw_samples, validate
from pixart.train.optimizer import learning_rate
from pixart.train.setup import start
from pixart.train.state import Progress, TrainState, save_checkpoint
from pixart.train.step import StepResult, train_step
from pixart.train.watch import Watch

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
        InputError: anything wrong with the configuration or the data, before the first step; ten non-finite steps in a
            row or more than 1 % unreadable images, later. Checkpoints are as they were.
    """
    session = start(config)
    state, run, accelerator = session.state, session.run, session.state.accelerator
    progress, steps = state.progress, config.train.steps
    saved_step = progress.step if session.resumed else -1
    problems: list[tuple[str, str]] = []  # images that could not be read since the last log

    with Watch(accelerator, config, run, progress) as watch, StopSignal() as stop:
        batches = iter(session.loader)
        while progress.step < steps and not stop.agreed(accelerator):
            begun = time.perf_counter()
            micro_batches = [next(batches) for _ in range(config.train.accumulation)]
            waited = time.perf_counter() - begun
            result = train_step(state, micro_batches, session.schedule, session.autoencoder, config)
            progress.seconds += time.perf_counter() - begun
            watch.add(result, waited, micro_batches)
            problems += [problem for batch in micro_batches for problem in batch.problems]
            if not result.applied:
                _note_skipped(progress, result, config, watch)

            step = progress.step
            if _due(step, config.train.log_every, steps):
                _note_unreadable(state, problems, len(session.data.train), watch)
                problems.clear()
                watch.log(progress, learning_rate(config.optimizer, step - 1, steps, config.train.batch_size))

            paused = time.perf_counter()
            if _due(step, config.train.validate_every, steps):
                watch.write(step, validate(session, config))
            if _due(step, config.train.sample_every, steps):
                draw_samples(session, config)
            if _due(step, config.train.save_every, steps) and step < steps:
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
    if not finished:
        accelerator.print(f"stopped by a signal and saved at step {progress.step}; the same command goes on")
    return RunResult(run, progress.step, finished, session.data)


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


def _note_skipped(progress: Progress, result: StepResult, config: TrainConfig, watch: Watch) -> None:
    watch.say(f"step {progress.step}: loss {result.loss.item()} or its gradient is not finite; skipped")
    if progress.skipped_in_row >= MAX_SKIPPED[config.train.mixed_precision]:
        raise InputError(
            f"{progress.skipped_in_row} steps in a row were not finite, the last at step {progress.step}; "
            f"lower optimizer.lr or optimizer.clip, then go on from the last checkpoint in {config.output}"
        )


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


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps, and at the end, is due; 0 is never."""
    return every > 0 and (step % every == 0 or step == steps)
