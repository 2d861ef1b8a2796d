"""Bytes as text, by rules that never guess between two readings; and text that no file can hold."""

import codecs
import re

_MARKS = (
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),  # before UTF-16, whose mark is the first half of this one
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
_BINARY = re.compile("[\0-\x08\x0e-\x1f]")  # control characters that no text has
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}")
_LONG_RUN = re.compile(rb"[\x80-\xff]{4}")
_CONTROL = re.compile("[\0-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_text(data: bytes) -> tuple[str, str]:
    """Text and the name of its encoding.

    A byte order mark decides; without one, text is UTF-8 if it is valid UTF-8. Anything else may be Windows-1252, or
    UTF-16 without a mark, but only where no other common encoding is plausible: of UTF-16, most characters must be
    Latin; of Windows-1252, at most a third of the characters may be outside ASCII, never four in a row (as in Chinese,
    Japanese, Cyrillic or Greek encodings), and none of them may form UTF-8 (as in files of mixed encodings).

    Raises:
        ValueError: the bytes are not text by these rules.
    """
    for mark, codec, name in _MARKS:
        if data.startswith(mark):
            return _check(data[len(mark) :].decode(codec)), name
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        reason = f"not UTF-8 at byte {error.start} (0x{byte:02x}, line {line})"
    else:
        if "\0" not in text:
            return _check(text), "UTF-8"
        reason = "it holds NUL characters"
    for zeros, codec in ((data[1::2], "utf-16-le"), (data[::2], "utf-16-be")):
        if not len(data) % 2 and zeros.count(0) > 0.9 * len(zeros):
            return _check(data.decode(codec)), "UTF-16 without a mark"
    high = sum(byte >= 0x80 for byte in data)
    if high and 3 * high <= len(data) and not _LONG_RUN.search(data) and not _UTF8.search(data):
        try:
            return _check(data.decode("cp1252")), "Windows-1252"
        except ValueError:
            pass
    raise ValueError(f"{reason}, and no other encoding is certain; save it as UTF-8")


def _check(text: str) -> str:
    if found := _BINARY.search(text):
        raise ValueError(f"it holds the control character U+{ord(found[0]):04X}, so it is not text")
    return text


def is_whole(text: str) -> bool:
    """Whether a text has no lone surrogate: half of a character, or a byte of an argument that is not UTF-8."""
    return text.isascii() or not _SURROGATE.search(text)


def mend(text: str) -> str:
    """A text with U+FFFD in place of each lone surrogate."""
    return text if is_whole(text) else _SURROGATE.sub("\ufffd", text)


def tidy(text: str) -> str:
    """A caption on one line: lone surrogates replaced by U+FFFD, and control characters, which a terminal would obey,
    and white space by single spaces."""
    return " ".join(_CONTROL.sub(" ", mend(text)).split())
