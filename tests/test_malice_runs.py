"""Images and captions that change during a run: reported at the next start, whatever their names and sizes."""

import shutil

import numpy as np
import pytest
from PIL import Image

from features import make_store
from pixart.files import read_rows
from pixart.train.loop import train
from runs import build, make_pictures, settings


def edit_captions(folder):
    for path in folder.glob("*.txt"):
        path.write_text("another " + path.read_text())


def replace_an_image(folder):
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "03.png")  # of the same size in pixels


def touch(folder):
    copy = shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    shutil.move(copy, folder)


@pytest.mark.parametrize(("edit", "told"), [(edit_captions, "captions"), (replace_an_image, "images"), (touch, None)])
@pytest.mark.parametrize("validation", [0.0, 0.3])
def test_files_that_changed_under_the_same_names_are_reported_at_a_resume(
    tmp_path, text_encoder, capsys, edit, told, validation
):
    folder = make_pictures(tmp_path / "pictures", 8)
    base = settings(tmp_path / "run", folder, text_encoder)
    options = {"data__validation": validation, "train__batch_size": 2}
    train(build(base, train__steps=2, **options))
    edit(folder)
    capsys.readouterr()
    train(build(base, train__steps=4, **options))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line for line in said if "under the same names" in line] == (
        [
            f"warning: the {told} are not those of the steps so far, under the same names; the run continues with the "
            "new ones, as recorded in history.jsonl"
        ]
        if told
        else []
    )
    rows = list(read_rows(tmp_path / "run" / "history.jsonl"))
    assert (rows[-2]["contents"] == rows[-1]["contents"]) == (told is None)


def test_a_store_rebuilt_from_other_captions_is_reported(tmp_path, text_encoder, capsys):
    folder = make_pictures(tmp_path / "pictures", 8)
    base = settings(tmp_path / "run", folder, text_encoder)
    make_store(base, tmp_path / "store")
    options = {"data__features": str(tmp_path / "store"), "train__batch_size": 2}
    train(build(base, train__steps=2, **options))
    shutil.rmtree(tmp_path / "store")
    edit_captions(folder)
    make_store(base, tmp_path / "store")
    capsys.readouterr()
    train(build(base, train__steps=4, **options))
    assert "warning: the features are not those of the steps so far, under the same names" in capsys.readouterr().out
