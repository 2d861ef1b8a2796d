"""Does a run with many faults end like an undisturbed one, bit for bit? With several processes.

python tests/chaos.py tests/chaos.yaml --faults 20

The faults, each at a random moment: SIGKILL to one process or all, also during a save; a signal to the whole process
group; a killed data worker; checkpoints that are temporarily unreadable; a second start in the same folder; a disk that
is temporarily full, whatever is being written.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

import pixart.train.loop as loop
from pixart import cli
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.config import load_config
from pixart.errors import InputError
from pixart.files import append_rows, read_rows
from pixart.train.config import TrainConfig
from pixart.train.signals import REQUEUE

PATIENCE = 300  # seconds for a start, or for the end of processes whose companion was killed
CLOCK = {"images_per_second", "data_wait", "model_tflops", "memory_gb", "seconds", "gpu_hours", "save_stall"}


@dataclass
class Verdict:
    faults: Counter  # how many of each
    within_saves: int  # of the kills, those that tore a checkpoint
    starts: int
    tensors: int  # weights, averages and moments that were compared, bit for bit
    different: list[str]  # of them
    rows: int  # of metrics.jsonl, without the clock's numbers
    other_rows: list[int]  # the steps of those that differ
    samples: int  # that the run consumed; those of steps done twice too
    misplaced: int  # steps with other samples than the whole run's

    @property
    def good(self) -> bool:
        return not self.different and not self.misplaced and not self.other_rows

    def __str__(self) -> str:
        end = (
            "equal bit for bit"
            if self.good
            else f"DIFFERENT: {self.different[:5]}, rows of steps {self.other_rows[:5]}, "
            f"{self.misplaced} samples misplaced"
        )
        met = ", ".join(f"{count} × {name}" for name, count in sorted(self.faults.items()))
        return (
            f"{met} ({self.within_saves} within a save), {self.starts} starts: {self.tensors} tensors, {self.rows} "
            f"rows and {self.samples} samples {end}"
        )


@dataclass
class Trial:
    """A run that is to meet faults."""

    config: str | Path
    run: Path
    processes: int
    overrides: Sequence[str]
    numbers: random.Random
    steps: int
    left: int  # faults still to come, this one too
    starts: int = 0
    within_saves: int = 0
    faults: Counter = field(default_factory=Counter)
    ranks: list = field(default_factory=list)  # of the last start

    def launch(self) -> list:
        self.starts += 1
        self.ranks = _launch(self.config, self.run, self.processes, self.overrides)
        return self.ranks

    def reach(self, ranks: list, *, within_save: bool = False) -> None:
        """Wait until the run has done a random number of further steps.

        Raises:
            InputError: it ended before.
        """
        start = max([int(path.name[5:]) for path in checkpoints(self.run)], default=0)
        target = start + self.numbers.randint(2, max((self.steps - start) // (self.left + 1), 3))
        notes, deadline = self.run / "samples-0.jsonl", time.monotonic() + PATIENCE
        before = notes.stat().st_size if notes.exists() else 0  # what the starts before this one have left
        while time.monotonic() < deadline:
            ended = [rank for rank in ranks if rank.poll() is not None]
            if ended:
                raise InputError(f"a process was over before its fault; raise train.steps, or see {ended[0].log}")
            going = notes.exists() and notes.stat().st_size > before and _step(notes) >= target
            if going and (not within_save or list((self.run / "checkpoints").glob(".step_*.part*"))):
                return
            time.sleep(0.0005)
        raise InputError(f"the run does not come forward; see {ranks[0].log.parent}")


def chaos(
    config: str | Path,
    folder: Path,
    *,
    processes: int,
    faults: Sequence[str],
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Verdict:
    """Train twice into `folder`, once undisturbed and once with `faults`, keys of FAULTS, and compare the ends.

    Raises:
        InputError: a fault did not end as it should, a run failed without one, or it ended before all were done (use
            more steps).
    """
    steps = load_config(TrainConfig, config, overrides).train.steps
    whole, run = folder / "whole", folder / "killed"
    for name, text in _finish(_launch(config, whole, processes, overrides)).items():
        raise InputError(f"the undisturbed run failed in process {name}:\n{text[-2000:]}")
    trial = Trial(config, run, processes, overrides, random.Random(seed), steps, len(faults))
    for fault in faults:
        try:
            FAULTS[fault](trial)
        finally:  # also those that a fault has put to sleep
            _end(trial.ranks)
        trial.left -= 1
        trial.faults[fault] += 1
    for name, text in _finish(trial.launch()).items():
        raise InputError(f"the last start failed in process {name}:\n{text[-2000:]}")
    first, second = (tensors(newest_checkpoint(one, print)) for one in (whole, run))
    different = [
        name
        for name in sorted({*first, *second})
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]
    rows, others = _compare_rows(whole, run)
    samples, misplaced = _compare_samples(whole, run, processes)
    return Verdict(
        trial.faults, trial.within_saves, trial.starts, len(first), different, rows, others, samples, misplaced
    )


# -------------------------------------------------------------------------------------------------------------- faults


def kill(trial: Trial) -> None:
    """SIGKILL to all processes or to one, whose companions must then end by themselves; every other within a save."""
    ranks = trial.launch()
    within_save = trial.faults["kill"] % 2 == 0
    trial.reach(ranks, within_save=within_save)
    if not within_save:
        time.sleep(trial.numbers.uniform(0, 0.02))
    _end(ranks if trial.numbers.random() < 0.5 else [trial.numbers.choice(ranks)])
    _expect(ranks, "SIGKILL", lambda codes: -signal.SIGKILL in codes)
    trial.within_saves += bool(list((trial.run / "checkpoints").glob(".step_*.part*")))


def signal_group(trial: Trial) -> None:
    """A signal to all processes and their workers at once, which saves and ends the run."""
    ranks = trial.launch()
    trial.reach(ranks)
    number = trial.numbers.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
    for rank in ranks:
        os.killpg(rank.pid, number)
    _expect(ranks, number.name, lambda codes: set(codes) == {REQUEUE}, "stopped by a signal; saved at step")


def kill_worker(trial: Trial) -> None:
    """SIGKILL to a worker of a process, as for memory, which ends the run saved."""
    ranks = trial.launch()
    trial.reach(ranks)
    trial.numbers.choice(psutil.Process(trial.numbers.choice(ranks).pid).children()).kill()
    _expect(ranks, "a killed worker", lambda codes: set(codes) == {2}, "was killed from outside", "Saved at step")


def unreadable(trial: Trial) -> None:
    """A start while the checkpoints cannot be read, which must end and change nothing; after a kill."""
    ranks = trial.launch()
    trial.reach(ranks)
    _end(ranks)
    _wait(ranks)
    folder, away = trial.run / "checkpoints", trial.run / "checkpoints.away"
    rows, config = (trial.run / "metrics.jsonl").read_bytes(), (trial.run / "config.yaml").read_bytes()
    folder.rename(away)
    folder.symlink_to(folder.name)  # to list it fails, whoever asks
    _expect(trial.launch(), "checkpoints that cannot be read", lambda codes: set(codes) == {2}, "cannot be read")
    folder.unlink()
    away.rename(folder)
    if ((trial.run / "metrics.jsonl").read_bytes(), (trial.run / "config.yaml").read_bytes()) != (rows, config):
        raise InputError("a start that could not read the checkpoints has changed the run")


def second_start(trial: Trial) -> None:
    """A second start beside the first, which must end, and the first go on; then that is killed."""
    ranks = trial.launch()
    trial.reach(ranks)
    for rank in ranks:  # asleep meanwhile, so that it is not over before the second has begun
        rank.send_signal(signal.SIGSTOP)
    step = _step(trial.run / "samples-0.jsonl")
    others = _launch(trial.config, trial.run, trial.processes, trial.overrides, "second")
    _expect(others, "a second start", lambda codes: set(codes) == {2}, "is training into it")
    if _step(trial.run / "samples-0.jsonl") > step:
        raise InputError(f"a second start has trained beside the first; see {others[0].log.parent}")
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    trial.reach(ranks)
    _end(ranks)
    _wait(ranks)


def fill_disk(trial: Trial) -> None:
    """A disk that takes no file beyond a random size for a while, in the middle of whatever is being written; the run
    must go on, and is killed later."""
    ranks = trial.launch()
    trial.reach(ranks)
    limit = trial.numbers.choice([0, 1, 1_000, 10_000, 100_000])
    for rank in ranks:
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    time.sleep(trial.numbers.uniform(0.2, 1.5))
    for rank in ranks:
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trial.reach(ranks)
    _end(ranks)
    _wait(ranks)


FAULTS: dict[str, Callable[[Trial], None]] = {
    "kill": kill,
    "signal": signal_group,
    "worker": kill_worker,
    "unreadable": unreadable,
    "second start": second_start,
    "full disk": fill_disk,
}


def draw_faults(count: int, seed: int) -> list[str]:
    """Faults in a random order, each kind as often as the others, to within one."""
    numbers, drawn = random.Random(seed), []
    while len(drawn) < count:
        drawn += numbers.sample(list(FAULTS), len(FAULTS))
    return drawn[:count]


def _expect(ranks: list, what: str, good: Callable[[list[int]], bool], *words: str) -> None:
    codes = _wait(ranks)
    text = "".join(rank.log.read_text(errors="replace") for rank in ranks)
    if not good(codes) or any(word not in text for word in words) or (words and "Traceback" in text):
        raise InputError(f"after {what} the processes ended with {codes}; see {ranks[0].log.parent}:\n{text[-2000:]}")


def _end(ranks: list) -> None:
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)


# ----------------------------------------------------------------------------------------------------------- processes


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        file = path.relative_to(checkpoint).as_posix()
        found.update({f"{file}:{name}": value for name, value in load_file(path).items()})
    return found


def launch(command: Sequence[str], processes: int, logs: Path, environment: dict[str, str] | None = None) -> list:
    """Start `command` once for each rank, as torchrun does but without its watch, output to `logs`/rank.log; each
    leads a group of its own."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(processes):
        place = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        with open(logs / f"{rank}.log", "w", encoding="utf-8") as log:
            ranks.append(
                subprocess.Popen(
                    list(command),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **(environment or {}), **{name: str(value) for name, value in place.items()}},
                )
            )
        ranks[-1].log = logs / f"{rank}.log"
    return ranks


def _launch(config: str | Path, run: Path, processes: int, overrides: Sequence[str], logs: str = "logs") -> list:
    command = [sys.executable, __file__, "--process", str(config), *overrides, f"output={run}"]
    return launch(command, processes, run.parent / f"{run.name}.{logs}")


def _finish(ranks: list) -> dict[int, str]:
    """Wait for all ranks → the logs of those that failed, with their exit codes; a signal's is negative."""
    failed = {
        i: (rank.log.read_text(), code) for i, (rank, code) in enumerate(zip(ranks, _wait(ranks), strict=True)) if code
    }
    return {i: f"{text}\nexit code {code}" for i, (text, code) in failed.items()}


def _wait(ranks: list) -> list[int]:
    """The exit codes of all ranks, none of which may hang."""
    try:
        return [rank.wait(timeout=PATIENCE) for rank in ranks]
    except subprocess.TimeoutExpired:
        raise InputError(f"a process hangs; see {ranks[0].log.parent}") from None
    finally:
        for rank in ranks:
            rank.kill()


def _step(notes: Path) -> int:
    """The step of the last whole line."""
    with open(notes, "rb") as file:
        file.seek(max(file.seek(0, 2) - 4096, 0))
        lines = file.read().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 2 else 0


def _compare_rows(whole: Path, run: Path) -> tuple[int, list[int]]:
    """How many rows of metrics.jsonl there are, and the steps of those that differ in more than the clock's numbers."""
    expected, found = (
        [{key: value for key, value in row.items() if key not in CLOCK} for row in read_rows(one / "metrics.jsonl")]
        for one in (whole, run)
    )
    odd = [row["step"] for row in [*expected, *found] if row not in expected or row not in found]
    return len(expected), sorted(set(odd)) or [0] * (len(expected) != len(found))


def _compare_samples(whole: Path, killed: Path, processes: int) -> tuple[int, int]:
    """Samples that the killed run consumed in all its starts, and the steps where the whole run had others, or none."""
    count = misplaced = 0
    for rank in range(processes):
        expected = {row["step"]: row for row in read_samples(whole, rank)}
        rows = read_samples(killed, rank)
        count += sum(len(row["ids"]) for row in rows)
        misplaced += sum(row != expected.get(row["step"]) for row in rows)
        misplaced += len(set(expected) - {row["step"] for row in rows})
    return count, misplaced


def read_samples(run: Path, rank: int) -> list[dict]:
    """What `note_samples` wrote, less a line that a kill tore."""
    return list(read_rows(run / f"samples-{rank}.jsonl"))


def note_samples(run: Path, rank: int) -> None:
    """From now on, training writes a line for each step: the ids, and sums of the times and noise, of its samples."""
    original, unwritten = loop.train_step, []

    def noting(state, micro_batches, *arguments):
        step = state.progress.step
        result = original(state, micro_batches, *arguments)
        unwritten.append(
            {
                "step": step,
                "ids": [name for batch in micro_batches for name in batch.ids],
                "time": [time for batch in micro_batches for time in batch.time.tolist()],
                "noise": [total for batch in micro_batches for total in batch.noise.double().sum((1, 2, 3)).tolist()],
            }
        )
        with contextlib.suppress(OSError):  # of a full disk: later, then
            append_rows(run / f"samples-{rank}.jsonl", unwritten)
            unwritten.clear()
        return result

    loop.train_step = noting


def train_noting(arguments: Sequence[str]) -> int:
    """One process of a run: training that notes its samples."""
    config = load_config(TrainConfig, arguments[0], arguments[1:])
    note_samples(Path(config.output), int(os.environ["RANK"]))
    return 0 if loop.train(config).finished else REQUEUE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as tests/chaos.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as train.steps=100")
    parser.add_argument("--faults", type=int, default=20, help="of each kind of run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments")
    arguments = parser.parse_intermixed_args()
    good = True
    for kind in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            verdict = chaos(
                arguments.config,
                Path(folder),
                processes=arguments.processes,
                faults=draw_faults(arguments.faults, arguments.seed),
                seed=arguments.seed,
                overrides=[*arguments.overrides, f"train.parallel={kind}"],
            )
        print(f"{arguments.processes} processes, {kind}: {verdict}", flush=True)
        good = good and verdict.good
    return 0 if good else 1


if __name__ == "__main__":
    cli.run(partial(train_noting, sys.argv[2:]) if sys.argv[1:2] == ["--process"] else main)
