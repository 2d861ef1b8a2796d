"""Settings at the end of a prompt: `--ar h:w` and `--hw h:w`, in the spellings that users and their editors produce."""

import re
import unicodedata

from pixart.arguments import say
from pixart.errors import InputError

_DASHES = "-\u2010-\u2015\u2212\ufe58\ufe63\uff0d"  # hyphens, en and em dashes, minus signs
# "--ar", "–ar" (what editors make of two hyphens), "-- ar"; "-ar" only before a number
_START = rf"(?:[{_DASHES}]{{2,}}\s?|[\u2012-\u2015\u2212]+\s?|-(?=(?:ar|hw)[\s=:]*\d))"
_SETTING = re.compile(rf"(?<!\w){_START}(ar|hw)(?![^\W\d_])", re.IGNORECASE)
_OTHER = re.compile(r"(?<!\S)--([a-zA-Z][\w-]*)")  # --stylize, --no: settings of other programs
_VALUE = re.compile(r"=?\s*(\d+(?:\.\d+)?)(?:\s*[:/x×*∶]\s*(\d+(?:\.\d+)?))?", re.IGNORECASE)
_EXPECTED = "expected a text that ends in one --ar h:w or --hw h:w"


def split_prompt(line: str) -> tuple[str, dict[str, float]]:
    """(prompt, size), the size as arguments of `Pipeline.__call__`.

    "a cat --ar 3:4" asks for an aspect ratio, height to width, and so does "a cat --ar 0.75"; "a cat --hw 768:1024" and
    "a cat --hw 768" ask for pixels; "a cat" for neither. Dashes, full-width forms, =, x and / are read as meant.

    Raises:
        InputError: what looks like such a setting is none, is not at the end, or is there twice.
    """
    found = [*_SETTING.finditer(line)]
    if not found:
        check_no_settings(line, "prompt")
        return line.strip(), {}
    text, key = line[: found[0].start()].strip(), found[0][1].lower()
    tail = unicodedata.normalize("NFKC", line[found[0].end() :]).strip(" \t.,;\"'”’")
    value = _VALUE.fullmatch(tail)
    if len(found) > 1 or value is None or not text:
        raise InputError(f"prompt {say(line)}: {_EXPECTED}; got {say(line[found[0].start() :])}")
    check_no_settings(text, "prompt")
    high, wide = float(value[1]), float(value[2] or 1)
    if key == "hw" and value[2] is None:
        wide = high
    if high == 0 or wide == 0 or (key == "hw" and not (high.is_integer() and wide.is_integer())):
        raise InputError(f"prompt {say(line)}: --ar takes positive numbers, --hw whole pixels")
    return text, {"aspect_ratio": high / wide} if key == "ar" else {"height": int(high), "width": int(wide)}


def check_no_settings(text: str, name: str) -> None:
    """Refuse a text in which something looks like a setting, since it would be drawn as words.

    Raises:
        InputError: names it; `name` is what the text is.
    """
    if found := _SETTING.search(text) or _OTHER.search(text):
        word = found[1].lower()
        if word in ("ar", "hw"):
            raise InputError(
                f"{name} {say(text)}: '{found[0]}' would be drawn as words; give the size as height and width, or as "
                "aspect_ratio"
            )
        raise InputError(
            f"{name} {say(text)}: '{found[0]}' looks like a setting, and there is none of this name in a prompt; for a "
            "dash that is meant, write –"
        )
