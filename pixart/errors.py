"""The one exception that means "the input is wrong", as opposed to a bug of ours."""


class InputError(ValueError):
    """Wrong input from the user. The text says what was got, what was expected and what to do.

    Scripts print it as one line; library callers can catch it as a `ValueError`.
    """


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """The error for an optional `package` that is not installed; names the `extra` that brings it."""
    return InputError(f"{purpose} needs the package '{package}': pip install 'pixart[{extra}]'")
