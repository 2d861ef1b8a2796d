"""The compositional set: which combinations there are, which are held out, and how they are scored."""

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart.config import load_config
from pixart.data.compositional import GENDERS, TONES, build_compositional, build_openmoji_all, combinations
from pixart.data.config import DataConfig
from pixart.data.sources import make_table, scan
from pixart.evaluate.compositional import CHANCE, Compositional, read_cells
from pixart.evaluate.image_metric import Task, number_prompts
from pixart.train.config import TrainConfig
from pixart.train.loop import train
from pixart.train.metrics import read_metrics
from runs import ROOT

LIST = "f76b87d26cbfaaf271b90e93c21348f1100f11b55af7210a4d369f22753aea9f"  # SHA-256 of its rows


@pytest.fixture(scope="session")
def compositional_folder(tmp_path_factory):
    return build_compositional(tmp_path_factory.mktemp("data") / "compositional", side=32)


def test_the_rule_finds_the_combinations_of_the_list_and_its_held_out_ones():
    cells = combinations()
    lines = [
        "\t".join((c.svg.stem, c.activity, c.gender, c.tone, "held out" if c.held_out else "training")) for c in cells
    ]
    assert hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest() == LIST
    assert len({(c.activity, c.gender, c.tone) for c in cells}) == 80 * len(GENDERS) * len(TONES) == 1440
    assert sum(c.held_out for c in cells) == 308
    assert len({c.caption for c in cells}) == 1440
    trained = [c for c in cells if not c.held_out]
    assert len({c.activity for c in trained}) == 80  # every activity is seen in training


def test_training_never_reads_a_held_out_combination(compositional_folder):
    held = {c.svg.stem for c in combinations() if c.held_out}
    for folder, count in ((compositional_folder, 1132), (compositional_folder / "held_out", 308)):
        data = DataConfig(folder=str(folder), resolution=32)
        records = scan(data, make_table(data, 8)).records
        assert len(records) == count
        assert {Path(r.id).stem in held for r in records} == {count == 308}
    first = (compositional_folder / "held_out" / "metadata.jsonl").read_text(encoding="utf-8").partition("\n")[0]
    assert json.loads(first).keys() == {"file_name", "text", "activity", "gender", "tone"}


def test_the_set_of_all_emoji_holds_out_the_same_and_shows_none_of_it(compositional_folder, tmp_path):
    folder = build_openmoji_all(tmp_path / "all", side=32)
    held, others = folder / "held_out", {path.read_bytes() for path in folder.glob("*.png")}
    assert (held / "metadata.jsonl").read_text() == (compositional_folder / "held_out" / "metadata.jsonl").read_text()
    training = {path.read_bytes() for path in compositional_folder.glob("*.png")}
    assert training < others and len(list(folder.glob("*.png"))) > 3000
    # what another emoji shows, too, is already shown by a training combination
    assert {path.read_bytes() for path in held.glob("*.png")} & others <= training
    assert read_cells(folder)[:5] == [
        replace(cell, file=folder / cell.file.relative_to(compositional_folder))
        for cell in read_cells(compositional_folder)[:5]
    ]
    assert len(read_cells(folder)) == 1440


def make_small_set(source: Path, folder: Path, activities: int, *, shuffled: bool = False) -> Path:
    """The combinations of the first activities; `shuffled` gives the training captions to other images."""
    for part in (".", "held_out"):
        rows = [json.loads(line) for line in (source / part / "metadata.jsonl").read_text().splitlines()]
        chosen = sorted({c.activity for c in combinations()})[1 : 1 + activities]
        rows = [row for row in rows if row["activity"] in chosen]
        (folder / part).mkdir(parents=True)
        if shuffled and part == ".":
            captions = [row["text"] for row in rows]
            random.Random(0).shuffle(captions)
            rows = [{**row, "text": caption} for row, caption in zip(rows, captions, strict=True)]
        for row in rows:
            shutil.copy(source / part / row["file_name"], folder / part)
        (folder / part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train_on(images: Path, reference: Path, run: Path, steps: int, **changes) -> dict:
    """Train the demonstration's network, but a smaller one → the last row with scores."""
    cells = read_cells(reference)
    prompts = run.parent / "prompts.txt"
    prompts.write_text("".join(f"{cell.caption}\n" for cell in cells))
    overrides = {
        "output": run, "data.folder": images, "data.prepare": "null", "model.hidden_size": 128, "model.depth": 4,
        "model.num_heads": 2, "train.steps": steps, "train.batch_size": 48, "train.sample_every": 0,
        "train.save_every": 0, "train.evaluate_every": steps, "train.trackers": "[]", "sample.steps": 4,
        "evaluate.reference": reference, "evaluate.prompts": prompts, **changes,
    }  # fmt: skip
    train(load_config(TrainConfig, ROOT / "configs" / "openmoji.yaml", [f"{k}={v}" for k, v in overrides.items()]))
    return next(row for row in reversed(read_metrics(run)) if "compositional" in row)


@pytest.mark.slow
def test_a_model_combines_what_it_learnt_and_one_of_shuffled_captions_does_not(compositional_folder, tmp_path, capsys):
    real = make_small_set(compositional_folder, tmp_path / "real", 20)
    shuffled = make_small_set(compositional_folder, tmp_path / "shuffled", 20, shuffled=True)
    good = train_on(real, real, tmp_path / "good", 300)
    bad = train_on(shuffled, real, tmp_path / "bad", 300)
    assert good["compositional_low"] > 2 * CHANCE  # how far it gets in 300 steps depends on rounding
    assert good["compositional_seen"] > 0.6
    assert bad["compositional"] < CHANCE and bad["compositional_high"] < good["compositional_low"]
    # what is printed and shown says the same
    said = capsys.readouterr().out
    assert f"never seen in training: {100 * good['compositional']:.1f} %" in said
    sheet = Image.open(tmp_path / "good" / "evaluation" / "compositional_0000300.png")
    assert "OpenMoji" in sheet.text["Comment"]


def test_a_sheet_shows_real_images_above_and_marks_misses(compositional_folder, tmp_path):
    cells = read_cells(compositional_folder)
    metric = Compositional()
    metric.open(
        Task(number_prompts([cell.caption for cell in cells]), (32, 32), torch.device("cpu"), compositional_folder)
    )
    shown = metric.shown()
    assert len(set(shown)) == 24 and all(cells[i].held_out for i in shown)
    real = {i: np.array(Image.open(cells[i].file).convert("RGB")) for i in shown}
    drawn = {**real, shown[3]: 255 - real[shown[3]]}
    nearest = np.array([metric.classes[i] for i in range(len(cells))])
    nearest[shown[3]] = metric.classes[shown[4]]
    sheet = np.array(metric.sheet(drawn, {"compositional": nearest}))
    side, height = 96, 2 * 96 + 30  # a cell of the sheet: two images and two lines
    for place in range(8):
        left, label = 4 + place * (side + 4), sheet[4 + 2 * side : 4 + height, 4 + place * (side + 4) :][:, :side]
        above, below = sheet[4 : 4 + side, left : left + side], sheet[4 + side : 4 + 2 * side, left : left + side]
        assert np.array_equal(above[::3, ::3], real[shown[place]])
        assert np.array_equal(above, below) == (place != 3)
        red = (label[..., 0] > 200) & (label[..., 1] < 100)
        assert red.any() == (place == 3)
