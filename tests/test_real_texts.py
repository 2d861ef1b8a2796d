"""Texts as people and their tools write them: encodings, halves of characters, names, consoles, empty captions."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from layouts import add, look, refused
from pixart import InputError, Pipeline, Request, cli
from pixart.console import plain, print_anything
from pixart.data.samples import describe_captions
from pixart.diffusion.sampling import SampleConfig
from pixart.encoders.text import TextConfig, TextEncoder
from pixart.features.store import join_texts
from pixart.seeds import derive_seed
from pixart.unicode import decode_text, is_whole, mend
from runs import make_model, make_pictures

GREEK, CYRILLIC, CHINESE, JAPANESE = "μια γάτα", "рыжая лиса", "一只红色的狐狸", "赤いキツネ"


# ---------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["a cat", "the dog’s ball", GREEK, CYRILLIC, CHINESE, JAPANESE, "🦊", ""])
def test_utf_with_a_mark_and_utf8_without_are_read_whatever_the_script(text, codec):
    assert decode_text(text.encode(codec))[0] == text


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_read_where_it_is_latin_and_refused_elsewhere(codec):
    assert decode_text("a red fox’s den".encode(codec)) == ("a red fox’s den", "UTF-16 without a mark")
    with pytest.raises(ValueError, match="save it as UTF-8"):
        decode_text((CHINESE + "、一只狐狸 a").encode(codec))


@pytest.mark.parametrize("text", ["the dog’s ball", "a café — “naïve”", "Größe und Länge", "El Niño à Málaga"])
def test_western_text_is_read_as_windows_1252(text):
    assert decode_text(text.encode("cp1252")) == (text, "Windows-1252")


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        (CYRILLIC, "cp1251"), (CYRILLIC, "koi8-r"), (GREEK, "cp1253"), (CHINESE, "gbk"), ("一隻紅色的狐狸", "big5"),
        (JAPANESE, "shift-jis"), (JAPANESE, "euc-jp"), ("여우 한 마리", "euc-kr"), ("שועל אדום", "cp1255"),
    ],
)  # fmt: skip
def test_other_encodings_are_never_taken_for_windows_1252(text, codec):
    with pytest.raises(ValueError, match=r"not UTF-8 at byte \d+ \(0x.., line 1\), and no other encoding is certain"):
        decode_text(text.encode(codec))


def test_files_of_two_encodings_and_files_that_are_no_text_are_refused_with_the_place():
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 23 \(0xe9, line 2\)"):
        decode_text("a good café, and more\n".encode() + "é of another editor and more".encode("cp1252"))
    with pytest.raises(ValueError, match="NUL"):
        decode_text(b"a\0b")
    with pytest.raises(ValueError, match=r"control character U\+0001"):
        decode_text(b"\x01\x02 a cat")


def test_captions_in_other_encodings_train_and_the_report_says_so(tmp_path):
    folder = make_pictures(tmp_path / "p", 6)
    texts = {"00": ("the dog’s ball", "cp1252"), "01": (CHINESE, "utf-16"), "02": ("a red fox", "utf-16-le")}
    for name, (text, codec) in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode(codec))
    report = look(folder)
    assert [record.captions[0] for record in report.records[:3]] == [text for text, _ in texts.values()]
    for encoding, name in (("Windows-1252", "00"), ("UTF-16", "01"), ("UTF-16 without a mark", "02")):
        assert f"1 texts are in {encoding}, not UTF-8: {name}.txt" in report.describe()


def write_folder(folder: Path, captions: list[bytes]) -> None:
    make_pictures(folder, len(captions))
    for i, data in enumerate(captions):
        (folder / f"{i:02d}.txt").write_bytes(data)


def write_tar(folder: Path, captions: list[bytes], suffix: str = "txt") -> None:
    folder.mkdir(parents=True)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, data in enumerate(captions):
            add(tar, f"{i}.png", image.getvalue())
            add(tar, f"{i}.{suffix}", data)


def write_tar_of_json(folder: Path, captions: list[bytes]) -> None:
    write_tar(folder, [b'{"caption": "' + data + b'"}' for data in captions], "json")


@pytest.mark.parametrize("write", [write_folder, write_tar, write_tar_of_json])
def test_unreadable_captions_count_as_unreadable_images_do(tmp_path, write):
    write(tmp_path / "one", [CYRILLIC.encode("cp1251"), *[b"a cat"] * 7])
    report = look(tmp_path / "one")
    assert (len(report.records), report.unreadable) == (7, 1)
    assert "not UTF-8 at byte" in report.problems[0][1]
    write(tmp_path / "half", [CYRILLIC.encode("cp1251"), b"a cat"] * 4)
    text = refused(tmp_path / "half")
    assert text.startswith("4 of 8 images are unreadable") and text.count("save it as UTF-8") == 4


def test_lists_and_prompt_files_in_other_encodings_are_read_and_said(tmp_path, capsys):
    folder = make_pictures(tmp_path / "p", 2)
    rows = "".join(json.dumps({"file_name": f"0{i}.png", "text": CHINESE}, ensure_ascii=False) + "\n" for i in range(2))
    (folder / "metadata.jsonl").write_text(rows, encoding="utf-16")
    report = look(folder)
    assert report.records[0].captions == (CHINESE,)
    assert "1 texts are in UTF-16, not UTF-8: metadata.jsonl" in report.describe()
    (tmp_path / "prompts.txt").write_bytes("the dog’s ball\r\na cat".encode("cp1252"))
    assert cli.read_prompts(tmp_path / "prompts.txt") == ["the dog’s ball", "a cat"]
    assert "read as Windows-1252, since it is not UTF-8" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ halves of characters


def test_half_a_character_in_a_caption_is_replaced_and_its_image_named(tmp_path, text_encoder):
    folder = make_pictures(tmp_path / "p", 3)
    lines = [
        f'{{"file_name": "0{i}.png", "text": "a cat {end}"}}\n' for i, end in enumerate(("x", "\\ud83d", "\\udc00"))
    ]
    (folder / "metadata.jsonl").write_text("".join(lines))
    report = look(folder)
    assert [record.captions for record in report.records] == [("a cat x",), ("a cat \ufffd",), ("a cat \ufffd",)]
    assert (
        "2 captions hold half a character (a lone surrogate), replaced by U+FFFD: 01.png, 02.png" in report.describe()
    )
    encoder = TextEncoder.load(TextConfig(str(text_encoder), length=12, clean=False))
    states = encoder.encode(["a cat \ud83d"])[0], encoder.encode(["a cat \ufffd"])[0]
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["prompt", "negative"])
def test_half_a_character_in_a_prompt_is_refused(name):
    with pytest.raises(InputError, match=rf"{name}: got 'a cat .*', expected a text without halves of characters"):
        Request(**{"prompt": "x", name: "a cat \udce9"})


def test_whole_characters_are_left_alone():
    assert mend("🦊 " + CHINESE) == "🦊 " + CHINESE and is_whole("🦊")
    assert json.loads('"\\ud83e\\udd8a"') == mend(json.loads('"\\ud83e\\udd8a"')) == "🦊"


# -------------------------------------------------------------------------------------------------- file names


@pytest.mark.parametrize("write", ["folder", "tar"])
def test_file_names_that_are_not_utf8_have_ids_seeds_and_a_place_in_stores(tmp_path, write):
    if write == "folder":
        folder = make_pictures(tmp_path / "p", 2)
        for suffix in (b".png", b".txt"):
            os.rename(os.fsencode(folder) + b"/00" + suffix, os.fsencode(folder) + b"/caf\xe9" + suffix)
    else:
        folder = tmp_path / "p"
        write_tar(folder, [b"a cat"])
        with tarfile.open(folder / "0.tar", "a") as tar:
            add(tar, "caf\udce9.png", (make_pictures(tmp_path / "q", 1) / "00.png").read_bytes())
            add(tar, "caf\udce9.txt", b"a caf\xc3\xa9")
    ids = [record.id for record in look(folder).records]
    odd = next(id for id in ids if "\udce9" in id)
    assert derive_seed(odd) != derive_seed(odd.replace("\udce9", "\udce8"))
    assert derive_seed("a cat") == 5867787368591784627  # as it always was
    texts, starts = join_texts(["a", odd])
    assert bytes(texts[1 : starts[-1]].tolist()).decode("utf-8", "surrogatepass") == odd


# --------------------------------------------------------------------------------------------------- consoles


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "8x8 -> 9 <= caf\\xe9 \\u732b \\udce9"),
        ("cp1252", "8×8 -> 9 <= café \\u732b \\udce9"),
        ("utf-8", "8×8 → 9 ≤ café 猫 \\udce9"),
    ],
)
def test_every_console_prints_what_it_has_and_the_rest_as_ascii(monkeypatch, encoding, expected):
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print_anything()
    print("8×8 → 9 ≤ café 猫 \udce9", flush=True)
    assert data.getvalue().decode(encoding).strip() == expected


def test_training_called_from_python_prints_on_any_console(monkeypatch):
    from pixart.train.output import lenient_output

    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    with lenient_output():
        print("a → b", flush=True)
    assert data.getvalue() == b"a -> b\n" and plain("é") == "\\xe9"


# --------------------------------------------------------------------------------- captions that cleaning empties


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("cleaned"), SampleConfig(steps=2, guidance=1.0))


EMPTIED = [CHINESE, "@someone", "https://example.com/a", "photo.jpg", "free shipping"]


@pytest.mark.parametrize("prompt", EMPTIED)
def test_a_prompt_that_cleaning_empties_is_refused_and_the_empty_one_is_not(text_encoder, prompt):
    encoder = TextEncoder.load(TextConfig(str(text_encoder), length=12, clean=True))
    with pytest.raises(InputError, match=r"is empty after PixArt-α's caption cleaning"):
        encoder.check_prompts(["a cat", prompt])
    encoder.check_prompts(["", "  ", "a cat"])
    TextEncoder(encoder.tokenizer, encoder.model, TextConfig(str(text_encoder), length=12, clean=False)).check_prompts(
        [prompt]
    )


def test_neither_prompts_nor_negative_ones_are_drawn_as_the_empty_text(model_folder):
    pipeline = Pipeline.from_pretrained(model_folder)
    pipeline.text.config = TextConfig(pipeline.text.config.model, length=12, clean=True)
    for arguments in ({"prompts": CHINESE}, {"prompts": "a cat", "negative_prompts": CHINESE, "guidance": 2.0}):
        with pytest.raises(InputError, match="is empty after"):
            pipeline(**arguments)
    assert len(pipeline(["", "a cat"])) == 2


def test_captions_that_cleaning_empties_are_counted_in_the_report(text_encoder):
    encoder = TextEncoder.load(TextConfig(str(text_encoder), length=4, clean=True))
    empty, long = describe_captions(encoder, [CHINESE, "@x", "a cat", "", "a red fox in the snow"])
    assert empty.startswith("2 of 5 captions are empty after PixArt-α's cleaning (text.clean)") and CHINESE in empty
    assert long == "1 of 5 captions are longer than 4 tokens and are truncated"


# ------------------------------------------------------------------------------------------- long and odd texts


def test_a_caption_of_5_megabytes_is_not_printed_whole(tmp_path):
    folder = make_pictures(tmp_path / "p", 2)
    row = {"file_name": "00.png", "text": {"en": "y" * 5_000_000}}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert len(refused(folder)) < 600
    row["text"] = "y " * 2_500_000
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert len(look(folder).describe()) < 600
    with pytest.raises(InputError) as caught:
        Request(row["text"] + "--ar")
    assert len(str(caught.value)) < 600


def test_what_a_terminal_would_obey_is_taken_out_of_captions(tmp_path):
    folder = make_pictures(tmp_path / "p", 2)
    rows = [{"file_name": "00.png", "text": "a \x1b[31mcat\x07\x00"}, {"file_name": "01.png", "text": "\x1b"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = look(folder)
    assert report.records[0].captions == ("a [31mcat",)
    assert [name for name, _ in report.problems] == ["01.png"]


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", '["a cat"]'), ("p.txt", '{"prompt": "a"}\n'), ("p.csv", "prompt\na"), ("p.json", "a")]
)
def test_lists_of_prompts_in_json_or_tables_are_not_drawn_as_words(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="expected a plain text of one prompt a line, got JSON or a table"):
        cli.read_prompts(tmp_path / name)
