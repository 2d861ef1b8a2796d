"""A queue of jobs with one worker a device; a job is cancelled by its page, or once nobody looks at it any more."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from pixart.errors import InputError

WAITING = 32  # jobs that may wait; further ones are refused
ABANDONED = 30.0  # seconds after which a job that no page asks about is cancelled: the browser is gone


class Busy(InputError):
    """Another job of the same page is not finished."""


class Cancelled(Exception):
    """Raised within a job's work once it is cancelled."""


@dataclass(eq=False)
class Job:
    """Something to do on a device: `work(home, job)`, where `home` belongs to the worker. Fields below `owner` are
    written by the worker and read by the page."""

    work: Callable[[Any, "Job"], None]
    owner: str
    state: str = "waiting"  # running, done, failed, cancelled
    doing: str = ""  # what it does just now
    step: int = 0
    steps: int = 0
    x0: Any = None  # a function that makes the preview image of the last step
    results: list[Any] = field(default_factory=list)
    error: str = ""
    seen: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    _calls: list[Callable[[], None]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def when_finished(self, call: Callable[[], None]) -> None:
        """Call this once the job is finished, from whichever thread finishes it; perhaps twice, or at once."""
        self._calls.append(call)
        if self.finished:
            call()

    def finish(self, state: str) -> None:
        self.state = state
        for call in list(self._calls):
            with suppress(RuntimeError):  # the event loop that waited is closed
                call()

    def look(self) -> None:
        """The page asks about the job: it is still wanted."""
        self.seen = time.monotonic()

    def check(self) -> None:
        """Called by the work between steps.

        Raises:
            Cancelled: it is no longer wanted.
        """
        if self.cancelled or time.monotonic() - self.seen > ABANDONED:
            raise Cancelled


class Pool:
    """Workers, one for each device, that take jobs in the order in which they came."""

    def __init__(self, homes: Sequence[Any], waiting: int = WAITING):
        self.limit, self._jobs, self._running = waiting, [], {}
        self._change, self._closed = threading.Condition(), False
        self._threads = [threading.Thread(target=self._serve, args=(home,), daemon=True) for home in homes]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> Job:
        """Add a job to the queue.

        Raises:
            Busy: another job of its owner is not finished.
            InputError: too many jobs wait.
        """
        with self._change:
            if any(job.owner == other.owner and not other.cancelled for other in (*self._jobs, *self._running)):
                raise Busy("another request of this page is not finished yet: wait for it, or cancel it")
            if len(self._jobs) >= self.limit:
                raise InputError(f"{len(self._jobs)} requests wait already, and no more are taken; try again later")
            self._jobs.append(job)
            self._change.notify()
        return job

    def before(self, job: Job) -> int:
        """How many jobs are waiting or running before this one."""
        with self._change:
            return len(self._running) + self._jobs.index(job) if job in self._jobs else 0

    def cancel(self, owner: str) -> bool:
        """Cancel the owner's job; whether there was one."""
        with self._change:
            mine = [job for job in (*self._jobs, *self._running) if job.owner == owner]
            for job in mine:
                job.cancelled = True
                if job in self._jobs:
                    self._jobs.remove(job)
                    job.finish("cancelled")
        return bool(mine)

    def close(self) -> None:
        """Cancel all jobs and wait for the workers."""
        with self._change:
            self._closed = True
            for job in (*self._jobs, *self._running):
                job.cancelled = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)

    def _serve(self, home: Any) -> None:
        while (job := self._next()) is not None:
            job.state = "running"
            try:
                job.check()
                job.work(home, job)
                state = "done"
            except Cancelled:
                state = "cancelled"
            except Exception as error:
                state, job.error = "failed", in_one_line(error)
            job.x0 = None
            with self._change:
                self._running.pop(job)
                job.finish(state)

    def _next(self) -> Job | None:
        with self._change:
            self._change.wait_for(lambda: self._jobs or self._closed)
            if self._closed:
                return None
            job = self._jobs.pop(0)
            self._running[job] = True
            return job


def in_one_line(error: Exception) -> str:
    """What the page says about an error; the traceback of one that is not expected is printed."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "the memory does not suffice: take a smaller size or fewer images, or start with --low-memory"
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {text[:300]}"
