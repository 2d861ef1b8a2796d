"""Does a run that is killed again and again end like one that never was? Several processes, SIGKILL, bit for bit.

python tests/chaos.py tests/chaos.yaml --kills 10
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import pixart.train.loop as loop
from pixart import cli
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.config import load_config
from pixart.errors import InputError
from pixart.files import read_rows
from pixart.train.config import TrainConfig

PATIENCE = 300  # seconds for a start, or for the end of processes whose companion was killed


@dataclass
class Verdict:
    kills: int
    within_saves: int  # of the kills, those that tore a checkpoint
    starts: int
    tensors: int  # weights, averages and moments that were compared, bit for bit
    different: list[str]  # of them
    samples: int  # that the run consumed; those of steps done twice too
    misplaced: int  # steps with other samples than the whole run's

    @property
    def good(self) -> bool:
        return not self.different and not self.misplaced

    def __str__(self) -> str:
        end = (
            "equal bit for bit" if self.good else f"DIFFERENT: {self.different[:5]}, {self.misplaced} samples misplaced"
        )
        return (
            f"{self.kills} kills ({self.within_saves} within a save), {self.starts} starts: {self.tensors} tensors and "
            f"{self.samples} samples {end}"
        )


def chaos(
    config: str | Path, folder: Path, *, processes: int, kills: int, seed: int = 0, overrides: Sequence[str] = ()
) -> Verdict:
    """Train twice into `folder`, once undisturbed and once with SIGKILL at random moments, and compare the ends.

    Every other kill waits for a save to be under way. Some kill all processes, some one: the others must then end by
    themselves.

    Raises:
        InputError: a run failed without being killed, or it ended before all kills were done (use more steps).
    """
    numbers, steps = random.Random(seed), load_config(TrainConfig, config, overrides).train.steps
    whole, killed = folder / "whole", folder / "killed"
    for name, text in _finish(_launch(config, whole, processes, overrides)).items():
        raise InputError(f"the undisturbed run failed in process {name}:\n{text[-2000:]}")
    done = within = starts = 0
    while done < kills:
        starts += 1
        ranks = _launch(config, killed, processes, overrides)
        torn = _kill(ranks, killed, steps, numbers, within_save=done % 2 == 0)
        if torn is None:
            raise InputError(f"the run was over after {done} of {kills} kills; raise train.steps")
        done, within = done + 1, within + torn
    for name, text in _finish(_launch(config, killed, processes, overrides)).items():
        raise InputError(f"the last start failed in process {name}:\n{text[-2000:]}")
    first, second = (tensors(newest_checkpoint(run, print)) for run in (whole, killed))
    different = [name for name in sorted({*first, *second})
                 if name not in first or name not in second or not torch.equal(first[name], second[name])]  # fmt: skip
    samples, misplaced = _compare_samples(whole, killed, processes)
    return Verdict(done, within, starts + 1, len(first), different, samples, misplaced)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        file = path.relative_to(checkpoint).as_posix()
        found.update({f"{file}:{name}": value for name, value in load_file(path).items()})
    return found


def launch(command: Sequence[str], processes: int, logs: Path, environment: dict[str, str] | None = None) -> list:
    """Start `command` once for each rank, as torchrun does but without its watch, output to `logs`/rank.log."""
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
            ranks.append(subprocess.Popen(
                list(command), stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), **{name: str(value) for name, value in place.items()}},
            ))  # fmt: skip
        ranks[-1].log = logs / f"{rank}.log"
    return ranks


def _launch(config: str | Path, run: Path, processes: int, overrides: Sequence[str]) -> list:
    command = [sys.executable, __file__, "--process", str(config), *overrides, f"output={run}"]
    return launch(command, processes, run.parent / f"{run.name}.logs")


def _finish(ranks: list) -> dict[int, str]:
    """Wait for all ranks → the logs of those that failed."""
    codes = _wait(ranks)
    return {i: rank.log.read_text() for i, (rank, code) in enumerate(zip(ranks, codes, strict=True)) if code}


def _kill(ranks: list, run: Path, steps: int, numbers: random.Random, *, within_save: bool) -> bool | None:
    """Kill all ranks or one at a random moment → whether that tore a save; None if the run was over before."""
    start = max([int(path.name[5:]) for path in checkpoints(run)], default=0)
    target = start + numbers.randint(2, max((steps - start) // 3, 3))
    delay, victims = numbers.uniform(0, 0.02), ranks if numbers.random() < 0.5 else [numbers.choice(ranks)]
    notes, deadline = run / "samples-0.jsonl", time.monotonic() + PATIENCE
    before = notes.stat().st_size if notes.exists() else 0  # what the starts before this one have left
    while time.monotonic() < deadline and not any(rank.poll() is not None for rank in ranks):
        going = notes.exists() and notes.stat().st_size > before and _step(notes) >= target
        if going and (not within_save or list((run / "checkpoints").glob(".step_*"))):
            time.sleep(0 if within_save else delay)
            for rank in victims:
                rank.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    codes = _wait(ranks)
    if -signal.SIGKILL not in codes:
        if any(codes):
            raise InputError(f"a process failed before it was killed; see {ranks[0].log.parent}")
        return None
    return bool(list((run / "checkpoints").glob(".step_*")))


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
    original = loop.train_step

    def noting(state, micro_batches, *arguments):
        step = state.progress.step
        result = original(state, micro_batches, *arguments)
        row = {
            "step": step,
            "ids": [name for batch in micro_batches for name in batch.ids],
            "time": [time for batch in micro_batches for time in batch.time.tolist()],
            "noise": [total for batch in micro_batches for total in batch.noise.double().sum((1, 2, 3)).tolist()],
        }
        with open(run / f"samples-{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return result

    loop.train_step = noting


def train_noting(arguments: Sequence[str]) -> int:
    """One process of a run: training that notes its samples."""
    config = load_config(TrainConfig, arguments[0], arguments[1:])
    note_samples(Path(config.output), int(os.environ["RANK"]))
    loop.train(config)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as tests/chaos.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as train.steps=100")
    parser.add_argument("--kills", type=int, default=10, help="of each kind of run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    good = True
    for kind in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            verdict = chaos(
                arguments.config, Path(folder), processes=arguments.processes, kills=arguments.kills,
                seed=arguments.seed, overrides=[*arguments.overrides, f"train.parallel={kind}"],
            )  # fmt: skip
        print(f"{arguments.processes} processes, {kind}: {verdict}", flush=True)
        good = good and verdict.good
    return 0 if good else 1


if __name__ == "__main__":
    cli.run(partial(train_noting, sys.argv[2:]) if sys.argv[1:2] == ["--process"] else main)
