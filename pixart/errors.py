"""Exceptions that are not bugs of this package: wrong input, or the loss of another process of the job."""

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

LONGEST_LINE = 1200


class InputError(ValueError):
    """Wrong input from the user. The message says what was got, what was expected and what to do.

    Scripts print it as one line; library callers can catch it as a `ValueError`. A line of more than `LONGEST_LINE`
    characters, as when a file holds an absurdly long value, keeps its beginning (place, got) and its end (what to do).
    """

    def __init__(self, message: object) -> None:
        super().__init__("\n".join(map(_shorten, str(message).split("\n"))))


def _shorten(line: str) -> str:
    head, tail = LONGEST_LINE * 2 // 3, LONGEST_LINE // 3
    return line if len(line) <= LONGEST_LINE else f"{line[:head]} … {line[-tail:]}"


class LostProcess(RuntimeError):
    """Another process of the job ended or hangs. Checkpoints are unchanged, and the same command resumes."""


class CannotWrite(OSError):
    """A file or folder could not be written, and is as it was; `target` is its path."""

    def __init__(self, target: Path, cause: OSError):
        super().__init__(*cause.args)
        self.target = target


def disk_problem(error: OSError) -> str | None:
    """What a command says about an error of the disk that it writes to, None if the error is another one."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    target = error.target if isinstance(error, CannotWrite) else error.filename
    if not full and not isinstance(error, CannotWrite):
        return None
    return (
        f"{target or 'a file'}: cannot be written ({error.strerror or error}); free some space, or name another place"
    )


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """The error for an optional `package` that is not installed; it names the `extra` that installs it."""
    return InputError(f"{purpose} needs the package '{package}': pip install 'pixart[{extra}]'")


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """The end of an error about a `name` that is not `known`: the most similar known name, or "" if none is similar."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""
