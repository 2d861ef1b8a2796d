"""The exceptions that are no bug of ours: the input is wrong, or another process of the job is gone."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input from the user. The text says what was got, what was expected and what to do.

    Scripts print it as one line; library callers can catch it as a `ValueError`.
    """


class LostProcess(RuntimeError):
    """Another process of the job ended or hangs. Checkpoints are as they were; the same command goes on."""


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """The error for an optional `package` that is not installed; names the `extra` that brings it."""
    return InputError(f"{purpose} needs the package '{package}': pip install 'pixart[{extra}]'")


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """The end of an error about a `name` that is not `known`: the one nearest to it, "" where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""
