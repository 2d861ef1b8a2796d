"""Settings at the end of prompts, however they are spelled."""

import pytest

from pixart import InputError, Request
from pixart.prompt import check_no_settings, split_prompt

AR = [
    "--ar 16:9", "–ar 16:9", "—ar 16:9", "−−ar 16:9", "‐‐ar 16:9", "-ar 16:9", "-- ar 16:9", "--AR 16:9", "--Ar 16：9",
    "--ar=16:9", "--ar= 16:9", "--ar16:9", "--ar 16/9", "--ar 16x9", "--ar 16×9", "--ar 16 : 9",
    "--ar １６：９", "--ar 16∶9", "--ar 16:9.", "--ar 16:9,", "--ar\u00a016:9", "\u00a0--ar 16:9", "——ar 16:9",
    "---ar 16:9", "--ar \"16:9\"", "－－ar 16:9", "--ar 1.7777777777777777",
]  # fmt: skip
HW = [
    "--hw 768:1024", "—hw 768:1024", "--hw=768x1024", "--HW 768×1024", "--hw 768*1024", "--hw 768 x 1024",
    "--hw 768X1024", "--hw 768/1024", "–hw ７６８：１０２４", "-hw 768:1024", "--hw768:1024",
]  # fmt: skip
NONE = [
    "--ar", "--ar sixteen:nine", "--ar 16:9:4", "--ar 0:9", "--ar 16:0", "--ar -16:9", "--ar 16,9", "--ar 16:9 and so",
    "--ar 16:", "--ar :9", "--ar inf", "--ar nan:1", "--ar:16:9", "--ar 16-9", "--hw 7.5:8", "--hw 768:0", "--hw",
    "—ar", "–hw wide", "--ar 16:9 --hw 8:8", "--ar 16:9 --ar 16:9", "--aspect 16:9", "--aspect-ratio 16:9",
    "--width 512", "--stylize 100", "--no trees", "--v 6", "--seed=4", "-ar 16:9 --no trees",
]  # fmt: skip
WORDS = [
    "a cat", "an art-deco cat", "a black-and-white photo", "a cat – a dog", "a cat—a dog", "state-of-the-art 16:9",
    "a cat -- a dog", "a - ar - b", "hw 768", "a double--dash", "the ratio ar 16:9", "-5 degrees", "the USS–Arizona",
    "–architecture", "a —harsh light", "",
]  # fmt: skip


@pytest.mark.parametrize("end", AR)
def test_an_aspect_ratio_is_read_however_it_is_spelled(end):
    text, asked = split_prompt(f"a cat {end}")
    assert text == "a cat" and asked == {"aspect_ratio": pytest.approx(16 / 9)}


@pytest.mark.parametrize("end", HW)
def test_pixels_are_read_however_they_are_spelled(end):
    assert split_prompt(f"a cat, sitting {end}") == ("a cat, sitting", {"height": 768, "width": 1024})


def test_a_single_number_of_pixels_is_a_square():
    assert split_prompt("a cat --hw 768") == ("a cat", {"height": 768, "width": 768})


@pytest.mark.parametrize("end", NONE)
def test_what_looks_like_a_setting_and_is_none_is_an_error(end):
    with pytest.raises(InputError, match=r"^prompt 'a cat") as caught:
        split_prompt(f"a cat {end}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", WORDS)
def test_words_and_dashes_are_left_alone(text):
    assert split_prompt(text) == (text, {})
    check_no_settings(text, "prompt")


@pytest.mark.parametrize("end", [*AR, *HW])
def test_python_callers_get_an_error_where_words_would_be_drawn(end):
    for name in ("prompt", "negative"):
        with pytest.raises(InputError, match=rf"{name} .*would be drawn as words; give the size as height and width"):
            Request(**{"prompt": "x", name: f"a cat {end}"})
