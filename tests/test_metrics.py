"""Metrics by name: logs, tables and plots know only what a metric declares."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from pixart.diffusion.objective import Denoising, Example
from pixart.diffusion.schedule import DiffusionConfig
from pixart.errors import InputError
from pixart.evaluate.metric import Declaration, HeldOut, Metric, PerImage, Score, Subject
from pixart.evaluate.metrics import METRICS, collect, make_metrics
from pixart.files import read_rows
from pixart.study.compare import compare_runs
from pixart.study.plots import draw_curves, read_curves
from pixart.train.history import read_run_config
from pixart.train.loop import train
from pixart.train.metrics import (
    TRAINING,
    last_and_best,
    merge_declarations,
    open_metrics,
    read_declarations,
    read_metrics,
)
from runs import build, make_pictures, settings


class Several:
    """Two processes, as this one sees them: the other's numbers are `other`'s."""

    def __init__(self, other: list[torch.Tensor]):
        self.other = other

    def reduce(self, tensor):
        return tensor + self.other.pop(0)


class Alone:
    def reduce(self, tensor):
        return tensor


@pytest.fixture(autouse=True, scope="module")
def metrics_of_this_file():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METRICS, "_entries", dict(METRICS._entries))
        METRICS.register("brightness")(Brightness)
        METRICS.register("argued")(Argued)
        yield


class Brightness(PerImage):
    """The mean of an image, whatever the network says."""

    declaration = Declaration((Score("brightness", "mean of a clean image", "higher", unit="latent units"),))

    def measure(self, held):
        return held.example.x0.flatten(1).mean(1)


class Argued(Metric):
    def __init__(self, factor):
        self.factor = float(factor)
        self.declaration = Declaration((Score(f"times_{factor}", f"{factor} times one"),), needs=("network",))

    def result(self, processes):
        return {f"times_{self.factor:g}": self.factor}


def held(values: list[float], weights: list[float]) -> HeldOut:
    x0 = torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2)
    example = Example(x0, torch.zeros_like(x0), torch.full((len(values),), 0.5), {}, torch.zeros(1, 1))
    return HeldOut(example, torch.tensor(weights), lambda x, t: x)


def subject() -> Subject:
    config = DiffusionConfig("flow", "x0")
    network = torch.nn.Identity()
    return Subject(network, Denoising(config, network), torch.device("cpu"))


def test_a_mean_over_images_leaves_out_those_without_weight_and_adds_processes_up():
    metric = Brightness()
    for _ in range(2):  # what came before a beginning is forgotten
        metric.begin(subject())
        metric.add(held([1.0, math.nan, 3.0], [1, 0, 1]))
        metric.add(held([math.inf], [0]))
        assert metric.result(Alone()) == {"brightness": 2.0}
    metric.begin(subject())
    metric.add(held([1.0, 3.0], [1, 1]))
    assert metric.result(Several([torch.tensor([8.0]), torch.tensor(1.0)])) == {"brightness": 4.0}
    metric.begin(subject())
    assert math.isnan(metric.result(Alone())["brightness"])


def test_a_name_may_carry_an_argument():
    metrics = make_metrics(["argued:2", "argued:0.5"])
    assert list(metrics) == ["argued:2", "argued:0.5"]
    assert collect(metrics, Alone()) == {"times_2": 2.0, "times_0.5": 0.5}
    with pytest.raises(InputError, match=r"train.metrics: 'argued' cannot be made, .*factor"):
        make_metrics(["argued"])
    with pytest.raises(InputError, match=r"train.metrics: 'loss:3' cannot be made"):
        make_metrics(["loss:3"])


def test_wrong_metrics_are_one_line_before_any_work(tmp_path, monkeypatch):
    class Drawn(Brightness):
        declaration = Declaration((Score("drawn", "of images"),), needs=("images",))

    class Lossy(Brightness):
        declaration = Declaration((Score("grad_norm", "no"),))

    for name, kind in {"same_brightness": Brightness, "drawn": Drawn, "lossy": Lossy}.items():
        monkeypatch.setitem(METRICS._entries, name, kind)
    base = settings(tmp_path / "run", tmp_path / "none", tmp_path / "none")
    for names, match in (
        (["los"], "train.metrics: there is no 'los'; did you mean 'loss'?"),
        (["brightness", "same_brightness"], "'brightness' and 'same_brightness' both report 'brightness'"),
        (["drawn"], r"train.metrics: 'drawn' needs images, .*training only has held_out, network"),
        (["lossy"], "train.metrics: 'lossy' reports 'grad_norm', a name that training uses"),
    ):
        with pytest.raises(InputError, match=match):
            open_metrics(build(base, train__metrics=names))
        with pytest.raises(InputError, match=match):
            train(build(base, train__metrics=names))
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"train.metrics: 'loss' is listed twice"):
        build(base, train__metrics=["loss", "loss"])
    with pytest.raises(InputError, match=r"train.validate_every is set, but train.metrics is empty"):
        build(base, train__metrics=[], train__validate_every=2, data__validation=0.1)
    with pytest.raises(InputError, match="better: got 'up', expected lower, higher or None"):
        Score("a", "b", "up")
    with pytest.raises(InputError, match="needs: got 'pictures', expected"):
        Declaration((), needs=("pictures",))


def test_a_metric_reports_what_it_declares():
    class Silent(Brightness):
        def result(self, processes):
            return {}

    with pytest.raises(InputError, match="metric 'silent' declares 'brightness' and did not report it"):
        collect({"silent": Silent()}, Alone())


def test_the_best_is_by_the_direction_and_the_earliest_of_equals():
    rows = [{"step": step, "a": value} for step, value in enumerate((2.0, 1.0, 3.0, None, 1.0, 3.0, 2.0))]
    assert last_and_best(rows, Score("a", "a", "lower")) == {"a": 2.0, "best_a": 1.0, "best_a_step": 1}
    assert last_and_best(rows, Score("a", "a", "higher")) == {"a": 2.0, "best_a": 3.0, "best_a_step": 2}
    assert last_and_best(rows, Score("a", "a")) == {"a": 2.0}
    assert last_and_best([], Score("a", "a", "higher")) == {"a": None, "best_a": None, "best_a_step": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_encoder):
    """One run with a metric that is better when higher, and one as earlier versions left them: nothing declared."""
    folder = tmp_path_factory.mktemp("metrics")
    base = settings(folder / "a", make_pictures(folder / "pictures"), text_encoder)
    common = {"data__validation": 0.4, "train__validate_every": 2}
    mine = train(build(base, **common, train__metrics=["brightness", "denoising_error"])).run
    old = train(build(base, **common, output=str(folder / "b"))).run
    (old / "metrics.json").unlink()
    return mine, old


def test_the_names_of_training_are_those_that_it_logs(runs):
    rows = [row for run in runs for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert {name for row in rows for name in row} - {"mse"} <= TRAINING


def test_a_run_keeps_what_its_metrics_declare_and_its_summary_has_the_best(runs):
    record = json.loads((runs[0] / "metrics.json").read_text())
    assert list(record) == ["brightness", "denoising_error"]
    assert record["brightness"]["scores"] == [
        {"key": "brightness", "label": "mean of a clean image", "better": "higher", "unit": "latent units"}
    ]
    assert read_declarations(runs[0])["brightness"] == Brightness.declaration
    assert read_declarations(runs[1]) == {}
    summary, rows = json.loads((runs[0] / "summary.json").read_text()), read_metrics(runs[0])
    assert summary["brightness"] == summary["best_brightness"] == rows[-1]["brightness"]
    assert summary["best_brightness_step"] == 2
    assert not any("validation_loss" in name for row in (summary, *rows) for name in row)


def test_other_metrics_may_be_taken_when_a_run_goes_on_and_the_earlier_ones_stay_known(runs, tmp_path, capsys):
    shutil.copytree(runs[0], tmp_path / "run")
    config = read_run_config(tmp_path / "run")
    config = replace(config, output=str(tmp_path / "run"), train=replace(config.train, steps=8, metrics=("loss",)))
    train(config)
    assert "changed: train.metrics" in capsys.readouterr().out
    assert list(read_declarations(tmp_path / "run")) == ["brightness", "denoising_error", "loss"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_loss"] is not None and summary["best_brightness"] is not None


def test_tables_and_plots_show_a_metric_that_this_process_does_not_know(runs, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(METRICS._entries, "brightness")
    text = compare_runs(runs)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head = rows[0]
    place = head.index("brightness")
    values = {row["step"]: row["brightness"] for row in read_metrics(runs[0]) if "brightness" in row}
    best = max(values, key=values.get)
    assert head[place + 1] == "its best, at step"
    assert rows[2][place : place + 2] == [f"{values[6]:.4g}", f"{values[best]:.4g}, {best}"]
    assert rows[3][place : place + 2] == ["", ""]
    assert {"validation_loss", "validation_error", "at 0.25", "at 16"} <= set(head)
    figure = draw_curves({run.name: read_curves(run) for run in runs}, merge_declarations(runs))
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes}
    axis = titles["mean of a clean image (higher is better)"]
    assert axis.get_ylabel() == "latent units"
    (line,) = axis.get_lines()
    assert line.get_xdata().tolist() == list(values) and line.get_ydata().tolist() == list(values.values())


def test_a_metric_that_two_runs_declare_differently_is_reported(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "c")
    record = json.loads((other / "metrics.json").read_text())
    record["brightness"]["scores"][0]["label"] = "the same in other words"
    (other / "metrics.json").write_text(json.dumps(record))
    assert "not the same metric" not in compare_runs([runs[0], other])
    record["brightness"]["scores"][0]["better"] = "lower"
    (other / "metrics.json").write_text(json.dumps(record))
    assert "brightness is not the same metric in each of these runs" in compare_runs([runs[0], other])
    (other / "metrics.json").write_text("[")
    with pytest.raises(InputError, match=r"metrics.json: cannot be read .*remove it"):
        compare_runs([other])
    record["brightness"]["scores"][0]["better"] = "up"
    (other / "metrics.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"metrics.json: .*better: got 'up'"):
        compare_runs([other])
