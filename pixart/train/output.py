"""Standard output that fails, because a pipe is closed, a terminal is gone or a log's disk is full, loses lines but
does not end the run."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from pixart.console import plain

FOR_GOOD = (errno.EPIPE, errno.EIO)  # permanent: nothing written there will ever be read


class Lenient:
    """A stream that drops what cannot be written, and writes characters that its encoding lacks as ASCII."""

    def __init__(self, stream: TextIO):
        self._stream, self._lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                return self._stream.write(plain(text))
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def close_lost(self) -> None:
        """Make sure that flushing what is left cannot fail at the end of the process."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _drop(self, error: OSError) -> None:
        if error.errno in FOR_GOOD:
            self._discard()
        if not self._lost:
            self._lost = True
            if self is not sys.stderr:
                print(f"warning: {self._stream.name} cannot be written ({error}); training continues", file=sys.stderr)

    def _discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a stream made in Python has no descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def lenient_output() -> Iterator[None]:
    """A context in which a failing standard output or standard error raises nothing."""
    before = sys.stdout, sys.stderr
    mine = [Lenient(stream) for stream in before]
    sys.stdout, sys.stderr = mine
    try:
        yield
    finally:
        for stream in mine:
            stream.close_lost()
        sys.stdout, sys.stderr = before
