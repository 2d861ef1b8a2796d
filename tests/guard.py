"""An audit hook that checks that a reader opens no file outside its folder and starts no program."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
SECRETS = ("/etc/passwd", "/etc/shadow", "/etc/hosts")
_active: list["_Guard"] = []


class _Guard:
    def __init__(self, inside: Path, around: Path):
        self.inside, self.around = os.path.realpath(inside) + os.sep, os.path.realpath(around) + os.sep
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in PROGRAMS:
            self.seen.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path in SECRETS or (path.startswith(self.around) and not path.startswith(self.inside)):
                self.seen.append(f"open {path}")


def _hook(event: str, arguments: tuple) -> None:
    for guard in _active:
        guard(event, arguments)


@contextlib.contextmanager
def guarded(inside: Path, around: Path) -> Iterator[None]:
    """Fails if a program is started, a socket connected, or a file opened in the folder `around` that does not lie in
    `inside`, which is one of its folders."""
    if not getattr(sys, "_pixart_guard", False):  # a hook stays for good
        sys.addaudithook(_hook)
        sys._pixart_guard = True
    guard = _Guard(inside, around)
    _active.append(guard)
    try:
        yield
    finally:
        _active.remove(guard)
    assert not guard.seen, guard.seen


class TookTooLong(BaseException):
    """No `Exception`: nothing that reads files may take it for a fault of one."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails if the work takes longer than a reader of a small file may, which would else hang the tests."""

    def stop(*_):
        raise TookTooLong(f"{seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
