"""Saving in the background: the state is copied, then written by a thread while training continues."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pixart.adapters.load import save_adapter
from pixart.checkpoint.files import checkpoints, save_model, save_tensors, step_name
from pixart.files import repeat, sync, verify, write_folder
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes
from pixart.train.optimizer_state import write_moments
from pixart.train.state import STATE, Snapshot, Staging, TrainState, take_snapshot

NOT_FINITE = "weights are not finite"  # in the message of `take_failure` after which training must stop


class Saver:
    """Writes checkpoints `checkpoints/step_…` one at a time, each completely or not at all, and removes those older
    than the newest `keep` good ones.

    All processes call the same methods at the same points. Leaving its context waits for a save in progress.
    """

    def __init__(
        self, run: Path, config: TrainConfig, processes: Processes, saved_step: int, base_weights: str | None = None
    ):
        """`base_weights` is the mark of the network that an adapter is trained on."""
        self.run, self.config, self.processes, self.base_weights = run, config, processes, base_weights
        self.saved_step = saved_step  # of the newest checkpoint
        self.failures: list[str] = []  # failed saves that this process knows of and `take_failure` has not returned yet
        self.notes: list[str] = []  # problems other than a failed save
        self._good = {step_name(saved_step)}  # checkpoints whose files are known to be intact
        self._told: set[str] = set()
        self._stall: float | None = None
        self._staging, self._thread = Staging(), None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not KeyboardInterrupt:
            self.wait()

    def save(self, state: TrainState) -> None:
        """Copy the state and start writing it; waits for the previous save first."""
        begun = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(state, self.config, self._staging)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver", daemon=True)
        self._thread.start()
        self._stall = time.perf_counter() - begun

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_stall(self) -> dict[str, float]:
        """`save_stall`, the seconds for which the last save held up training; once per save."""
        stall, self._stall = self._stall, None
        return {} if stall is None else {"save_stall": stall}

    def take_failure(self) -> str | None:
        """What could not be saved and why, once per save; all processes get the same text."""
        mine, self.failures = self.failures, []
        new = {problem for problems in self.processes.gather(mine) for problem in problems} - self._told
        self._told |= new
        return "; ".join(sorted(new)) or None

    def _write(self, snapshot: Snapshot) -> None:
        # two rounds of agreement: first, every part is written; second, the folder has its final name. Every process
        # takes part in both, even after an error of its own
        try:
            target = self.run / "checkpoints" / step_name(snapshot.step)
            parts = [target.with_name(f".{target.name}.part{rank}") for rank in range(self.processes.count)]
            problem = self._attempt(lambda: self._write_part(parts[self.processes.rank], snapshot))
            problems = self.processes.gather(problem, self.processes.saving)
            if self.processes.rank == 0 and not any(problems):
                problem = self._attempt(lambda: self._write_folder(target, parts, snapshot))
            problems = self.processes.gather(problem, self.processes.saving)
            if any(problems):
                shutil.rmtree(parts[self.processes.rank], ignore_errors=True)
                self._fail(snapshot, next(filter(None, problems)))
            else:
                self.saved_step = snapshot.step
        except Exception as error:  # e.g. a lost process; the training thread reports it
            self._fail(snapshot, str(error))

    def _write_part(self, part: Path, snapshot: Snapshot) -> None:
        """What a process other than the main one writes: its rows of the optimizer state, in a folder of its own."""
        if self.processes.rank and self.sharded:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            sync(write_moments(part, snapshot.moments, self.processes.rank, self.processes.count))

    def _write_folder(self, target: Path, parts: list[Path], snapshot: Snapshot) -> None:
        def fill(folder: Path) -> None:
            for part in parts[1:] if self.sharded else []:
                for path in part.iterdir():  # fails if `output` is not on a disk that all processes share
                    path.rename(folder / path.name)
                part.rmdir()
            for place, tensors in snapshot.modules.items():
                if (folder / place).suffix:
                    save_tensors(folder / place, tensors)
                elif self.config.adapter is None:
                    save_model(folder / place, tensors, self.config.card)
                else:
                    base = self.config.init_from, self.base_weights
                    save_adapter(folder / place, tensors, self.config.adapter, self.config.card, *base)
            for place, source in snapshot.same.items():
                repeat(folder / source, folder / place)
            write_moments(folder, snapshot.moments, 0, len(parts) if self.sharded else 1)
            try:
                torch.save(snapshot.record, folder / STATE)
            except RuntimeError as error:  # torch's own type for an I/O error
                raise OSError(f"{folder / STATE}: {error}") from None

        if broken := snapshot.not_finite():
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise ValueError(f"{NOT_FINITE}: {', '.join(broken[:3])}{more}")
        write_folder(target, fill)
        self._good.add(target.name)
        try:
            self._prune()
        except OSError as error:
            self.notes.append(f"warning: an old checkpoint could not be removed ({error})")

    def _prune(self) -> None:
        """Remove all checkpoints older than the newest `keep` good ones. Damaged ones among these do not count, and
        stay. Checkpoints of earlier starts are verified once, against their manifests.
        """
        good = 0
        for path in reversed(checkpoints(self.run)):
            if good >= self.config.train.keep:
                gone = path.with_name(f".{path.name}.old")  # so that a kill leaves no half-removed checkpoint
                path.rename(gone)
                shutil.rmtree(gone)
            elif path.name in self._good or verify(path) is None:
                self._good.add(path.name)
                good += 1

    @property
    def sharded(self) -> bool:
        return self.config.train.parallel == "fsdp" and self.config.adapter is None  # an adapter is whole everywhere

    @staticmethod
    def _attempt(write: Callable[[], None]) -> str | None:
        try:
            write()
        except Exception as error:  # sent to all processes, and reported to the user by the loop
            return str(error) or type(error).__name__
        return None

    def _fail(self, snapshot: Snapshot, problem: str) -> None:
        self.failures.append(f"step {snapshot.step} could not be saved ({problem})")


def remove_partial(run: Path) -> None:
    """Remove what a run killed during a save has left behind; names of finished checkpoints do not start with a dot."""
    for path in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
