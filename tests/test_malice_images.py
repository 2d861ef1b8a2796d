"""Malicious data sets: odd images, formats that start programs, endless files, paths that lead outside."""

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guard import guarded
from layouts import SQUARE, add, look
from pixart.data.decoding import MAX_PIXELS, UnreadableImage
from pixart.data.images import load_image
from pixart.errors import InputError
from runs import make_pictures


def caption(path: Path, text: str = "a thing") -> Path:
    path.with_suffix(".txt").write_text(text)
    return path


def odd_tag(tag: int, kind: int, count: int, value: int) -> bytes:
    """EXIF of one tag, whose value may be anywhere."""
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">IHHHIII", 8, 1, tag, kind, count, value, 0)


ODD = {
    # EXIF orientation as text, as a fraction without a denominator, as many values; an IFD that lies behind the end
    "text.jpg": ("JPEG", {"exif": odd_tag(0x0112, 2, 3, 0x41420000)}),
    "fraction.jpg": ("JPEG", {"exif": odd_tag(0x0112, 5, 1, 26)}),
    "many.webp": ("WEBP", {"exif": odd_tag(0x0112, 3, 2, 0x00060006)}),
    "pointer.jpg": ("JPEG", {"exif": odd_tag(0x8769, 4, 1, 0x7FFFFFFF)}),
    "type.png": ("PNG", {"exif": odd_tag(0x0112, 77, 1, 6)}),
}


@pytest.mark.parametrize("name", ODD)
def test_broken_tags_make_at_most_that_image_unreadable(tmp_path, name):
    make_pictures(tmp_path / "p", 8)
    kind, options = ODD[name]
    Image.new("RGB", (8, 8)).save(caption(tmp_path / "p" / name), kind, **options)
    report = look(tmp_path / "p")
    assert len(report.records) + report.unreadable == 9


@pytest.mark.parametrize("error", [struct.error, TypeError, AttributeError, MemoryError, RecursionError])
def test_any_error_of_a_decoder_makes_only_that_image_unreadable(tmp_path, monkeypatch, error):
    folder, true_load = make_pictures(tmp_path / "p", 8), Image.Image.getexif

    def getexif(image):
        if image.size == (9, 9):
            raise error("of a decoder")
        return true_load(image)

    Image.new("RGB", (9, 9)).save(caption(folder / "odd.png"))
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    report = look(folder)
    assert len(report.records) == 8
    assert report.problems == [("odd.png", f"unreadable: {error.__name__}: of a decoder")]
    with pytest.raises(UnreadableImage, match="of a decoder"):
        load_image(folder / "odd.png", SQUARE[0])


def test_formats_that_start_programs_are_not_opened_whatever_their_name(tmp_path):
    folder = make_pictures(tmp_path / "p", 8)
    (folder / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    caption(folder / "a.png")
    with guarded(folder, tmp_path):
        report = look(folder)
        with pytest.raises(UnreadableImage, match="cannot identify"):
            load_image(folder / "a.png", SQUARE[0])
    assert report.problems == [("a.png", "unreadable: cannot identify it as an image")]


def test_a_fifo_a_device_and_a_folder_for_a_file_are_named_and_hang_nothing(tmp_path):
    folder = make_pictures(tmp_path / "p", 300)
    os.mkfifo(caption(folder / "a.png"))
    os.symlink("/dev/zero", caption(folder / "b.png"))
    Image.new("RGB", (8, 8)).save(folder / "c.png")
    os.mkfifo(folder / "c.txt")
    report = look(folder)
    problems = dict(report.problems)
    assert len(report.records) == 300 and report.unreadable == 3
    assert "it is a FIFO, expected a file" in problems["a.png"] and "it is a device" in problems["b.png"]
    assert "its caption c.txt: [Errno 22] it is a FIFO" in problems["c.png"]
    for name in ("metadata.jsonl", "metadata.csv"):
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=rf"{name}: cannot be read .*FIFO"):
            look(folder)
        os.remove(folder / name)
    os.mkfifo(tmp_path / "fifo")
    for source in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(InputError, match="FIFO or device; expected a folder"):
            look(source)
    shards = tmp_path / "shards"
    shards.mkdir()
    os.mkfifo(shards / "0.tar")
    with pytest.raises(InputError, match=r"0\.tar: unreadable: .*FIFO"):
        look(shards)


def test_suffixes_that_the_decoder_reads_train_and_the_others_are_named_with_their_package(tmp_path):
    folder = make_pictures(tmp_path / "p", 8)
    for suffix, kind in ((".jfif", "JPEG"), (".jpe", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000")):
        Image.new("RGB", (8, 8), "red").save(caption(folder / f"z{suffix[1:]}{suffix}"), kind)
    Image.new("RGB", (8, 8), "red").save(caption(folder / "zpng.heic"), "PNG")  # its content decides
    (folder / "zheic.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    (folder / "zjxl.jxl").write_bytes(b"\xff\x0a" + bytes(50))
    Image.new("RGB", (8, 8), "red").save(caption(folder / "ztga.tga"))
    for name in ("zheic.jpg", "zjxl.jxl"):
        caption(folder / name)
    report = look(folder)
    assert len(report.records) == 13 and report.unreadable == 0
    assert "with the suffixes .avif, .heic, .jfif, .jp2, .jpe, .png" in report.describe()
    assert dict(report.problems) == {
        "zheic.jpg": "a HEIC image, which needs the package pillow-heif: pip install pillow-heif",
        "zjxl.jxl": "a JPEG XL image, which needs the package pillow-jxl-plugin: pip install pillow-jxl-plugin",
        "ztga.tga": ".tga is not a supported image format; convert it to PNG or JPEG",
    }


def test_photos_of_108_megapixels_train_and_the_limit_is_a_setting(tmp_path):
    folder = make_pictures(tmp_path / "p", 8)
    for name in ("za.png", "zb.png"):
        Image.new("1", (12000, 9000)).save(caption(folder / name))
    before = Image.MAX_IMAGE_PIXELS
    report = look(folder, max_crop=1.0)
    assert len(report.records) == 10
    assert load_image(folder / "za.png", SQUARE[0]).shape == (8, 8, 3)
    with pytest.raises(InputError, match=r"108,000,000, more than data\.max_pixels 107,999,999; raise that"):
        look(folder, max_crop=1.0, max_pixels=107_999_999)
    assert before == Image.MAX_IMAGE_PIXELS and MAX_PIXELS > 200_000_000


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_and_32_bit_images_keep_their_brightness_or_are_refused_by_name(tmp_path, white):
    grey = np.linspace(0, white, 64).reshape(8, 8)
    expected = np.linspace(0, 255, 64).reshape(8, 8).round().astype(int)[..., None].repeat(3, -1)
    for dtype in (np.float32, np.int32) if white > 1 else (np.float32,):
        Image.fromarray(grey.astype(dtype)).save(tmp_path / "a.tif")
        assert np.abs(load_image(tmp_path / "a.tif", SQUARE[0]).astype(int) - expected).max() <= 1
    for bad in (grey - white / 2, grey + 70000, grey * np.nan):
        Image.fromarray(bad.astype(np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(UnreadableImage, match=r"values from .* expected 0 to 1, to 255 or to 65535"):
            load_image(tmp_path / "a.tif", SQUARE[0])


def test_images_and_captions_behind_linked_folders_count_once_and_dangling_links_are_named(tmp_path):
    folder, other = make_pictures(tmp_path / "p", 8), make_pictures(tmp_path / "elsewhere", 8)
    os.symlink(other, folder / "more")
    os.symlink(folder, folder / "more" / "round")
    os.symlink("/nowhere/x.png", caption(folder / "zz.png"))
    report = look(folder)
    assert len(report.records) == 16
    assert [name for name, _ in report.problems] == ["zz.png"]


# ------------------------------------------------------------------------------------------------------ ways out


def outside(tmp_path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


@pytest.mark.parametrize("way", ["absolute", "up", "url"])
def test_a_table_row_that_names_a_file_elsewhere_is_no_image(tmp_path, tmp_path_factory, monkeypatch, way):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    secret = outside(tmp_path)
    name = {"absolute": str(secret), "up": "../secret.png", "url": "https://example.org/a.png"}[way]
    good = (make_pictures(tmp_path / "p", 1) / "00.png").read_bytes()
    rows = [{"bytes": good, "path": "a.png"}] * 4 + [{"bytes": None, "path": name}]
    features = datasets.Features(
        {
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
        }
    )
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict({"image": rows, "text": ["x"] * 5}, features=features)
    table.to_parquet(tmp_path / "set" / "a.parquet")
    with guarded(tmp_path / "set", tmp_path):
        report = look(tmp_path / "set")
    assert len(report.records) == 4
    assert f"the row names {name}; expected an image in the row" in report.describe()


@pytest.mark.parametrize("where", ["state.json", "dataset_dict.json"])
def test_a_saved_table_that_describes_itself_with_files_elsewhere_is_refused(tmp_path, where):
    (tmp_path / "set").mkdir()
    told = {"splits": ["../other"]} if where != "state.json" else {"_data_files": [{"filename": "/x/data.arrow"}]}
    (tmp_path / "set" / where).write_text(json.dumps(told))
    with pytest.raises(InputError, match=rf"{where}: .* leads outside of the folder"):
        look(tmp_path / "set")


def test_what_a_tars_header_claims_is_no_reason_to_take_the_memory(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE):
        for size in (10**15, 10**18, 10**24):
            with tarfile.open(tmp_path / "a.tar", "w") as tar:
                add(tar, "a.png", data.getvalue())
                add(tar, "a.txt", b"a thing")
            info = tarfile.TarInfo("b.png")
            info.size, info.type = size, kind
            content = (tmp_path / "a.tar").read_bytes()[:2048] + info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)
            (tmp_path / "a.tar").write_bytes(content)
            assert [record.id for record in look(tmp_path).records] == ["a/a.png"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"caption": ' + "9" * 5000 + "}"])
def test_deep_nesting_and_endless_numbers_are_one_line(tmp_path, text):
    folder = make_pictures(tmp_path / "p", 2)
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"metadata.jsonl:1: not valid JSON") as caught:
        look(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(InputError, match=r"list.json: (not valid JSON|expected a list)"):
        look(tmp_path / "list.json")
