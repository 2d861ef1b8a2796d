"""What the commands share: exit codes, errors as one line, prompt files, contact sheets."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

import pixart
from pixart import cli
from pixart.contact_sheet import contact_sheet
from pixart.errors import InputError
from pixart.files import write_file, write_folder


def outcome(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code, capsys.readouterr().err


def failing(error):
    def main():
        raise error

    return main


def test_run_exits_with_what_main_returns(capsys):
    assert outcome(lambda: None, capsys) == (None, "")
    assert outcome(lambda: 3, capsys) == (3, "")


def test_wrong_input_prints_one_line_and_exits_with_2(capsys, monkeypatch):
    monkeypatch.delenv("PIXART_TRACEBACK", raising=False)
    assert outcome(failing(InputError("no such thing")), capsys) == (2, "error: no such thing\n")


def test_a_caller_can_import_the_error_from_the_package():
    assert pixart.InputError is InputError
    assert "InputError" in dir(pixart)


def test_the_traceback_can_be_requested(monkeypatch):
    monkeypatch.setenv("PIXART_TRACEBACK", "1")
    with pytest.raises(InputError, match="no such thing"):
        cli.run(failing(InputError("no such thing")))


def test_an_interrupt_exits_with_130_and_a_bug_is_not_hidden(capsys):
    assert outcome(failing(KeyboardInterrupt()), capsys) == (130, "interrupted\n")
    with pytest.raises(ValueError, match="ours"):
        cli.run(failing(ValueError("ours")))


def full_disk(path, file_name=None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if file_name is None else [str(path / file_name)]))


def test_a_disk_that_cannot_be_written_is_one_line_that_names_the_place(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("PIXART_TRACEBACK", raising=False)
    end = "cannot be written (No space left on device); free some space, or name another place\n"
    assert outcome(failing(full_disk(tmp_path, "log")), capsys) == (2, f"error: {tmp_path}/log: {end}")
    assert outcome(failing(full_disk(tmp_path)), capsys) == (2, f"error: a file: {end}")
    (tmp_path / "kept").write_text("before")

    def within(writer, name, error):
        def main():
            writer(tmp_path / name, failing_with(error))

        return main

    def failing_with(error):
        def fill(path):
            (path / "part" if path.is_dir() else path).write_text("half")
            raise error

        return fill

    for writer, name in ((write_file, "kept"), (write_folder, "folder")):
        found = outcome(within(writer, name, full_disk(tmp_path)), capsys)
        assert found == (2, f"error: {tmp_path / name}: {end}")
        found = outcome(within(writer, name, OSError("I/O error: No space left on device (os error 28)")), capsys)
        assert found[0] == 2 and f"{tmp_path / name}: cannot be written (I/O error: No space" in found[1]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "before"
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("anything")):  # bugs are not hidden
        with pytest.raises(OSError, match=r"No such file|anything"):
            cli.run(failing(error))
    monkeypatch.setenv("PIXART_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space"):
        cli.run(failing(full_disk(tmp_path)))


def test_prompts_stand_one_a_line_without_comments_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat \r\n\r\n# a comment\n  # another\n\té #1\n".encode())
    assert cli.read_prompts(path) == ["a cat", "é #1"]


def test_a_prompt_file_that_is_missing_empty_or_not_utf8_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(InputError, match="cannot be read"):
        cli.read_prompts(path)
    path.write_text("# only this\n\n")
    with pytest.raises(InputError, match="no prompt in it"):
        cli.read_prompts(path)
    path.write_bytes("кошка".encode("cp1251"))
    with pytest.raises(InputError, match="cannot be read"):
        cli.read_prompts(path)


def tile(colour: str, size=(32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_contact_sheet_shows_every_picture_whole_and_a_label_below():
    colours = ["red", "lime", "blue", "cyan", "magenta"]
    sheet = np.asarray(contact_sheet([[tile(c)] for c in colours], ["x"] * 5, columns=2))
    assert sheet.shape[1] == 2 * 100 + 4
    places = []
    for colour in colours:
        rows, columns = np.nonzero((sheet == np.asarray(tile(colour))[0, 0]).all(-1))
        assert len(rows) == 96 * 96
        assert np.ptp(rows) == np.ptp(columns) == 95
        places.append((rows[0], columns[0]))
    assert len({row for row, _ in places}) == 3
    assert places == sorted(places)  # in reading order
    top, left = places[0]
    assert (sheet[top + 96 : top + 120, left : left + 96] != 255).any()  # the label


def test_a_label_with_accents_is_readable():
    one, other = (np.asarray(contact_sheet([[tile("red")]], [label])) for label in ("Réunion, Côte", "Reunion, Cote"))
    assert (one == other).all()


def test_a_contact_sheet_stacks_the_pictures_of_a_cell_and_enlarges_without_smoothing():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([[Image.fromarray(pixels), tile("red", (32, 64))]], [""]))
    np.testing.assert_array_equal(sheet[4:100, 4:100], pixels.repeat(3, 0).repeat(3, 1))
    assert (sheet[100:292, 4:100] == [255, 0, 0]).all()
    assert (sheet[292:] == 255).all()


def test_a_long_label_is_cut_and_a_picture_of_another_shape_fits():
    sheet = contact_sheet([[tile("red", (64, 32))], [tile("lime", (32, 64))]], ["word " * 99, "b"], columns=2, side=50)
    assert sheet.size == (2 * 54 + 4, 100 + 30 + 4 + 4)


def test_labels_and_cells_belong_together():
    with pytest.raises(ValueError, match="zip"):
        contact_sheet([[tile("red")], [tile("red")]], ["one"])
