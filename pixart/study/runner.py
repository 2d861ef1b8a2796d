"""Runs a study's trainings, each in a process of its own: one after the other, several at once, or a share of them.

A run that has ended normally leaves `finished.json` in its folder and is not started again. A run that was interrupted
is resumed by the training loop. A run that fails leaves `failed.json` with the reason, and the others go on.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pixart.config import differences as settings_of
from pixart.config import dump_yaml, flatten, meaning
from pixart.data.prepare import prepare
from pixart.errors import InputError
from pixart.files import read_json, write_json, write_text
from pixart.provenance import revision
from pixart.study.plan import Run, Study, settle_paths
from pixart.train.config import TrainConfig
from pixart.train.lock import RunLock
from pixart.train.preflight import check_sources
from pixart.train.signals import REQUEUE, WATCHED

FINISHED, FAILED, LOG = "finished.json", "failed.json", "training.log"
CONFIG, IDENTITY = (
    "study_run.yaml",
    "study_run.json",
)  # how a run was started; not its config.yaml, which training writes
PATIENCE = 120.0  # seconds in which an interrupted training must have saved and ended


class Interrupted(Exception):
    """The study was asked to stop; its trainings have saved and ended."""


def run_study(
    study: Study,
    *,
    jobs: int = 1,
    rank: int = 0,
    ranks: int = 1,
    launcher: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Train all runs of a study that are not finished yet.

    Args:
        jobs: how many to train at once on this machine; its GPUs, or else its CPU cores, are shared out among them.
        rank, ranks: train only the runs whose number in the list is `rank` modulo `ranks`.
        launcher: the beginning of a command that starts a training in place of this Python, e.g.
            "torchrun --nproc-per-node 8"; `-m pixart train CONFIG` follows.

    Raises:
        InputError: something that a run needs is missing, or finished runs had other settings; nothing was trained.
        Interrupted: SIGINT or SIGTERM; all trainings have saved and ended.
    """
    prepared: list[tuple] = []
    for arm in study.arms.values():
        data = arm.config.data
        if (key := (data.prepare, data.folder)) not in prepared:
            prepare(data)
            prepared.append(key)
    runs = [settle_paths(run) for run in study.runs]
    check_unchanged(runs)
    pending = [run for number, run in enumerate(runs) if number % ranks == rank and not is_finished(run)]
    for arm in dict.fromkeys(run.arm for run in pending):
        try:
            check_sources(next(run for run in pending if run.arm == arm).config)
        except InputError as error:
            raise InputError(f"arm '{arm}': {error}") from None
    done = len([run for run in runs if is_finished(run)])
    say(f"{len(runs)} runs: {done} finished, {len(pending)} to train here" + f", {jobs} at once" * (jobs > 1))
    with _stoppable() as stop:
        _train_all(pending, jobs, launcher, stop, say)


def is_finished(run: Run) -> bool:
    return (run.folder / FINISHED).is_file()


def why_failed(run: Run) -> str | None:
    """Why a run's last start failed; None if it did not."""
    path = run.folder / FAILED
    return str(read_json(path).get("reason", "unknown")) if path.is_file() else None


def check_unchanged(runs: Sequence[Run]) -> None:
    """Check that runs that were begun had the settings that they have now.

    Raises:
        InputError: one had others; says which.
    """
    for run in runs:
        path = run.folder / IDENTITY
        if not path.is_file():
            continue
        then, now = read_json(path), _identity(run.config)
        if changed := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
            said = ", ".join(f"{key} {then.get(key)} → {now.get(key)}" for key in changed[:5])
            raise InputError(
                f"{run.folder}: {run.name} was begun with other settings ({said}); choose another output, or remove "
                "the folder to train it anew"
            )


def _identity(config: TrainConfig) -> dict:
    """The settings that make a run what it is, as JSON has them."""
    found = json.loads(json.dumps(settings_of(config), default=str))
    return {
        key: value
        for key, value in flatten(found).items()
        if key != "output" and meaning(TrainConfig, key, "compare") != "quiet"
    }


class _Job:
    """A training in a process of its own."""

    def __init__(self, run: Run, launcher: str, environment: dict[str, str]):
        self.run, self.began = run, time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        _wait_until_free(run)
        (run.folder / FAILED).unlink(missing_ok=True)
        write_text(run.folder / CONFIG, dump_yaml(run.config))
        write_json(run.folder / IDENTITY, _identity(run.config))
        start = shlex.split(launcher) or [sys.executable]
        self.log = (run.folder / LOG).open("ab")
        self.before = self.log.tell()
        self.process = subprocess.Popen(
            [*start, "-m", "pixart", "train", str(run.folder / CONFIG)],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through this process, once
        )

    def close(self) -> str | None:
        """Record how it ended → None if it is finished, else the reason."""
        self.log.close()
        code, folder = self.process.returncode, self.run.folder
        if code == 0:
            write_json(folder / FINISHED, {"seconds": round(time.monotonic() - self.began, 1), "revision": revision()})
            return None
        reason = _last_error(folder / LOG, self.before) or f"it ended with exit code {code}"
        if code != REQUEUE:
            write_json(folder / FAILED, {"reason": reason, "exit_code": code})
        return reason


def _train_all(pending: Sequence[Run], jobs: int, launcher: str, stop: list[int], say: Callable[[str], None]) -> None:
    waiting, running, done = list(pending), {}, 0
    devices = _devices()
    while waiting or running:
        while waiting and len(running) < jobs and not stop:
            slot = next(i for i in range(jobs) if i not in running)
            run = waiting.pop(0)
            running[slot] = _Job(run, launcher, _environment(slot, jobs, devices))
        for slot, job in list(running.items()):
            if job.process.poll() is None:
                continue
            del running[slot]
            reason, done = job.close(), done + 1
            took = f"{(time.monotonic() - job.began) / 60:.1f} min"
            result = f"finished after {took}" if reason is None else f"failed after {took}: {reason}"
            if not stop:
                say(f"[{done}/{len(pending)}] {job.run.name}: {result}")
        if stop:
            _stop_all(list(running.values()))
            raise Interrupted
        time.sleep(0.05)


def _stop_all(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        job.process.send_signal(signal.SIGTERM)
    for job in jobs:
        job.process.wait()
        job.close()


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """A context in which SIGINT and SIGTERM are collected in a list."""
    stop: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: stop.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _devices() -> list[str]:
    """The GPUs that runs may take, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _environment(slot: int, jobs: int, devices: Sequence[str]) -> dict[str, str]:
    """Environment variables of the training in a slot: its GPU, or its share of the CPU cores."""
    environment = {**os.environ, WATCHED: str(os.getpid())}
    if jobs > 1 and devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    elif jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    return environment


def _wait_until_free(run: Run) -> None:
    """Wait for a training that lost its study (e.g. to SIGKILL), which notices this, saves and ends."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with RunLock() as lock:
                lock.take(run.folder, PATIENCE)
                return
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _last_error(log: Path, before: int) -> str | None:
    """The reason that a training gave, whose output begins at `before`: its `error: …` line, or the last line of a
    traceback."""
    said = log.read_bytes()[before:].decode("utf-8", "replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [None])[-1]
