"""Curves: the plots show what was logged."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart.errors import InputError
from pixart.study.plots import draw_curves, name_runs, plot_runs, read_curves, smooth
from pixart.train.metrics import merge_declarations
from runs import run_command, settings, write


def make_run(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def logged(count: int, *, validation: bool = True, level: float = 1.0) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(1, count + 1):
        loss = level * (0.2 + 1 / i) + 0.02 * rng.standard_normal()
        rows.append({"step": 10 * i, "loss": loss, "images_per_second": 50 * level + rng.standard_normal()})
        if validation and i % 20 == 0:
            rows.append({"step": 10 * i, "validation_loss": level * (0.25 + 1 / i)})
    return rows


def test_the_running_mean_is_centred_and_keeps_a_straight_line():
    line = [0.5 * i for i in range(200)]
    assert smooth(line, 0.1) == pytest.approx(line)
    spike = [0.0] * 50 + [1.0] + [0.0] * 50
    assert smooth(spike, 0.1)[45:56] == pytest.approx([1 / 11] * 11)
    assert smooth(spike, 0.1)[44] == 0 == smooth(spike, 0.1)[56]
    assert smooth([3.0], 0.02) == [3.0]


def test_curves_are_the_rows_and_a_torn_last_line_is_left_out(tmp_path):
    run = make_run(tmp_path / "a", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "lr": 3}], '{"step": 3, "lo')
    assert read_curves(run) == {"loss": ([1, 2], [2.0, 1.0])}


def test_the_x_axis_is_interpolated_where_a_row_has_no_place(tmp_path):
    rows = [
        {"step": 10, "loss": 3.0, "images": 40, "gpu_hours": 0.5},
        {"step": 15, "validation_error": 2.0},
        {"step": 20, "loss": 1.0, "images": 80, "gpu_hours": 0.7},
    ]
    run = make_run(tmp_path / "a", rows)
    assert read_curves(run, "images") == {"loss": ([40, 80], [3, 1]), "validation_error": ([60], [2])}
    assert read_curves(run, "gpu_hours")["validation_error"] == ([pytest.approx(0.6)], [2])
    with pytest.raises(InputError, match="no row has 'images'"):
        read_curves(make_run(tmp_path / "b", [{"step": 1, "loss": 1.0}]), "images")
    with pytest.raises(InputError, match="x: got 'time', expected one of step, images, gpu_hours"):
        plot_runs([run], tmp_path / "p.png", x="time")


def test_errors_are_drawn_at_every_ratio_and_their_geometric_mean_whatever_mean_was_logged(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"step": step, "validation_error": 9.0, "validation_error_0.25": 0.5, "validation_error_16": 2.0}
        for step in (10, 20)
    ]
    rows.append({"step": 30, "validation_error": None, "validation_error_0.25": None, "validation_error_16": 3.0})
    run = make_run(tmp_path / "a", rows)
    assert read_curves(run) == {
        "validation_error": ([10, 20], [pytest.approx(1)] * 2),
        "validation_error_0.25": ([10, 20], [0.5, 0.5]),
        "validation_error_16": ([10, 20, 30], [2.0, 2.0, 3.0]),
    }
    figure = draw_curves({"a": read_curves(run)}, merge_declarations([run]))
    lines = [axis.get_lines() for axis in figure.axes if "every ratio" in axis.get_title(loc="left")]
    assert [line.get_ydata().tolist() for line in lines[0]] == [[0.5, 0.5], [2.0, 2.0, 3.0]]
    assert len({line.get_linestyle() for line in lines[0]}) == 2
    assert [text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().texts] == [
        "at 0.25",
        "at 16",
    ]


@pytest.mark.parametrize("log_x", [False, True])
def test_runs_of_different_kinds_are_drawn_into_one_png(tmp_path, log_x):
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path / "a", logged(100)), make_run(tmp_path / "b", logged(60, validation=False, level=1.5))]
    plot_runs(runs, tmp_path / "plot.png", log_x=log_x)
    image = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).reshape(-1, 3)
    for colour in ([31, 119, 180], [255, 127, 14]):  # the first two of matplotlib's cycle
        assert (abs(image.astype(int) - colour).max(1) < 8).sum() > 200


def test_names_are_the_shortest_that_tell_runs_apart():
    assert name_runs(["runs/a", "runs/b/"]) == ["a", "b"]
    assert name_runs(["x/a", "y/a"]) == ["x/a", "y/a"]
    with pytest.raises(InputError, match="named twice"):
        name_runs(["x/a", "x/../x/a"])


def test_wrong_input_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none: there is no metrics.jsonl in it"):
        plot_runs([tmp_path / "none"], tmp_path / "plot.png")
    with pytest.raises(InputError, match="nothing to draw"):
        plot_runs([make_run(tmp_path / "empty", [])], tmp_path / "plot.png")
    run = make_run(tmp_path / "run", logged(3))
    with pytest.raises(InputError, match=r"expected the name of a .png file"):
        plot_runs([run], tmp_path / "plot.txt")
    with pytest.raises(InputError, match="cannot be written"):
        plot_runs([run], run / "metrics.jsonl" / "plot.png")  # a file in place of a folder
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'pixart\[plot\]'"):
        plot_runs([run], tmp_path / "plot.png")


@pytest.mark.slow
def test_the_command_draws_and_refuses(tmp_path):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", logged(40))
    write(run / "config.yaml", settings(run, tmp_path, tmp_path))
    done = run_command("compare", run, "--output", tmp_path / "p.png", "--log-x")
    assert done.returncode == 0, done.stderr
    assert "| run | parameters |" in done.stdout
    assert (tmp_path / "p.png").stat().st_size > 5000
    failed = run_command("compare", tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
