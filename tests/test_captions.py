"""Caption cleaning against diffusers' PixArtAlphaPipeline, which cleans twice as the authors do."""

import sys
import warnings
from contextlib import suppress

import pytest
from bs4 import ParserRejectedMarkup
from diffusers import PixArtAlphaPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pixart.encoders.caption_cleaning import clean_caption
from pixart.errors import InputError

NASTY = [
    "",
    "   \n\t ",
    "A photo of a cat",
    "An astronaut riding a GREEN horse, 4k, trending on artstation!!!",
    "<person> and <PERSON> at the beach",
    "see https://www.example.com/a/b?c=d&e=f for more",
    "http:example and www:abc and www.site.org/path mail me@example.com",
    "buy at shop.co.uk or some-shop.ru now",
    "<b>bold</b> <a href='x.html'>link</a> &lt;i&gt; &amp;amp; &quot;quoted&quot;",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#39; &#x41; &nbsp; &eacute",
    "<!-- comment --> text <br/> more </p> <unclosed",
    "@nickname painted this @someone_else's dog",
    "日本の猫 a cat ㈱ ㍿ ㇀ ䷀ ひらがな カタカナ ㇰ",
    "dash ‐ ‑ ‒ – — ― 〜 ﹘ ー − end",
    "quotes «a» “b” ”c„ `d´ ‘e’ ¨f¨",
    "server at 192.168.0.1 and 1.2.3.4.5",
    "at 5:30   ",
    "line\\none\\ntwo\nreal newline",
    "#1 #12 #123 #1234 #12345 #123456789 issue",
    "id 123456 and 12345 and 1234567890",
    "photo.jpg IMG_2034.JPEG my file.png archive.pdf movie.mp4x",
    "C:\\Users\\me\\picture.bmp and /tmp/a.webp",
    '"""AUSVERKAUFT""" \'\'\' "\' mixed',
    "wait... what.. ok . then . end.",
    "***SALE*** #SALE ®•©™ ~tilde~ {a} [b] (c) | \\ / *",
    "this-is-my-cute-cat and one_two_three_four_five",
    "this-is-my-cat_x",
    "this-is-my-cat",
    "the last ideograph \u9fff, before the first \u31bf",
    "< ＆amp;amp;amp;lt; wide ampersand",
    "schÃ¶n â€œmojibakeâ€\x9d caf\xe9 \u00e2\u0080\u0099",
    "&amp;lt;b&amp;gt; double &amp;amp;amp; escaped",
    "jc6640 jc6640vc 6640vc231 j2d1a2a3 AB12 a1b2c3d4",
    "free worldwide free shipping, worldwide shipping and shipping",
    "free download free now, download",
    "click for details, click on me, clicking",
    "png images jpg image webp, pngs",
    "page 12 of page 3",
    "100x200 12.5х7 3×4 5X6 10 x 20",
    "a : b :c ;d",
    "one,two.three/four 1,2.3/4",
    "'fully quoted'",
    "\"'half quoted",
    "-leading dash and trailing-",
    ".hidden",
    ",;:_'+",
    "%20percent%20encoded+plus%2Bplus%C3%A9",
    "emoji 😀🏳️‍🌈 and ligature ﬁ and Å and e\u0301",
    "İstanbul ǅ ß",
    "nul \x00 and control \x1b[31m and bom \ufeff and zwsp \u200b",
    "]]> <![CDATA[ x ]]> <?php echo 1 ?> <!DOCTYPE html>",
    "a\u2028b\u2029c\x85d\xa0e",
    "&" * 5 + "lt" * 3 + ";" * 4,
]
FRAGMENTS = [
    "http://", "https:", "www.", "a-b.com", ".org/x_y/", "me@x.it", "<b>", "</b>", "<person>", "<!--", "-->",
    "<", ">", "&", "&amp;", "&quot", "&lt;", "&#64;", "&nbsp;", "%20", "%C3%A9", "+", "#12", "#12345",
    "123456", "1.2.3.4", "5:30", "ab123", "a1b", "1a2", "x9y8z7", "12x34", "3.5×2", ".png", "pic.jpg",
    "mp4 images", "free", "worldwide", "shipping", "download", "click on", "page 7", "-", "_", "--", "–", "'",
    "\"", "“", "`", "..", " . ", ",", ";", ":", "/", "\\n", "\\", "*", "(", "]", "~", "@you", "漢字", "カ", "㍿",
    "é", "Ã©", "â€œ", "ﬁ", "İ", "cat", "Dog", " ", "  ", "\n", "\t",
]  # fmt: skip
pieces = st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6), st.integers(0, 10**8).map(str))


def reference(caption: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beautifulsoup's remarks
        return PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)._text_preprocessing(caption, clean_caption=True)[0]


@pytest.mark.parametrize("caption", NASTY, ids=range(len(NASTY)))
def test_difficult_captions_are_cleaned_as_by_diffusers(caption):
    assert clean_caption(caption) == reference(caption)


@settings(max_examples=700)
@given(st.lists(pieces, max_size=12).map("".join))
@example("a.b@c.com")
def test_any_caption_is_cleaned_as_by_diffusers(caption):
    cleaned = clean_caption(caption)
    with suppress(ParserRejectedMarkup):  # of the reference; see below
        assert cleaned == reference(caption)


@settings(max_examples=300)
@given(st.text(max_size=40))
def test_any_text_is_cleaned_as_by_diffusers(caption):
    cleaned = clean_caption(caption)
    with suppress(ParserRejectedMarkup):  # of the reference; see below
        assert cleaned == reference(caption)


def test_a_caption_that_cannot_be_parsed_stays_as_it_is():
    with pytest.raises(ParserRejectedMarkup):  # diffusers fails
        reference("a <![black cat and a dog")
    assert clean_caption("A <![black cat and a dog") == "a <! black cat and a dog"


def test_the_second_pass_matters():
    caption = "%2541 cat"
    pipeline = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)
    assert clean_caption(caption) != pipeline._clean_caption(caption)
    assert clean_caption(caption) == pipeline._clean_caption(pipeline._clean_caption(caption))


@pytest.mark.parametrize("caption", ["/tmp/pictures", "a.htm", "picture.txt", "https://x.y", "plain text"])
def test_cleaning_is_silent(caption):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean_caption(caption)


@pytest.mark.parametrize("module", ["ftfy", "bs4"])
def test_a_missing_package_names_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(InputError, match=r"'ftfy' and 'beautifulsoup4'.*pip install 'pixart\[text\]'"):
        clean_caption("a cat")
