"""Folders of images as people and their tools leave them: nothing is left out without a word."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from layouts import add, look, refused
from pixart.data.images import ScanReport
from pixart.data.sources import recognise
from runs import make_pictures


def ids(report: ScanReport) -> list[str]:
    return [record.id for record in report.records]


def test_the_files_output_of_img2dataset_is_a_folder_of_images(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_pictures(tmp_path / "p" / "00000", 3)
    for i in range(3):
        (tmp_path / "p" / "00000" / f"0{i}.json").write_text('{"caption": "other", "status": "success"}')
    pq.write_table(pa.table({"caption": ["x"] * 3, "key": ["0", "1", "2"]}), tmp_path / "p" / "00000.parquet")
    (tmp_path / "p" / "00000_stats.json").write_text("{}")
    assert recognise(tmp_path / "p") == "folder"
    report = look(tmp_path / "p")
    assert ids(report) == ["00000/00.png", "00000/01.png", "00000/02.png"] and not report.problems
    assert report.records[0].captions == ("a red square, number 0",)


def write_list(folder: Path, count: int = 2, name: str = "metadata.jsonl") -> None:
    make_pictures(folder, count)
    for text in folder.glob("*.txt"):
        text.unlink()
    rows = [{"file_name": f"{i:02d}.png", "text": f"caption {i}"} for i in range(count)]
    if name.endswith("jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["file_name,text", *(",".join(row.values()) for row in rows)]
        (folder / name).write_text("\n".join(lines))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_list_one_folder_deeper_is_read_and_images_outside_of_it_keep_their_texts(tmp_path, name):
    write_list(tmp_path / "train", name=name)
    make_pictures(tmp_path / "more", 1)
    report = look(tmp_path)
    assert ids(report) == ["more/00.png", "train/00.png", "train/01.png"]
    assert [record.captions for record in report.records[1:]] == [("caption 0",), ("caption 1",)]


def test_several_lists_are_named_with_a_way_out(tmp_path):
    write_list(tmp_path / "train")
    write_list(tmp_path / "test")
    text = refused(tmp_path)
    assert "several lists of captions (test/metadata.jsonl, train/metadata.jsonl)" in text
    assert "point data.folder to the folder of one of them" in text


def test_several_rows_of_one_image_say_how_to_give_several_captions(tmp_path):
    write_list(tmp_path / "p")
    with open(tmp_path / "p" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "00.png", "text": "another"}\n')
    text = refused(tmp_path / "p")
    assert "row 3: '00.png' is listed twice; several captions of an image go into one row, as a list" in text


def test_texts_named_after_the_whole_image_name_are_its_captions(tmp_path):
    folder = make_pictures(tmp_path / "p", 3)
    (folder / "00.txt").rename(folder / "00.png.txt")
    (folder / "01.txt").rename(folder / "01.png.txt")
    (folder / "01.txt").write_text("the shorter name counts")
    (folder / "02.long.txt").write_text("a field of its own")
    report = look(folder)
    assert [record.captions[0] for record in report.records] == [
        "a red square, number 0",
        "the shorter name counts",
        "a blue square, number 2",
    ]
    assert look(folder, captions={"long": 1.0}).records[0].captions == ("a field of its own",)


@pytest.mark.parametrize(("image", "text"), [("a.PNG", "A.txt"), ("Cat.png", "cat.txt"), ("a.png", "a.TXT")])
def test_names_that_differ_in_case_alone_are_named(tmp_path, image, text):
    folder = make_pictures(tmp_path / "p", 2)
    Image.new("RGB", (8, 8)).save(folder / image)
    (folder / text).write_text("a cat")
    ((name, reason),) = look(folder).problems
    assert (name, reason) == (image, f"no caption: {text} differs in case from {Path(image).stem}.txt")


def test_a_listed_image_whose_name_differs_in_case_alone_is_named(tmp_path):
    write_list(tmp_path / "p", 3)
    (tmp_path / "p" / "00.png").rename(tmp_path / "p" / "00.PNG")
    ((name, reason),) = look(tmp_path / "p").problems
    assert name == "00.png" and reason.endswith("there is 00.PNG, which differs in case alone")


def test_captioned_files_that_are_no_supported_image_are_named_with_what_reads_them(tmp_path):
    folder = make_pictures(tmp_path / "p", 2)
    for name in ("a.cr2", "b.svg", "c.mp4"):
        (folder / name).write_bytes(b"x")
        (folder / name).with_suffix(".txt").write_text("a cat")
    (folder / "00.json").write_text("{}")
    (folder / "00.npz").write_bytes(b"")
    (folder / "notes.txt").write_text("not of an image")
    report = look(folder)
    assert dict(report.problems) == {
        "a.cr2": ".cr2 is not a supported image format (rawpy reads it); convert it to PNG or JPEG",
        "b.svg": ".svg is not a supported image format (cairosvg reads it); convert it to PNG or JPEG",
        "c.mp4": ".mp4 is not a supported image format; convert it to PNG or JPEG",
    }
    assert report.notes == ["1 .txt files have no image beside them: notes.txt"]


def test_hidden_copies_and_notes_of_other_programs_are_left_out_and_told(tmp_path):
    folder = make_pictures(tmp_path / ".data" / "p", 2)  # only what is hidden within the source
    make_pictures(folder / ".ipynb_checkpoints", 2)
    (folder / "._00.png").write_bytes(b"\0\5\26\7")
    report = look(folder)
    assert len(report.records) == 2 and not report.problems
    assert report.notes == [
        "3 hidden images are left out: ._00.png, .ipynb_checkpoints/00.png, .ipynb_checkpoints/01.png"
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pictures.zip", "unpack it first"), ("metadata.jsonl", "give the folder that it is in"), ("a.png", "")],
)
def test_a_file_where_a_folder_is_meant_is_said_to_be_one(tmp_path, name, hint):
    (tmp_path / name).write_bytes(b"x")
    text = refused(tmp_path / name)
    assert "it is a file; expected a folder of images with captions" in text and text.endswith(hint)


def shard(names: list[str]) -> bytes:
    data, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in names:
            add(tar, f"{name}.png", image.getvalue())
            add(tar, f"{name}.txt", b"a cat")
    return data.getvalue()


def test_what_follows_the_end_of_a_tar_is_told(tmp_path):
    (tmp_path / "0.tar").write_bytes(shard(["a", "b"]) + shard(["c"]))
    report = look(tmp_path)
    assert ids(report) == ["0/a.png", "0/b.png"]
    ((name, reason),) = report.problems
    assert name == "0.tar" and "its end mark is followed by more data at byte 10240, which is not read" in reason
    (tmp_path / "0.tar").write_bytes(shard(["a", "b"]) + bytes(1 << 21))  # other writers' padding
    assert not look(tmp_path).problems


def test_a_quote_that_swallows_the_rest_of_a_csv_is_refused(tmp_path):
    folder = make_pictures(tmp_path / "p", 3)
    (folder / "metadata.csv").write_text('file_name,text\n00.png,"a 5 inch tall cat\n01.png,x\n02.png,y\n')
    assert "metadata.csv: not valid CSV after line 1 (unexpected end of data)" in refused(folder)


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("metadata.json", "[]", "captions of a list are read from metadata.jsonl: one object with file_name and text"),
        ("captions.csv", "a,b", "captions of a list are read from metadata.jsonl"),
        ("Metadata.JSONL", "", "rename it to its name in lower case"),
        ("00.caption", "a cat", "captions are read from NAME.txt: rename these files"),
        ("images.zip", "", "unpack it"),
    ],
)
def test_where_no_image_has_a_caption_files_that_may_hold_them_are_named(tmp_path, name, text, hint):
    folder = make_pictures(tmp_path / "p", 2)
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / name).write_text(text)
    assert f"none of its 2 images can be used; there is {name}: {hint}" in refused(folder)


def test_lists_of_other_shapes_say_what_is_expected(tmp_path):
    folder = make_pictures(tmp_path / "p", 2)
    cases = {
        "": "; there is metadata.jsonl: it lists no image",
        "[{}]": "expected one object with file_name and text on each line",
        '{\n"file_name": "00.png"}': "not valid JSON, of which each line is an object",
    }
    for text, expected in cases.items():
        (folder / "metadata.jsonl").write_text(text)
        assert expected in refused(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name;text\n00.png;a cat\n")
    assert "no 'file_name'; there are file_name;text; columns are separated by commas" in refused(folder)


def test_file_names_with_backslashes_are_named(tmp_path):
    make_pictures(tmp_path / "p" / "sub", 3)
    rows = [{"file_name": f"sub/0{i}.png", "text": "x"} for i in range(2)] + [{"file_name": "sub\\02.png", "text": "x"}]
    (tmp_path / "p" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((_, reason),) = look(tmp_path / "p").problems
    assert reason.endswith("file names have / between folders, not \\")
