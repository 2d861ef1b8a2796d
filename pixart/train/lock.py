"""A lock on a run's folder, so that only one job trains into it at a time. It names its holder and never survives it.

The lock is the operating system's (`lockf`), which is released when its process ends for whatever reason. Some network
file systems have no locks, and others keep them within one host. So the holder also increments a counter in the file,
and a process that finds the file of another host, or a file system without locks, watches the counter for a while
before it takes over the folder.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pixart.errors import InputError

FILE = "run.lock"
BEAT = 10.0  # seconds between two increments of the counter
WATCH = 2.5 * BEAT  # seconds after which a counter that has not changed belongs to a dead process
PATIENCE = 3.0  # seconds to wait for a killed process to be gone; one that is saving its last step gets more
_here: set[str] = set()  # folders locked by this process itself, against which the system's locks do not protect


class RunLock:
    """The lock of one job; nothing is locked until `take` is called."""

    def __init__(self):
        self._descriptor: int | None = None
        self._over, self._writing = threading.Event(), threading.Lock()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def take(self, run: Path, patience: float, say: Callable[[str], None] = print) -> None:
        """Lock the folder, creating it if necessary.

        Args:
            patience: seconds to wait for a job that is saving its last step.

        Raises:
            InputError: another job holds the lock, or the folder cannot be written.
        """
        self.path, self._real = run / FILE, os.path.realpath(run)
        if self._real in _here:
            raise _taken(run, {"host": socket.gethostname(), "process": os.getpid()})
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._acquire(run, patience, say)
            self._state = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "beat": 0,
                "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            }
            self._write()
            if not self._locked and self._lost_race():
                raise _taken(run, self._read())
        except OSError as error:
            raise InputError(f"output {run}: cannot be written ({error}); choose another, or free some space") from None
        _here.add(self._real)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def ending(self) -> None:
        """Record in the file that this job is saving its last step, for whoever waits for the lock."""
        if self._descriptor is not None:
            self._state["ending"] = True
            self._write_quietly()

    def release(self) -> None:
        self._over.set()
        with self._writing:  # once closed, the descriptor's number may be reused for another file
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _here.discard(self._real)
            with contextlib.suppress(OSError):  # the disk may be gone; the lock itself is released below
                if self._is_mine(os.pread(descriptor, 4096, 0)):
                    self.path.unlink(missing_ok=True)
            os.close(descriptor)

    def _acquire(self, run: Path, patience: float, say: Callable[[str], None]) -> int:
        """Open the lock file and lock it, if this file system has locks."""
        began, watched = time.monotonic(), None
        while True:
            held = self._read()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._locked = _lock(descriptor)
            if self._locked is False:
                os.close(descriptor)
                waited, limit = time.monotonic() - began, patience if held.get("ending") else PATIENCE
                if waited > limit:
                    raise _taken(run, held)
                time.sleep(0.1)
                continue
            elsewhere = held and (self._locked is None or held.get("host") != socket.gethostname())
            if elsewhere and held != watched:  # closing any descriptor of the file releases its lock
                os.close(descriptor)
                say(f"{self.path} belongs to {_who(held)}; waiting {WATCH:g} s to see whether it is still running")
                watched = self._watch(run, held)
            elif self._is_current(descriptor):
                return descriptor
            else:  # its holder has removed the file in the meantime
                os.close(descriptor)

    def _watch(self, run: Path, held: dict) -> dict:
        deadline = time.monotonic() + WATCH
        while time.monotonic() < deadline:
            time.sleep(min(0.5, WATCH / 5))
            now = self._read()
            if now != held:
                if not now:  # the holder has ended normally
                    return now
                raise _taken(run, now)
        return held

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _lost_race(self) -> bool:
        """Without locks, two processes may have found the folder free at the same time: the later writer keeps it."""
        time.sleep(min(2.0, WATCH / 2))
        return not self._is_mine(self.path.read_bytes())

    def _is_mine(self, content: bytes) -> bool:
        held = _parse(content)
        return all(held.get(key) == self._state[key] for key in ("host", "process", "since"))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._state["beat"] += 1
            self._write_quietly()

    def _write_quietly(self) -> None:
        with contextlib.suppress(OSError):  # e.g. on a full disk; the lock is held all the same
            self._write()

    def _write(self) -> None:
        with self._writing:
            if self._descriptor is not None:
                os.pwrite(self._descriptor, json.dumps(self._state).ljust(255).encode() + b"\n", 0)

    def _read(self) -> dict:
        """The file's content. Call this only before locking, since closing the file releases this process's lock."""
        try:
            return _parse(self.path.read_bytes())
        except FileNotFoundError:
            return {}


def _lock(descriptor: int) -> bool | None:
    """Whether the lock was obtained; None if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _parse(content: bytes) -> dict:
    """A lock file's content; empty if it is incomplete."""
    try:
        held = json.loads(content)
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _who(held: dict) -> str:
    said = f"process {held.get('process', 'unknown')} on {held.get('host', 'unknown')}"
    return said + (f", since {held['since']}" if "since" in held else "")


def _taken(run: Path, held: dict) -> InputError:
    return InputError(f"output {run}: {_who(held)} is training into it; wait for its end, or choose another output")
