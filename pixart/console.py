"""Printing to consoles and logs whose encoding has only some characters."""

import codecs
import contextlib
import sys

_PLAIN = str.maketrans(
    {
        "×": "x",
        "→": "->",
        "≤": "<=",
        "≥": ">=",
        "…": "...",
        "–": "-",
        "—": "-",
        "·": "*",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "α": "alpha",
        "Σ": "Sigma",
        "ε": "epsilon",
        "σ": "sigma",
        "±": "+-",
        "µ": "u",
    }
)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


def plain(text: str) -> str:
    """A text in ASCII: × as x, → as ->, and what has no such form as \\uXXXX."""
    return text.translate(_PLAIN).encode("ascii", "backslashreplace").decode()


def print_anything() -> None:
    """Let standard output and error write what their encoding lacks as ASCII: × as x, → as ->, others as \\uXXXX.

    For commands; it changes the two streams of the process.
    """
    codecs.register_error("pixart.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream that someone has put in place, or a closed one
            stream.reconfigure(errors="pixart.plain")
