"""Files are written completely or not at all, and JSON lines survive an incomplete last line."""

import json
import math
import os

import pytest

from pixart.errors import InputError
from pixart.files import (
    append_rows,
    mend_lines,
    read_lines,
    read_rows,
    to_json,
    verify,
    write_file,
    write_folder,
    write_json,
)


def half(path):
    path.write_text("half") if not path.is_dir() else (path / "a").write_text("half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, durable):
    write_json(tmp_path / "x" / "a.json", {"a": 1}, durable=durable)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "x" / "a.json", half, durable=durable)
    assert json.loads((tmp_path / "x" / "a.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path / "x") == ["a.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_folder_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, durable):
    target = tmp_path / "folder"
    for text in ("old", "new"):
        write_folder(target, lambda path, text=text: (path / text).write_text(text) and None, durable=durable)
        assert verify(target) is None and sorted(os.listdir(target)) == ["manifest.json", text]
    with pytest.raises(OSError, match="No space"):
        write_folder(target, half, durable=durable)
    assert verify(target) is None and os.listdir(tmp_path) == ["folder"]
    (target / "new").write_text("changed")
    assert verify(target) == "new has changed since it was written"


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("kept")
    with pytest.raises(OSError):  # noqa: PT011
        write_json(tmp_path / "a", {})
    assert (tmp_path / "a" / "b").read_text() == "kept"


def test_a_shared_file_is_written_under_a_name_of_the_process(tmp_path):
    def write(path):
        assert str(os.getpid()) in path.name and path.parent == tmp_path
        path.write_text("mine")

    write_file(tmp_path / "a", write, shared=True)
    assert (tmp_path / "a").read_text() == "mine" and os.listdir(tmp_path) == ["a"]


def test_json_has_null_for_what_is_not_finite_and_any_name():
    text = to_json({"a": [math.nan, {"b": -math.inf}], "c": (1.5, 2, True), "é": "\udcff"})
    text.encode()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, {"b": None}],
        "c": [1.5, 2, True],
        "é": "\udcff",
    }


def test_a_line_after_a_torn_one_stands_by_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 1}])
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    append_rows(path, [{"step": 3}])
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    with open(path, "a") as file:
        file.write('{"step": 4}')  # whole but for its end, as an editor may leave it
    append_rows(path, [{"step": 5, "loss": math.nan, "name": "\udcff"}])
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4, 5]
    assert path.read_text().endswith('{"step": 5, "loss": null, "name": "\\udcff"}\n')


def test_a_damaged_line_is_named_unless_it_is_the_last_one_torn(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert list(read_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_bytes(b'{"a": \n{"a": 2}\n')
    with pytest.raises(InputError, match=r"a.jsonl:1: not valid JSON"):
        list(read_lines(path))
    assert list(read_lines(path, skip_damaged=True)) == [(2, {"a": 2})]


def test_a_torn_line_longer_than_a_block_and_one_alone_are_cut(tmp_path):
    for before in (b"", b'{"id": "a"}\n', b"x\n" * 50_000):
        for torn in (b"", b"y" * 10, b"y" * 200_000):
            (tmp_path / "c").write_bytes(before + torn)
            mend_lines(tmp_path / "c")
            assert (tmp_path / "c").read_bytes() == before
