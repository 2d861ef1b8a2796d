"""The same images from every source give the same pixels, captions and sizes; and what each source refuses."""

import gzip
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from layouts import LAYOUTS, Sample, add, as_folder, as_official, as_sam, as_webdataset, from_folder, make_table, write
from pixart.config import build
from pixart.data import webdataset
from pixart.data.buckets import SIZES_1024, Bucket, bucket_table, own_buckets
from pixart.data.config import DataConfig
from pixart.data.images import Record, ScanReport, load_image
from pixart.data.samples import Captions, Drawing, ImageDataset, collate
from pixart.data.sources import make_table as make_buckets
from pixart.data.sources import recognise, scan
from pixart.errors import InputError
from runs import make_pictures

SQUARE = bucket_table(8, 8, square=True)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What `datasets` makes of parquet files goes where the tests' other files go."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> list[Sample]:
    """Eight squares with two captions each."""
    return from_folder(
        make_pictures(tmp_path_factory.mktemp("pictures") / "p"), llava=lambda text: f"picture of {text}"
    )


def look(folder: Path, *, table=SQUARE, **settings) -> ScanReport:
    return scan(DataConfig(str(folder), **settings), table)


def refused(folder: Path, **settings) -> str:
    with pytest.raises(InputError) as caught:
        look(folder, **settings)
    return str(caught.value)


def pixels(record: Record) -> np.ndarray:
    return load_image(record.picture, Bucket(1.0, record.height, record.width))


# -------------------------------------------------------------------------------------------- the same from each


def same_through(samples: list[Sample], layout: str, root: Path, table) -> None:
    make, kind, usual = LAYOUTS[layout]
    folder = make(samples, root)
    report = look(folder, table=table, format=kind, max_crop=0.99)
    assert report.problems == []
    assert len(report.records) == len(samples)
    assert [record.id for record in report.records] == sorted(record.id for record in report.records)
    for record, sample in zip(report.records, samples, strict=True):
        with Image.open(sample.path) as image:
            assert (record.height, record.width) == image.size[::-1]
        assert record.captions == (" ".join(sample.fields["text"].split()),)
        assert record.weights == (1.0,)
        again = pickle.loads(pickle.dumps(record))  # as workers get it
        assert len(pickle.dumps(record)) < 1000
        original = load_image(sample.path, Bucket(1.0, record.height, record.width))
        np.testing.assert_array_equal(pixels(again), original)
    assert report.describe().startswith(f"read as {kind}; captions: {usual}\n")
    if layout != "imagefolder":  # our own reader reads it as well, and is meant where nobody says
        assert recognise(folder) == kind


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_squares_come_out_of_every_source_the_same(samples, tmp_path, layout):
    same_through(samples, layout, tmp_path / "set", SQUARE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_openmoji_comes_out_of_every_source_the_same(emoji_folder, tmp_path, layout):
    rows = [json.loads(line) for line in (emoji_folder / "metadata.jsonl").read_text().splitlines()]
    emoji = sorted((Sample(emoji_folder / r["file_name"], {"text": r["text"]}) for r in rows), key=lambda s: s.path)
    assert len(emoji) == 1918
    same_through(emoji, layout, tmp_path / "set", bucket_table(32, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_photos_of_many_sizes_and_kinds_come_out_of_every_source_the_same(tmp_path, layout):
    skimage = pytest.importorskip("skimage")
    files = [p for p in Path(skimage.__file__).parent.joinpath("data").iterdir() if p.suffix in (".png", ".jpg")]
    photos = sorted((Sample(path, {"text": f"photo of {path.stem}"}) for path in files), key=lambda s: s.path.name)
    assert len(photos) >= 5
    same_through(photos, layout, tmp_path / "set", bucket_table(256, 16))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("layout", ["webdataset", "saved"])
def test_worker_processes_read_them_too(samples, tmp_path, layout, start):
    make, _, _ = LAYOUTS[layout]
    records = look(make(samples, tmp_path / "set"), captions={"text": 1.0, "llava": 1.0}).records
    texts = sorted({caption for record in records for caption in record.captions})
    states = Captions([torch.full((1, 2), float(i)) for i in range(len(texts))], {t: i for i, t in enumerate(texts)})
    dataset = ImageDataset(records, states, Drawing(0), latent_channels=3, downsample=1)
    keys = [(epoch, index) for epoch in range(20) for index in range(8)]
    loader = DataLoader(
        dataset, sampler=keys, batch_size=8, num_workers=2, collate_fn=collate, multiprocessing_context=start
    )
    taken = set()
    for batch in loader:
        assert batch.problems == []
        for row, (sample, id) in enumerate(zip(samples, batch.ids, strict=True)):
            assert Path(sample.path).stem in id or layout == "saved"
            with Image.open(sample.path) as image:
                expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            assert torch.equal(batch.pixels[row], expected)
            taken.add(texts[int(batch.caption[row, 0, 0])])
    assert taken == set(texts)  # both captions of each


def test_pictures_in_a_tar_are_scanned_by_their_header_and_read_as_one_wants(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 500, 3), dtype=np.uint8))
    path = tmp_path / "a.jpg"
    noise.save(path, quality=100)
    shards = as_webdataset([Sample(path, {"text": "noise"})], tmp_path / "set")
    read, original = [], webdataset._Window.readinto
    monkeypatch.setattr(webdataset._Window, "readinto", lambda w, b: read.append(original(w, b)) or read[-1])
    (record,) = look(shards).records
    assert sum(read) < 20_000 < path.stat().st_size / 10
    np.testing.assert_array_equal(pixels(record), np.asarray(Image.open(path)))
    assert sum(read) > path.stat().st_size


@given(st.data())
def test_a_file_within_a_tar_reads_and_seeks_like_a_file(tmp_path_factory, data):
    content = bytes(range(200))
    path = tmp_path_factory.getbasetemp() / "window.bin"
    path.write_bytes(b"before" + content + b"after")
    reference = io.BytesIO(content)
    with webdataset.Member(str(path), 6, 200).open() as file:
        for _ in range(8):
            if data.draw(st.booleans()):
                count = data.draw(st.integers(-1, 250))
                assert file.read(count) == reference.read(count)
            else:
                whence = data.draw(st.sampled_from([0, 1, 2]))
                offset = data.draw(st.integers({0: 0, 1: -reference.tell(), 2: -200}[whence], 20))
                assert file.seek(offset, whence) == reference.seek(offset, whence)
            assert file.tell() == reference.tell()
        with pytest.raises(OSError, match=r"before the start|Invalid|negative"):
            file.seek(-500, 1)


def test_one_shard_one_parquet_file_and_one_part_are_sources_too(samples, tmp_path):
    shards = as_webdataset(samples, tmp_path / "tar")
    assert [r.id for r in look(shards / "00001.tar").records] == ["00001/05.png", "00001/06.png", "00001/07.png"]
    make_table(samples[:3]).to_parquet(tmp_path / "p.parquet")
    assert [r.id for r in look(tmp_path / "p.parquet").records] == ["00000000", "00000001", "00000002"]
    sam = as_sam(samples, tmp_path / "sam")
    assert [r.id for r in look(sam / "partition" / "part0.txt").records] == ["00.png", "02.png", "04.png", "06.png"]
    listed = as_official(samples, tmp_path / "official") / "partition" / "data_info.json"
    assert [r.id for r in look(listed).records] == [f"00/{s.path.name}" for s in samples]


def test_an_official_list_of_sigma_and_one_with_pictures_elsewhere(samples, tmp_path):
    as_official(samples, tmp_path)
    items = (tmp_path / "InternalData/set/partition/data_info.json").read_text()
    (tmp_path / "InternalImgs").rename(tmp_path / "InternImgs")
    write(tmp_path / "InternData/set/data_info.json", items)  # PixArt-Σ's names
    assert len(look(tmp_path / "InternData/set").records) == 8
    write(tmp_path / "lists/mine.json", items)
    assert len(look(tmp_path / "lists/mine.json", images=str(tmp_path / "InternImgs/set")).records) == 8
    (tmp_path / "InternImgs/set/00").rename(tmp_path / "lists/00")  # beside the list
    assert len(look(tmp_path / "lists/mine.json").records) == 8
    assert "8 of 8 images are unreadable" in refused(tmp_path / "InternData/set")


def test_data_images_belongs_to_an_official_list_alone(samples, tmp_path):
    assert "read as folder" in refused(as_folder(samples, tmp_path / "f"), images=str(tmp_path))


# ------------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_fields_are_weighed_in_every_source(samples, tmp_path, layout):
    make, kind, usual = LAYOUTS[layout]
    report = look(make(samples, tmp_path / "set"), format=kind, captions={usual: 1, "llava": 3})
    for record, sample in zip(report.records, samples, strict=True):
        assert record.captions == (sample.fields["text"], sample.fields["llava"])
        assert record.weights == (0.25, 0.75)
    assert f"captions: {usual} × 1 (8 images), llava × 3 (8 images)" in report.describe()
    assert len({id(record.weights) for record in report.records}) == 1  # one tuple for all


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_field_that_no_picture_has_is_refused_with_those_there_are(samples, tmp_path, layout):
    make, kind, usual = LAYOUTS[layout]
    text = refused(make(samples, tmp_path / "set"), format=kind, captions={"lava": 1.0, usual: 0.5})
    assert "has the field 'lava'; there are " in text
    there = text.split("there are ")[1].split(", ")
    assert {"llava", usual} <= set(there)
    assert "lava" not in there
    alone = refused(
        tmp_path / "set" if kind != "official" else tmp_path / "set/InternalData/set",
        format=kind,
        captions={"lava": 1.0},
    )
    assert {"llava", usual} <= set(alone.split("there are ")[1].split(", "))


def test_weights_of_a_missing_field_go_to_the_others_and_a_list_shares_its_own(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "raw", "llava": "long", "more": ["x", " ", "y"]},
        {"file_name": "b.png", "text": "raw", "llava": ""},
        {"file_name": "c.png", "more": ["x", "y", "z"]},
        {"file_name": "d.png", "llava": None, "unused": "u"},
    ]
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["file_name"])
    write(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report = look(tmp_path, captions={"text": 0.3, "llava": 0.5, "more": 0.2, "unused": 0.0})
    assert {record.id: dict(zip(record.captions, record.weights, strict=True)) for record in report.records} == {
        "a.png": pytest.approx({"raw": 0.3, "long": 0.5, "x": 0.1, "y": 0.1}),
        "b.png": {"raw": 1.0},
        "c.png": pytest.approx({"x": 1 / 3, "y": 1 / 3, "z": 1 / 3}),
    }
    assert report.problems == [("d.png", "no caption in text, llava, more")]
    assert "text × 0.3 (2 images), llava × 0.5 (1 images), more × 0.2 (2 images)" in report.describe()


weights = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(weights, st.integers(1, 400))
def test_on_a_fine_grid_each_caption_is_taken_as_often_as_its_weight_says(integers, fineness):
    total = sum(integers)
    shares = tuple(i / total for i in integers)
    names = tuple(f"caption {i}" for i in range(len(shares)))
    record = Record("a", Path("a"), names, shares, 1, 1, SQUARE[0])
    count = total * fineness
    taken = [record.choose((i + 0.5) / count) for i in range(count)]
    assert [taken.count(name) for name in names] == [i * fineness for i in integers]
    assert taken == sorted(taken)  # by cumulative weight
    assert record.choose(0.0) == names[0]
    assert record.choose(np.nextafter(1.0, 0.0)) == names[-1]


@given(st.integers(1, 30), st.floats(0, 1, exclude_max=True))
def test_equal_weights_choose_uniformly_by_index(count, u):
    names = tuple(map(str, range(count)))
    assert Record("a", Path("a"), names, (1 / count,) * count, 1, 1, SQUARE[0]).choose(u) == names[int(u * count)]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"text": -0.5, "llava": 1}, "data.captions.text: got -0.5, expected 0 or more"),
        ({"text": 0, "llava": 0}, "all weights are 0"),
        ({"text": float("inf")}, "data.captions.text: got inf, expected 0 or more, and finite"),
        ({"text": "much"}, "data.captions.text|captions.text: got 'much', expected a number"),
    ],
)
def test_invalid_weights_are_refused(captions, message):
    with pytest.raises(InputError, match=message):
        build(DataConfig, {"folder": "x", "captions": captions})


def test_an_unknown_format_is_refused_with_those_there_are():
    config = build(DataConfig, {"folder": str(Path(__file__).parent), "format": "wds"})
    with pytest.raises(InputError, match=r"data.format: there is no 'wds' \(there are folder, webdataset, datasets"):
        scan(config, [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_of_a_file_join_those_of_every_source(samples, tmp_path, layout):
    make, kind, usual = LAYOUTS[layout]
    folder = make(samples, tmp_path / "set")
    ids = [record.id for record in look(folder, format=kind).records]
    write(
        tmp_path / "c-00000-of-00002.jsonl", "".join(json.dumps({"id": i, "vlm": f"long {i}"}) + "\n" for i in ids[:3])
    )
    write(tmp_path / "c-00001-of-00002.jsonl", json.dumps({"id": ids[3], "vlm": ["one", "two"]}) + '\n{"id": "tor')
    for name in ("c.jsonl", "c-*.jsonl"):
        records = look(folder, format=kind, captions={usual: 1.0, str(tmp_path / name): 3.0}).records
        assert [record.captions[1:] for record in records] == [(f"long {i}",) for i in ids[:3]] + [("one", "two")] + [
            ()
        ] * 4
        assert [record.weights for record in records[2:5]] == [(0.25, 0.75), (0.25, 0.375, 0.375), (1.0,)]
    alone = look(folder, format=kind, captions={str(tmp_path / "c.jsonl"): 1.0})
    assert [record.id for record in alone.records] == ids[:4]
    assert len(alone.problems) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"id": "other.png", "vlm": "x"}\n',
            "belongs to other images: none of its 1 ids is in .*'other.png', .*'00.png'",
        ),
        ("", "no captions in .*c.jsonl"),
        ('{"id": "00.png"}\n', "c.jsonl:1: expected an object with an id and one caption field"),
        ('{"id": "00.png", "a": "x", "b": "y"}\n', "c.jsonl:1: expected an object with an id and one caption field"),
        ('{"id": "00.png", "vlm": 3}\n', "c.jsonl:1: vlm is 3, expected a text"),
        ('{"id": "00.\n{"id": "01.png", "vlm": "x"}\n', "c.jsonl:1: not valid JSON"),
        (
            '{"id": "00.png", "vlm": "x"}\n{"id": "00.png", "vlm": "y"}\n',
            "c.jsonl:2: a second, different caption of '00.png'",
        ),
    ],
)
def test_wrong_caption_files_are_refused_with_their_place(samples, tmp_path, content, message):
    folder = as_folder(samples, tmp_path / "set")
    write(tmp_path / "c.jsonl", content)
    with pytest.raises(InputError, match=message):
        look(folder, captions={str(tmp_path / "c.jsonl"): 1.0})


def test_a_caption_file_that_is_not_there_is_named(samples, tmp_path):
    assert "there is no file" in refused(as_folder(samples, tmp_path / "f"), captions={str(tmp_path / "c.jsonl"): 1.0})


# ------------------------------------------------------------------------------------------------------- buckets


def test_ones_own_table_of_the_authors_sizes_is_theirs():
    assert own_buckets(list(SIZES_1024.values()), 16) == bucket_table(1024, 16)


def test_pictures_go_into_ones_own_buckets(tmp_path):
    for name, size in (("wide", (90, 30)), ("high", (30, 60)), ("square", (50, 50))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", name)
    config = build(DataConfig, {"folder": str(tmp_path), "buckets": [[16, 48], [32, 32], [48, 16]]})
    table = make_buckets(config, 16)
    assert table == [Bucket(0.33, 16, 48), Bucket(1.0, 32, 32), Bucket(3.0, 48, 16)]
    sizes = {record.id: (record.bucket.height, record.bucket.width) for record in scan(config, table).records}
    assert sizes == {"wide.png": (16, 48), "high.png": (32, 32), "square.png": (32, 32)}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(24, 32)], "24×32 are not multiples of 16"),
        ([(0, 32)], "0×32 are not"),
        ([(-16, 32)], "-16×32 are not"),
        ([(16, 16), (32, 32)], "16×16 and 32×32 both have the ratio 1.0"),
    ],
)
def test_wrong_tables_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        own_buckets(sizes, 16)


def test_a_table_of_ones_own_and_the_authors_table_together_are_refused():
    with pytest.raises(InputError, match=r"leave data\.aspect_ratios out"):
        DataConfig("x", aspect_ratios=True, buckets=((16, 16),))


# --------------------------------------------------------------------------------------------------- wrong: tars


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


@pytest.mark.parametrize("where", ["in a picture", "in a header", "between two", "in the text", "before the end mark"])
def test_the_readable_part_of_a_truncated_tar_is_kept_and_the_shard_is_named(samples, tmp_path, where):
    shards = as_webdataset(samples, tmp_path)
    third = members(shards / "00000.tar")["02.png"]
    last = members(shards / "00000.tar")["04.json"]
    at, kept = {
        "in a picture": (third.offset_data + 10, 2),
        "in a header": (third.offset + 100, 2),
        "between two": (third.offset, 2),
        "in the text": (members(shards / "00000.tar")["02.txt"].offset_data + 3, 2),  # its picture has no caption
        "before the end mark": (last.offset_data + 512, 5),
    }[where]
    cut(shards / "00000.tar", at)
    report = look(shards)
    expected = [f"00000/{s.path.name}" for s in samples[:kept]] + [f"00001/{s.path.name}" for s in samples[5:]]
    assert [record.id for record in report.records] == expected
    problems = dict(report.problems)
    assert problems["00000.tar"].startswith("torn: ")
    assert len(problems) == 1 + (where == "in the text")


def test_a_damaged_header_is_not_taken_for_the_end(samples, tmp_path):
    shards = as_webdataset(samples, tmp_path)
    content = bytearray((shards / "00000.tar").read_bytes())
    content[members(shards / "00000.tar")["02.png"].offset + 5] ^= 1
    (shards / "00000.tar").write_bytes(content)
    report = look(shards)
    assert len(report.records) == 5
    assert [name for name, _ in report.problems] == ["00000.tar"]


def test_a_compressed_tar_is_refused_by_name_and_by_content(samples, tmp_path):
    shards = as_webdataset(samples, tmp_path / "set")
    packed = gzip.compress((shards / "00001.tar").read_bytes())
    write(shards / "00001.tar", packed)
    assert "00001.tar: compressed (gzip)" in refused(shards)
    (shards / "00001.tar").rename(shards / "00001.tar.gz")
    assert "00001.tar.gz: compressed (gz)" in refused(shards)
    assert "plain .tar" in refused(write(tmp_path / "only" / "a.tgz", packed).parent)


def test_files_that_are_not_tars_are_named(samples, tmp_path):
    shards = as_webdataset(samples, tmp_path)
    write(shards / "00002.tar", b"this is no tar at all" * 99)
    write(shards / "00003.tar", b"")
    report = look(shards)
    assert len(report.records) == 8
    assert [name for name, reason in report.problems if reason.startswith("torn")] == ["00002.tar", "00003.tar"]


def test_odd_samples_of_a_tar_are_left_out_and_named_with_the_reason(samples, tmp_path):
    image = samples[0].path.read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [
            ("good.png", image), ("good.txt", b"x"), ("no_image.txt", b"x"), ("two.png", image), ("two.jpg", image),
            ("./deep/er.PNG", image), ("./deep/er.json", b'{"caption": "y"}'), ("mute.png", image),
            ("twice.png", image), ("twice.txt", b"x"), ("twice.png", b"other"), ("._hidden.png", b"x"),
            ("zero.png", b""), ("zero.txt", b"x"),
        ]:  # fmt: skip
            add(tar, name, data)
    report = look(tmp_path)
    assert [record.id for record in report.records] == ["a/good.png", "a/twice.png"]
    problems = dict(report.problems)
    assert problems.pop("a/no_image") == "no images in this sample; there are txt"
    assert problems.pop("a/two") == "2 images in this sample; there are png, jpg"
    assert problems.pop("a/mute.png") == problems.pop("a/deep/er.PNG") == "no caption in its .txt and .json"
    assert "is in its shard twice" in problems.pop("a/twice.png")
    assert problems.pop("a/zero.png") == "unreadable: cannot identify it as an image"
    assert problems == {}
    assert look(tmp_path, captions={"caption": 1.0}).records[0].id == "a/deep/er.PNG"


def test_a_folder_without_shards_is_refused_as_webdataset(samples, tmp_path):
    assert "no .tar shard" in refused(as_folder(samples, tmp_path / "f"), format="webdataset")


# -------------------------------------------------------------------------------------------------- wrong: tables


def test_a_folder_of_images_with_metadata_in_parquet_is_an_imagefolder(samples, tmp_path):
    import pandas

    for sample in samples:
        write(tmp_path / sample.path.name, sample.path.read_bytes())
    rows = [{"file_name": sample.path.name, **sample.fields} for sample in samples]
    pandas.DataFrame(rows).to_parquet(tmp_path / "metadata.parquet")
    records = look(tmp_path, captions={"llava": 1.0}).records
    assert [r.id for r in records] == [sample.path.name for sample in samples]
    assert [r.captions for r in records] == [(sample.fields["llava"],) for sample in samples]


def test_without_the_package_datasets_the_extra_is_named(samples, tmp_path, monkeypatch):
    make, _, _ = LAYOUTS["saved"]
    folder = make(samples, tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pixart[datasets]" in refused(folder)


def test_a_table_without_one_column_of_images_is_refused_with_its_columns(samples, tmp_path):
    table = make_table(samples)
    table.remove_columns("image").save_to_disk(tmp_path / "none")
    assert "found 0 (text: Value, llava: Value)" in refused(tmp_path / "none")
    table.add_column("second", [{"bytes": b"", "path": ""}] * 8).save_to_disk(tmp_path / "two")
    assert "found 2 (image: Image, text: Value, llava: Value, second: dict)" in refused(tmp_path / "two")


def test_splits_without_train_are_refused_with_their_names(samples, tmp_path):
    import datasets

    table = make_table(samples)
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "set")
    assert "it has the splits a, b but no train" in refused(tmp_path / "set")
    assert len(look(tmp_path / "set" / "a").records) == 8


def test_a_damaged_table_is_refused_and_rows_without_a_picture_are_left_out(samples, tmp_path):
    import datasets

    write(tmp_path / "broken" / "x.parquet", b"PAR1 no more")
    assert "the package datasets cannot read it" in refused(tmp_path / "broken")
    rows: dict = {"image": [None, {"bytes": b"", "path": None}] + [samples[0].path.read_bytes()] * 298}
    rows["text"] = [["one", "two"]] * 300
    features = datasets.Features(image=datasets.Image(), text=datasets.List(datasets.Value("string")))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    report = look(tmp_path / "rows")
    assert report.problems[0] == ("00000000", "unreadable: the row holds no image")
    assert report.problems[1][0] == "00000001"
    assert (len(report.problems), report.unreadable, len(report.records)) == (2, 2, 298)
    assert report.records[0].captions == ("one", "two")


def test_a_table_that_was_filtered_before_it_was_saved_keeps_its_rows(samples, tmp_path):
    make_table(samples).select([6, 1, 3]).save_to_disk(tmp_path / "set")
    records = look(tmp_path / "set").records
    assert [record.captions[0] for record in records] == [samples[i].fields["text"] for i in (6, 1, 3)]
    np.testing.assert_array_equal(pixels(records[0]), np.asarray(Image.open(samples[6].path)))


# ---------------------------------------------------------------------------------------- wrong: lists, partitions


def with_list(samples: list[Sample], root: Path, change) -> Path:
    """An official list after `change(items)`."""
    file = as_official(samples, root) / "partition" / "data_info.json"
    items = json.loads(file.read_text())
    changed = change(items)
    file.write_text(json.dumps(items if changed is None else changed))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda items: items[2].pop("path") and None,
            "data_info.json, item 3: expected an object with path and prompt",
        ),
        (lambda items: items.insert(1, "a.png"), "item 2: expected an object with path and prompt, got a.png"),
        (lambda items: {"items": items}, "expected a list of objects with path and prompt, got a dict"),
        (lambda items: items[0].update(path="../00.png"), "item 1: '../00.png' leads outside of the folder"),
        (lambda items: items[0].update(path="/etc/00.png"), "item 1: '/etc/00.png' leads outside of the folder"),
        (lambda items: items[0].update(path=3), "item 1: path is 3, expected a path"),
        (lambda items: items[0].update(height="8"), "item 1: height is '8', expected a number of pixels"),
        (lambda items: items[0].update(width=0), "item 1: width is 0, expected a number of pixels"),
        (lambda items: items[0].update(prompt=3), "item 1: prompt is 3, expected a text or a list of texts"),
        (lambda items: [{"path": i["path"], "label": "x"} for i in items], "no caption column; expected one of text, "),
    ],
)
def test_wrong_lists_are_refused_with_their_place(samples, tmp_path, change, message):
    assert message in refused(with_list(samples, tmp_path, change))


def test_a_list_that_is_no_json_or_not_there_is_refused(samples, tmp_path):
    file = with_list(samples, tmp_path, lambda items: None)
    file.write_text(file.read_text()[:-30])
    assert "data_info.json: not valid JSON" in refused(file)
    file.unlink()
    assert "no partition/data_info.json or data_info.json in it" in refused(file.parent.parent, format="official")


def test_a_wrong_size_in_a_list_is_a_problem_and_a_size_before_rotation_is_none(samples, tmp_path):
    def change(items):
        items[0]["height"] = 9
        items[1].pop("width")
        items[3] = items[2]

    file = with_list(samples, tmp_path, change)
    turned = Image.new("RGB", (12, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "InternalImgs/set/00/07.png", exif=exif)
    items = json.loads(file.read_text())
    items[7].update(width=12)
    file.write_text(json.dumps(items))
    report = look(file)
    assert [record.id for record in report.records] == [f"00/{i:02d}.png" for i in (1, 2, 4, 5, 6, 7)]
    assert (report.records[-1].height, report.records[-1].width) == (12, 8)
    assert dict(report.problems) == {
        "00/00.png": f"{file}, item 1 says 8×9 px (width × height), but the image has 8×8",
        "00/02.png": "is in the list twice; the second one is left out",
    }


def test_a_partition_that_names_a_missing_image_says_so(samples, tmp_path):
    root = as_sam(samples, tmp_path)
    write(root / "partition" / "part2.txt", "gone\n\n")
    report = look(root)
    assert len(report.records) == 8
    ((name, reason),) = report.problems
    assert name == "gone.jpg"
    assert reason == "no caption: there is no .txt in captions/"
    write(root / "captions" / "gone.txt", "x")
    ((name, reason),) = look(root).problems
    assert reason.startswith("unreadable: ")
    assert "No such file" in reason
    write(root / "captions" / "away.txt", "x")
    write(root / "partition" / "part2.txt", "gone\naway\n")
    assert "2 of 10 images are unreadable" in refused(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [("../x", "leads outside of the folder"), ("/etc/x.png", "part2.txt:1: '/etc/x.png' leads outside")],
)
def test_a_partition_that_leads_out_of_the_folder_is_refused(samples, tmp_path, line, message):
    root = as_sam(samples, tmp_path)
    write(root / "partition" / "part2.txt", line)
    assert message in refused(root)


def test_a_sam_folder_that_lacks_a_part_of_the_layout_is_refused(samples, tmp_path):
    root = as_sam(samples, tmp_path)
    write(root / "partition" / "part2.txt", "00.png")
    assert dict(look(root).problems) == {"00.png": "is in the partition twice; the second one is left out"}
    (root / "captions").rename(tmp_path / "other")
    assert "no captions/ in it" in refused(root, format="sam")
    (tmp_path / "other").rename(root / "captions")
    for part in (root / "partition").iterdir():
        part.unlink()
    assert "no partition/*.txt in it" in refused(root, format="sam")
