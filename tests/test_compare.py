"""Runs in one table: every number is one that the runs logged, and what differs is named."""

import json
import re
import shutil

import pytest

from pixart.errors import InputError
from pixart.model import PixArt
from pixart.study.compare import compare_runs
from pixart.train.loop import train
from runs import build, make_pictures, settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_encoder):
    folder = tmp_path_factory.mktemp("compare")
    base = settings(folder / "a", make_pictures(folder / "pictures"), text_encoder)
    same = {"data__validation": 0.4, "train__validate_every": 2}
    other = {"output": str(folder / "b"), "model__depth": 3, "diffusion__weighting": "velocity"}
    return [train(build(base, **same, **changes)).run for changes in ({}, other)]


def test_the_table_has_what_the_runs_logged_and_names_what_differs(runs):
    text = compare_runs(runs)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head, table = rows[0], {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:4]}
    assert list(table) == ["a", "b"]
    for run in runs:
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        errors = {row["step"]: row["validation_error"] for row in logged if "validation_error" in row}
        best = min(errors, key=errors.get)
        row = table[run.name]
        assert row["step"] == "6" and row["images"] == "24"
        assert row["loss"] == f"{[r['loss'] for r in logged if 'loss' in r][-1]:.4g}"
        assert row["validation_error"] == f"{errors[6]:.4g}"
        assert row["its best, at step"] == f"{errors[best]:.4g}, {best}"
        for ratio in ("0.25", "1", "4", "16"):
            assert row[f"at {ratio}"] == f"{[r for r in logged if r['step'] == 6][-1][f'validation_error_{ratio}']:.4g}"
    assert float(table["a"]["GFLOP"]) < float(table["b"]["GFLOP"])
    assert [row for row in rows[4:] if row[0].startswith(("model", "diffusion"))] == [
        ["model.depth", "2", "3"],
        ["diffusion.weighting", '"uniform"', '"velocity"'],
    ]
    assert not [row for row in rows[4:] if row[0] == "output"]
    assert "measure another thing in each of these runs (diffusion.weighting differ)" in text
    assert "parameters" in head


def test_runs_on_other_images_are_reported(runs, tmp_path):
    other = tmp_path / "c"
    shutil.copytree(runs[0], other)
    assert "other images" not in compare_runs([runs[0], other])
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("data:\n", "data:\n  flip: true\n"))
    assert "captions in each of these runs (data.flip differ)" in compare_runs([runs[0], other])
    (other / "config.yaml").write_text(text)
    history = (other / "history.jsonl").read_text()
    (other / "history.jsonl").write_text(history.replace('"held_out": "', '"held_out": "x'))
    assert "runs (the fingerprints in history.jsonl differ)" in compare_runs([runs[0], other])


def test_runs_of_two_seeds_are_validated_on_the_same_images_unless_they_began_when_seed_decided_it(runs, tmp_path):
    other = tmp_path / "c"
    shutil.copytree(runs[0], other)
    text = (other / "config.yaml").read_text()
    assert "split_seed: 0" in text
    (other / "config.yaml").write_text(text + "seed: 1\n")
    assert "other images" not in compare_runs([runs[0], other])
    (other / "config.yaml").write_text(text.replace("  split_seed: 0\n", "") + "seed: 1\n")
    assert "captions in each of these runs (data.split_seed differ)" in compare_runs([runs[0], other])


def test_one_run_and_equal_runs_have_no_table_of_differences(runs):
    text = compare_runs(runs[:1])
    assert "setting" not in text and "measure another thing" not in text
    count = sum(p.numel() for p in PixArt(build({**settings(*[runs[0]] * 3)}).model).parameters())
    assert re.search(rf"\| a \| {count / 1e6:.1f} M \|", text)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no config\.yaml in it"):
        compare_runs([tmp_path])
