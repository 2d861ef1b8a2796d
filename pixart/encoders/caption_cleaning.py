"""Cleaning of captions as in the training of PixArt-α, which therefore expects it in sampling, too.

The rules are those of DeepFloyd IF, which PixArt-α adopted and applies twice; PixArt-Σ does not clean captions. Some
rules are odd, but they are kept as they are, since the released weights were trained with them.
"""

import contextlib
import html
import re
import warnings
from urllib.parse import unquote_plus

from pixart.errors import missing_extra

_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_LINKS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
)
_MARKS = _rules(
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u4dff\u4e00-\u9fff]+", ""),  # CJK strokes, enclosed and compatibility forms, ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),  # file names
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_NOISE = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article codes
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the middle letter of the three is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINERS = re.compile("[-_]")


def clean_caption(caption: str) -> str:
    """A caption as PixArt-α feeds it to T5: lower case, without links, markup, codes and shop phrases; cleaned twice.

    Raises:
        InputError: ftfy or beautifulsoup4 is not installed.
    """
    return _clean_once(_clean_once(caption))


def _clean_once(caption: str) -> str:
    try:
        import ftfy
        from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, ParserRejectedMarkup
    except ImportError:
        raise missing_extra("ftfy' and 'beautifulsoup4", "text", "cleaning captions") from None
    caption = _apply(_LINKS, unquote_plus(caption).strip().lower())
    # BeautifulSoup rejects "<![x"; such a caption has no markup to remove
    with warnings.catch_warnings(), contextlib.suppress(ParserRejectedMarkup):
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a caption may look like a file name
        caption = BeautifulSoup(caption, features="html.parser").text
    caption = _apply(_MARKS, caption)
    if len(_JOINERS.findall(caption)) > 3:  # this-is-my-cute-cat
        caption = _JOINERS.sub(" ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return _apply(_NOISE, caption).strip()


def _apply(rules: list[tuple[re.Pattern, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
