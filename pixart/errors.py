"""The exceptions that are no bug of ours: the input is wrong, or another process of the job is gone."""


class InputError(ValueError):
    """Wrong input from the user. The text says what was got, what was expected and what to do.

    Scripts print it as one line; library callers can catch it as a `ValueError`.
    """


class LostProcess(RuntimeError):
    """Another process of the job ended or hangs. Checkpoints are as they were; the same command goes on."""


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """The error for an optional `package` that is not installed; names the `extra` that brings it."""
    return InputError(f"{purpose} needs the package '{package}': pip install 'pixart[{extra}]'")
