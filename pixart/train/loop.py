"""The training loop, top to bottom."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pixart.arguments import checked
from pixart.cpu import uses_onednn
from pixart.data.given import TrainingData
from pixart.data.images import check_unreadable
from pixart.data.samples import Batch
from pixart.data.training_set import Data, MicroBatches
from pixart.diffusion.objective import Objective
from pixart.errors import InputError
from pixart.model.pixart import PixArt
from pixart.train.config import TrainConfig
from pixart.train.distributed import Agreement, lost_process
from pixart.train.evaluate import open_scores, score_images
from pixart.train.given import Given, MakeObjective
from pixart.train.health import Window
from pixart.train.lock import RunLock
from pixart.train.log import Watch
from pixart.train.optimizer import learning_rate
from pixart.train.output import lenient_output
from pixart.train.saving import NOT_FINITE, Saver
from pixart.train.setup import Session, resolve_run, start
from pixart.train.signals import LauncherWatch, StopSignal
from pixart.train.step import StepResult, train_step
from pixart.train.trackers import quiet_writers
from pixart.train.validate import draw_samples, validate


@dataclass
class RunResult:
    run: Path
    step: int
    finished: bool  # False when a signal or `should_stop` ended it early; the same call resumes it
    data: Data
    onednn: bool  # whether the network used oneDNN's matrix product


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
    """Train as configured, resuming from the newest good checkpoint in the run's folder if there is one.

    It may be called in any thread. In the main thread, Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save and end the run; before
    the first step they end it at once, by KeyboardInterrupt or `SystemExit(75)`.

    Args:
        data: samples in place of `config.data.folder`: a list of dicts or a map-style data set, see
            `pixart.train.TrainingData` and `TrainingSample`. `config.data.validation` holds out a share of them. A
            resumed run says so if their number or ids have changed.
        model: a network in place of one made from `config.model`, which must be equal to the network's own config or
            left at its default. It is trained in place, in fp32; a resumed run loads its checkpoint into it first.
        objective: in place of `config.objective`: an instance, or a function of the network that makes one. The run's
            config.yaml names it as python:MODULE.NAME, and the run resumes only with one of that name.
        on_step: called after every optimizer step, in every process, with the number of steps done and the step's
            `StepResult`: the objective's terms, gradient norm and outcome as numbers on the device. Reading one (e.g.
            by `.item()`) waits for the device; keeping them does not. An exception that it raises ends the run.
        should_stop: called before every step, in every process. Once it returns True in any of them, all save after the
            same step (one step later with several processes) and return. The same call resumes the run.
        onednn: use oneDNN's matrix product for the network on a CPU, as the commands do (see `pixart.use_onednn`).

    Returns:
        the run's folder, how many steps it has done, and whether it is finished: False when a signal or `should_stop`
        ended it early.

    Raises:
        InputError: before the first step, if something is wrong with the configuration or the data, or another process
            is training into the same folder; later, for ten steps in a row that could not be applied, more than 1 %
            unreadable images, weights that are not finite, a worker that was killed, or a last save that failed.
        LostProcess: another process of the job ended or hangs.
    """
    given = Given(data, model, objective)
    config = resolve_run(config)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with (
        lenient_output(),
        quiet_writers(),
        StopSignal() as stop,
        LauncherWatch(config.train.timeout),
        RunLock() as lock,
    ):
        try:
            session = start(config, given=given, onednn=onednn, lock=lock)
            return _run(session, stop, lock, on_step, should_stop)
        except InputError:
            if dist.is_initialized():  # its threads would abort the process at its end
                dist.destroy_process_group()
            raise
        except RuntimeError as error:
            if lost := lost_process(error, config.train.timeout):
                raise lost from error
            raise
        finally:
            torch.use_deterministic_algorithms(deterministic)


def _run(
    session: Session, stop: StopSignal, lock: RunLock, on_step: OnStep | None, should_stop: Callable[[], bool] | None
) -> RunResult:
    config, state, run = session.config, session.state, session.run
    progress, processes, steps = state.progress, state.processes, session.config.train.steps
    first, window = progress.step, Window(run, config, processes)
    with (
        Watch(processes, state.accelerator, config, run, progress) as watch,
        Saver(run, config, processes, first if session.resumed else -1, session.base_weights) as saver,
    ):
        stop.training = True
        early = _train(session, watch, saver, window, stop, on_step, should_stop)
        lock.ending()
        if early in (SIGNAL, ASKED):
            watch.stopped_by = early
        window.read(progress, watch.say)
        if progress.step > first or progress.step >= steps:
            _save_last(saver, session, watch, config)
    saved = f"saved at step {progress.step}" if saver.saved_step == progress.step else "there was nothing to save yet"
    if early == GONE:
        raise InputError(
            f"data folder {config.data.folder}: its images are no longer there; is its disk still mounted? "
            f"{saved.capitalize()}; the same command resumes once they are back"
        )
    if early == LOST:
        raise InputError(
            "a data worker process was killed from outside, perhaps because memory ran out. "
            f"{saved.capitalize()}; the same command resumes; fewer data.workers need less memory"
        )
    if early is not None:
        state.accelerator.print(f"stopped by {early}; {saved}; the same command resumes the run")
    return RunResult(run, progress.step, progress.step >= steps, session.data, uses_onednn(state.parts.network))


# why training ended before its last step
SIGNAL, ASKED, GONE, LOST = "a signal", "should_stop", "images that are gone", "a worker that is gone"


def _train(
    session: Session,
    watch: Watch,
    saver: Saver,
    window: Window,
    stop: StopSignal,
    on_step: OnStep | None,
    should_stop: Callable[[], bool] | None,
) -> str | None:
    """All steps of a run, with logging, validation, samples and saves in between → None when the last step is done,
    else why it ended early."""
    config, state, progress = session.config, session.state, session.state.progress
    steps, device = config.train.steps, state.accelerator.device
    batches = MicroBatches(session.loader, session.reload, device, accumulation=config.train.accumulation)
    agreement, gone, images = Agreement(state.processes), False, open_scores(session, config)
    while progress.step < steps:
        enough = should_stop is not None and bool(should_stop())
        asked, enough, unsaved, gone, lost = agreement.exchange(
            stop.requested, enough, bool(saver.failures), gone, batches.lost
        )
        if unsaved:
            _report_unsaved(saver, watch, config)
        if asked or enough or gone or lost:
            agreement.drain()
            return ASKED if enough else SIGNAL if asked else GONE if gone else LOST
        begun = time.perf_counter()
        micro_batches = batches.take(progress.step)
        stop.hold_children()
        if batches.lost:
            stop.keep_holding()
        waited = time.perf_counter() - begun
        gone = _is_gone(session.data, micro_batches)
        result = train_step(state, micro_batches, session.autoencoder, config)
        progress.seconds += time.perf_counter() - begun
        watch.add(result, waited, state.calls.take())
        names = [name for batch in micro_batches for name in batch.ids]
        problems = [problem for batch in micro_batches for problem in batch.problems]
        # if the whole folder is gone, the images themselves are not bad
        window.add(progress.step, result, names, [] if gone else problems)

        if on_step is not None:
            on_step(progress.step, result)
        if _due(progress.step, config.train.log_every, steps):
            _log(session, watch, saver, window)
        paused = time.perf_counter()
        if _due(progress.step, config.train.validate_every, steps):
            watch.write(progress.step, validate(session, config))
        if images is not None and _due(progress.step, config.train.evaluate_every, steps):
            watch.write(progress.step, score_images(images, session, config, watch.say))
        if _due(progress.step, config.train.sample_every, steps):
            draw_samples(session, config)
        if _due(progress.step, config.train.save_every, steps) and progress.step < steps:
            window.read(progress, watch.say)
            watch.flush()  # a checkpoint's rows are there before it is
            progress.unlogged = watch.unlogged()
            saver.save(state)
        watch.pause(time.perf_counter() - paused)
    agreement.drain()
    return None


def _log(session: Session, watch: Watch, saver: Saver, window: Window) -> None:
    config, progress = session.config, session.state.progress
    begun = time.perf_counter()
    window.read(progress, watch.say)  # waits for the GPU
    progress.seconds += time.perf_counter() - begun
    _note_unreadable(session, window.take_problems(), watch)
    lr = learning_rate(config.optimizer, progress.step - 1, config.train.steps, config.train.batch_size)
    watch.log(progress, lr, saver.take_stall())


def _save_last(saver: Saver, session: Session, watch: Watch, config: TrainConfig) -> None:
    """Save the state at the end of training, unless already saved; this save must succeed."""
    saver.wait()
    _report_unsaved(saver, watch, config)
    if saver.saved_step != session.state.progress.step:
        session.state.progress.unlogged = watch.unlogged()
        saver.save(session.state)
        saver.wait()
    if problem := saver.take_failure():
        raise InputError(f"{problem}; earlier checkpoints are unchanged")


def _report_unsaved(saver: Saver, watch: Watch, config: TrainConfig) -> None:
    problem = saver.take_failure()
    while saver.notes:
        watch.say(saver.notes.pop(0))
    if problem and NOT_FINITE in problem:
        raise InputError(
            f"{problem}; training stops. Lower optimizer.lr or raise optimizer.eps, then resume from the last "
            f"checkpoint in {config.output}, which is unchanged"
        )
    if problem and config.train.on_save_error == "stop":
        raise InputError(f"{problem}; training stops (train.on_save_error); earlier checkpoints are unchanged")
    if problem:
        watch.say(f"warning: {problem}; training continues")


def _is_gone(data: Data, micro_batches: list[Batch]) -> bool:
    """Whether none of a step's images could be read because the data folder is no longer there."""
    if any(len(batch.problems) < len(batch.ids) for batch in micro_batches):
        return False
    return bool(data.places) and not any(path.exists() for path in data.places)


def _note_unreadable(session: Session, problems: list[tuple[str, str]], watch: Watch) -> None:
    """Report and count images that could not be read, over all processes; too many stop the run."""
    problems = [problem for part in session.state.processes.gather(problems) for problem in part]
    known, total = session.state.progress.unreadable, len(session.data.train)
    for name, reason in problems:
        if name not in known:
            known[name] = reason
            watch.say(f"warning: {name}: {reason}; skipped ({len(known)} so far)")
    if problems:
        check_unreadable(list(known.items()), len(known), total)


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something done every `every` steps and at the end is due; 0 means never."""
    return every > 0 and (step % every == 0 or step == steps)
