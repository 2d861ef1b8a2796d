"""Saving beside training: the state is copied, then written by a thread while training goes on."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pixart.adapters.load import save_adapter
from pixart.checkpoint.files import checkpoints, save_model, save_tensors
from pixart.files import sync, write_folder
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes
from pixart.train.optimizer_state import write_moments
from pixart.train.state import STATE, Snapshot, Staging, TrainState, take_snapshot


class Saver:
    """Writes checkpoints `checkpoints/step_…` whole or not at all, one at a time; the oldest beyond `keep` go.

    All processes call the same methods at the same places. Leaving its context waits for what is being written.
    """

    def __init__(
        self, run: Path, config: TrainConfig, processes: Processes, saved_step: int, base_weights: str | None = None
    ):
        """`base_weights` is the fingerprint of the network that an adapter is trained on."""
        self.run, self.config, self.processes, self.base_weights = run, config, processes, base_weights
        self.saved_step = saved_step  # of the newest checkpoint
        self.failures: list[str] = []  # that this process knows of and `take_failure` has not yet taken
        self._told: set[str] = set()
        self._stall: float | None = None
        self._staging, self._thread = Staging(), None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not KeyboardInterrupt:
            self.wait()

    def save(self, state: TrainState) -> None:
        """Copy the state and start writing it; waits for the save before this one."""
        begun = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(state, self.config, self._staging)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver", daemon=True)
        self._thread.start()
        self._stall = time.perf_counter() - begun

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_stall(self) -> dict[str, float]:
        """`save_stall`, the seconds that the last save held training up, once for each save."""
        stall, self._stall = self._stall, None
        return {} if stall is None else {"save_stall": stall}

    def take_failure(self) -> str | None:
        """What could not be saved and why, once for each save; all processes get the same."""
        mine, self.failures = self.failures, []
        new = {problem for problems in self.processes.gather(mine) for problem in problems} - self._told
        self._told |= new
        return "; ".join(sorted(new)) or None

    def _write(self, snapshot: Snapshot) -> None:
        # two rounds of telling: every part is written; the folder has its name. All take part in both, come what may
        try:
            target = self.run / "checkpoints" / f"step_{snapshot.step:08d}"
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
        except Exception as error:  # a lost process, say; training must hear of it
            self._fail(snapshot, str(error))

    def _write_part(self, part: Path, snapshot: Snapshot) -> None:
        """What a process other than the main one has to write: its rows of the optimizer's state, in a folder."""
        if self.processes.rank and self.sharded:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            sync(write_moments(part, snapshot.moments, self.processes.rank, self.processes.count))

    def _write_folder(self, target: Path, parts: list[Path], snapshot: Snapshot) -> None:
        def fill(folder: Path) -> None:
            for part in parts[1:] if self.sharded else []:
                for path in part.iterdir():  # not there: `output` is not on a disk that all processes share
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
            write_moments(folder, snapshot.moments, 0, len(parts) if self.sharded else 1)
            try:
                torch.save(snapshot.record, folder / STATE)
            except RuntimeError as error:  # torch's own type for an I/O error
                raise OSError(f"{folder / STATE}: {error}") from None

        write_folder(target, fill)
        for old in checkpoints(self.run)[: -self.config.train.keep]:
            shutil.rmtree(old)

    @property
    def sharded(self) -> bool:
        return self.config.train.parallel == "fsdp"

    @staticmethod
    def _attempt(write: Callable[[], None]) -> str | None:
        try:
            write()
        except Exception as error:  # told to all processes, and by the loop to the user
            return str(error) or type(error).__name__
        return None

    def _fail(self, snapshot: Snapshot, problem: str) -> None:
        self.failures.append(f"step {snapshot.step} could not be saved ({problem})")


def remove_partial(run: Path) -> None:
    """Remove what a run that was killed within a save has left; the names of good checkpoints have no dot."""
    for path in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
