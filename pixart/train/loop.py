"""The training loop, top to bottom."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pixart.arguments import checked
from pixart.cpu import uses_onednn
from pixart.data.given import TrainingData
from pixart.data.images import check_unreadable
from pixart.data.samples import Batch
from pixart.data.training_set import Data, move_ahead
from pixart.diffusion.objective import Objective
from pixart.errors import InputError
from pixart.model.pixart import PixArt
from pixart.train.config import TrainConfig
from pixart.train.distributed import Agreement, lost_process
from pixart.train.given import Given, MakeObjective
from pixart.train.health import Window
from pixart.train.log import Watch
from pixart.train.optimizer import learning_rate
from pixart.train.saving import Saver
from pixart.train.setup import Session, resolve_run, start
from pixart.train.signals import StopSignal
from pixart.train.step import StepResult, train_step
from pixart.train.validate import draw_samples, validate


@dataclass
class RunResult:
    run: Path
    step: int
    finished: bool  # False when a signal, or `should_stop`, ended it early; the same call goes on
    data: Data
    onednn: bool  # whether the network's products were oneDNN's


OnStep = Callable[[int, StepResult], None]


@checked
def train(
    config: TrainConfig,
    *,
    data: TrainingData | None = None,
    model: PixArt | None = None,
    objective: Objective | MakeObjective | None = None,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    onednn: bool = False,
) -> RunResult:
    """Train as configured, going on from the newest good checkpoint in the run's folder if there is one.

    It runs in any thread; in the main one Ctrl-C, SIGTERM and SIGUSR1 save and end the run.

    Args:
        data: samples in place of `config.data.folder`: a list of dicts, or a map-style data set, see
            `pixart.train.TrainingData` and `TrainingSample`. `config.data.validation` holds a share of them out. A run
            that goes on says it if their number or ids are others than before.
        model: a network in place of one made of `config.model`, which it must equal or which must be left out. It is
            trained in place, in fp32; a run that goes on puts its own weights into it first.
        objective: in place of `config.objective`: an instance, or a function of the network that makes one. It is named
            in the run's config.yaml as python:MODULE.NAME, and the run goes on only with one of that name.
        on_step: called after every optimizer step, on every process, with the number of steps done and the step's
            `StepResult`: the objective's terms, gradient norm and outcome as numbers on the device. Reading one, as by
            `.item()`, waits for the device; keeping them does not. What it raises ends the run.
        should_stop: asked before every step, on every process; once it says True on any, all save after the same step
            (with several processes one later) and return. The same call goes on.
        onednn: the network takes oneDNN's product on a CPU, as commands have it (see `pixart.use_onednn`).

    Returns:
        the run's folder, how many steps it has done, and whether it is finished: False when a signal or `should_stop`
        ended it early.

    Raises:
        InputError: anything wrong with the configuration or the data, before the first step; ten steps in a row that
            could not be applied, more than 1 % unreadable images, or a last save that failed, later.
        LostProcess: another process of the job ended or hangs.
    """
    given = Given(data, model, objective)
    config = resolve_run(config)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with StopSignal() as stop:
        try:
            session = start(config, given=given, onednn=onednn)
            return _run(session, session.config, stop, on_step, should_stop)
        except RuntimeError as error:
            if lost := lost_process(error, config.train.timeout):
                raise lost from error
            raise
        finally:
            torch.use_deterministic_algorithms(deterministic)


def _run(
    session: Session,
    config: TrainConfig,
    stop: StopSignal,
    on_step: OnStep | None,
    should_stop: Callable[[], bool] | None,
) -> RunResult:
    state, run, steps = session.state, session.run, config.train.steps
    progress, processes = state.progress, state.processes
    first, gone = progress.step, False
    agreement, window = Agreement(processes), Window(run, config, processes)
    with (
        Watch(state.accelerator, config, run, progress) as watch,
        Saver(run, config, processes, first if session.resumed else -1, session.base_weights) as saver,
    ):
        batches = move_ahead(session.loader, state.accelerator.device)
        stop.training = True
        while progress.step < steps:
            enough = should_stop is not None and bool(should_stop())
            asked, enough, unsaved, gone = agreement.exchange(stop.requested, enough, bool(saver.failures), gone)
            if unsaved:
                _report_unsaved(saver, watch, config)
            if asked or enough or gone:
                watch.stopped_by = "should_stop" if enough else "a signal"
                break
            begun = time.perf_counter()
            micro_batches = [next(batches) for _ in range(config.train.accumulation)]
            waited = time.perf_counter() - begun
            gone = _is_gone(session.data, micro_batches)
            result = train_step(state, micro_batches, session.autoencoder, config)
            progress.seconds += time.perf_counter() - begun
            watch.add(result, waited, state.calls.take())
            names = [name for batch in micro_batches for name in batch.ids]
            problems = [problem for batch in micro_batches for problem in batch.problems]
            window.add(progress.step, result, names, [] if gone else problems)  # of a folder that is gone none is bad

            step = progress.step
            if on_step is not None:
                on_step(step, result)
            if _due(step, config.train.log_every, steps):
                begun = time.perf_counter()
                window.read(progress, watch.say)  # here a GPU is waited for
                progress.seconds += time.perf_counter() - begun
                _note_unreadable(session, window.take_problems(), watch)
                lr = learning_rate(config.optimizer, step - 1, steps, config.train.batch_size)
                watch.log(progress, lr, saver.take_stall())

            paused = time.perf_counter()
            if _due(step, config.train.validate_every, steps):
                watch.write(step, validate(session, config))
            if _due(step, config.train.sample_every, steps):
                draw_samples(session, config)
            if _due(step, config.train.save_every, steps) and step < steps:
                window.read(progress, watch.say)
                saver.save(state)
            watch.pause(time.perf_counter() - paused)

        agreement.drain()
        window.read(progress, watch.say)
        if progress.step > first or progress.step >= steps:
            _save_last(saver, session, watch, config)
    if gone and progress.step < steps:
        raise InputError(
            f"data folder {config.data.folder}: its images are not there any more; is its disk still mounted? "
            f"Saved at step {progress.step}; the same command goes on once they are back"
        )
    if progress.step < steps:
        state.accelerator.print(
            f"stopped by {watch.stopped_by} and saved at step {progress.step}; the same command goes on"
        )
    return RunResult(run, progress.step, progress.step >= steps, session.data, uses_onednn(state.parts.network))


def _save_last(saver: Saver, session: Session, watch: Watch, config: TrainConfig) -> None:
    """Save where training ends, unless that is done already; this save must succeed."""
    saver.wait()
    _report_unsaved(saver, watch, config)
    if saver.saved_step != session.state.progress.step:
        saver.save(session.state)
        saver.wait()
    if problem := saver.take_failure():
        raise InputError(f"{problem}; earlier checkpoints are as they were")


def _report_unsaved(saver: Saver, watch: Watch, config: TrainConfig) -> None:
    problem = saver.take_failure()
    if problem and config.train.on_save_error == "stop":
        raise InputError(f"{problem}; training stops (train.on_save_error); earlier checkpoints are as they were")
    if problem:
        watch.say(f"warning: {problem}; training goes on")


def _is_gone(data: Data, micro_batches: list[Batch]) -> bool:
    """Whether nothing of a step's data could be read because the images are no longer there."""
    if any(len(batch.problems) < len(batch.ids) for batch in micro_batches):
        return False
    return bool(data.places) and not any(path.exists() for path in data.places)


def _note_unreadable(session: Session, problems: list[tuple[str, str]], watch: Watch) -> None:
    """Name and count images that turned out unreadable, over all processes; too many stop the run."""
    problems = [problem for part in session.state.processes.gather(problems) for problem in part]
    known, total = session.state.progress.unreadable, len(session.data.train)
    for name, reason in problems:
        if name not in known:
            known[name] = reason
            watch.say(f"warning: {name}: {reason}; skipped ({len(known)} so far)")
    if problems:
        check_unreadable(list(known.items()), len(known), total)


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps, and at the end, is due; 0 is never."""
    return every > 0 and (step % every == 0 or step == steps)
