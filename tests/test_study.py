"""Studies: what a file may say, budgets, statistics against scipy and simulations, runs, kills and the report."""

import csv
import json
import math
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from pixart.config import dump_yaml
from pixart.data.images import Record
from pixart.data.training_set import exchange_captions
from pixart.errors import InputError
from pixart.evaluate.interval import student, student_inside
from pixart.files import append_rows, write_json, write_text
from pixart.study.compare import compare_runs
from pixart.study.plan import plan_study, step_flops
from pixart.study.report import write_report
from pixart.study.results import read_results
from pixart.study.statistics import holm, mean_over_seeds, paired_difference
from pixart.train.metrics import open_metrics, write_declarations
from runs import ROOT, change, command, environment, make_pictures, make_text_encoder, run_command, settings

# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
def test_students_distribution_is_scipys(freedom):
    for inside in (0.5, 0.6, 0.8, 0.95, 0.999):
        assert student(freedom, inside) == pytest.approx(stats.t.ppf((1 + inside) / 2, freedom), rel=1e-9)
    for t in (0.0, 0.3, 1.0, 2.5, 40.0):
        assert student_inside(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)


def test_a_paired_difference_is_scipys_test():
    arm, base = {0: 3.0, 1: 4.5, 2: 4.0, 5: 9.0}, {0: 2.0, 1: 3.0, 2: 3.5, 7: 1.0}
    found = paired_difference(arm, base, 0.9)
    reference = stats.ttest_rel([3.0, 4.5, 4.0], [2.0, 3.0, 3.5])
    low, high = reference.confidence_interval(0.9)
    assert found.seeds == (0, 1, 2) and found.mean == pytest.approx(1.0)
    assert (found.p, found.low, found.high) == pytest.approx((reference.pvalue, low, high))
    # one standard error times the two quantiles
    assert found.detectable == pytest.approx(0.5 / math.sqrt(3) * (stats.t.ppf(0.95, 2) + stats.t.ppf(0.8, 2)))
    alone = paired_difference({3: 1.0}, {3: 0.5}, 0.95)
    assert (alone.mean, alone.low, alone.p, alone.clear) == (0.5, None, None, False)
    assert paired_difference({3: 1.0}, {4: 0.5}, 0.95) is None
    same = paired_difference({0: 0.1, 1: 0.7}, {0: 0.1, 1: 0.7}, 0.95)
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_intervals_cover_at_their_nominal_rate_and_equal_arms_differ_no_more_often():
    """Seeds share a large effect, as paired runs do; the arm's true difference is 0.3."""
    draw = np.random.default_rng(0)
    studies, seeds = 4000, 4
    covered, false = 0, 0
    for _ in range(studies):
        shared = draw.normal(0, 5, seeds)
        base, arm, null = (dict(enumerate(shared + shift + draw.normal(0, 0.4, seeds))) for shift in (0, 0.3, 0))
        found = paired_difference(arm, base, 0.95)
        covered += found.low <= 0.3 <= found.high
        false += paired_difference(null, base, 0.95).clear
    spread = 4 * math.sqrt(0.95 * 0.05 / studies)
    assert covered / studies == pytest.approx(0.95, abs=spread)
    assert false / studies == pytest.approx(0.05, abs=spread)


def test_the_detectable_difference_is_found_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    seeds, error, studies = 5, 1.0, 3000
    # of the true spread: that of a sample varies
    true = (stats.t.ppf(0.975, seeds - 1) + stats.t.ppf(0.8, seeds - 1)) * error / math.sqrt(seeds)
    found = sum(
        paired_difference(
            dict(enumerate(draw.normal(true, error, seeds))), dict.fromkeys(range(seeds), 0.0), 0.95
        ).clear
        for _ in range(studies)
    )
    assert 0.75 < found / studies < 0.9


def test_holm_bounds_the_rate_of_any_false_finding():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.6, 0.9]) == [1.0, 1.0]
    draw = np.random.default_rng(2)
    wrong = sum(min(holm(list(draw.uniform(size=5)))) < 0.05 for _ in range(4000)) / 4000
    assert wrong == pytest.approx(0.05, abs=0.014)


def test_a_mean_has_an_interval_from_two_values_on():
    found = mean_over_seeds([1.0, 2.0, 4.0], 0.95)
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 2.0, 4.0]))
    assert (found.value, found.low, found.high) == pytest.approx((7 / 3, low, high))
    assert mean_over_seeds([2.0], 0.95).low is None and mean_over_seeds([1.0, 2.0], None).low is None


# -------------------------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("study")
    found = settings(home / "out", make_pictures(home / "pictures", 12), make_text_encoder(home / "text"))
    found["data"]["validation"] = 0.25
    found["train"] |= {"steps": 4, "validate_every": 2, "save_every": 1}
    return found


def study_file(folder: Path, base: dict, study: dict, **changes) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**change(base, output=str(folder / "out"), **changes), "study": study}))
    return path


ARMS = {"a": {}, "b": {"model.depth": 3}}


def test_arms_are_the_shared_settings_and_their_own(tmp_path, base):
    arms = {"a": None, "b": {"model": {"depth": 3}, "optimizer.lr": 0.5}}
    study = plan_study(study_file(tmp_path, base, {"arms": arms, "seeds": [3, 7], "baseline": "b"}))
    assert [run.name for run in study.runs] == ["a, seed 3", "b, seed 3", "a, seed 7", "b, seed 7"]
    assert study.baseline.name == "b" and study.arms["b"].differing == {}
    assert study.arms["a"].differing == {"model.depth": (3, 2), "optimizer.lr": (0.5, 1e-3)}
    assert study.arms["b"].written == {"model.depth": 3, "optimizer.lr": 0.5}
    config = study.arms["b"].runs[1].config
    assert (config.seed, config.model.depth, config.output) == (7, 3, str(tmp_path / "out" / "b" / "seed_7"))
    assert [*study.tested] == ["validation_loss", "validation_error"] and study.config.seeds == (3, 7)


def test_axes_are_crossed(tmp_path, base):
    named = {
        "flow": {"diffusion": {"prediction": "x0"}},
        "ε": {"diffusion": {"schedule": "linear", "prediction": "epsilon"}},
    }
    study = plan_study(study_file(tmp_path, base, {"axes": {"model.depth": [1, 2], "objective": named}, "seeds": 2}))
    assert [*study.arms] == ["depth=1, flow", "depth=1, ε", "depth=2, flow", "depth=2, ε"]
    assert study.arms["depth=2, ε"].config.diffusion.schedule == "linear"
    assert [*study.tested] == ["validation_error"]
    assert "validation_loss" in study.untested and "diffusion.schedule" in study.untested["validation_loss"]


def test_a_budget_is_equal_for_all_arms(tmp_path, base):
    def steps(budget: dict, arms: dict) -> list[int]:
        study = plan_study(study_file(tmp_path, base, {"arms": arms, "budget": budget}))
        return [arm.config.train.steps for arm in study.arms.values()]

    arms = {"a": {}, "b": {"train.batch_size": 8, "model.depth": 3}}
    assert steps({}, arms) == [4, 4] and steps({"steps": 9}, arms) == [9, 9]
    assert steps({"images": 30}, arms) == [8, 4]
    configs = [arm.config for arm in plan_study(study_file(tmp_path, base, {"arms": arms})).arms.values()]
    flops = 10.5 * step_flops(configs[0])
    assert steps({"flops": flops}, arms) == [10, math.floor(flops / step_flops(configs[1]))]
    assert step_flops(configs[1]) > 2 * step_flops(configs[0])
    spent = {"arms": arms, "budget": {"images": 30}, "spent": {"b": 14}}
    study = plan_study(study_file(tmp_path, base, spent))
    assert [arm.config.train.steps for arm in study.arms.values()] == [8, 2]
    assert "b has spent 14 images of its budget before its first step" in write_report(read_results(study))


WRONG = [
    ({"arms": ARMS, "nope": 1}, r"mine\.yaml:\d+: unknown key 'study.nope'"),
    ({}, "there are no arms; expected `arms`"),
    ({"arms": ARMS, "axes": {"model.depth": [1]}}, "got both arms and axes"),
    ({"arms": {"a": {}}}, "got one arm, 'a'; expected at least two"),
    ({"arms": {"a": {}, "b": {"model.dept": 3}}}, r"arm 'b': .*unknown key 'model.dept'; did you mean 'model.depth'"),
    ({"arms": {"a": {}, "b": {}}}, "the arms 'a' and 'b' have equal settings; remove one, or set study.null to true"),
    ({"arms": {"a": {}, "b": {"model": {"depth": 3}, "model.depth": 4}}}, "model.depth conflicts with model.depth"),
    ({"arms": {"a": {}, "b": 3}}, "arm 'b': got 3, expected settings"),
    ({"arms": {"a": {}, "b": {"seed": 3}}}, "arm 'b': seed is the same for all arms"),
    ({"arms": {"a b": {}, "a-b": {"model.depth": 3}}}, "the arms 'a-b' and 'a b' would share a folder"),
    ({"axes": {"model.depth": 3}}, r"study\.axes\.model\.depth: got 3, expected a list of values"),
    ({"axes": {"model.depth": [1, 2], "x": {"y": {"model.depth": 3}}}}, "two axes set model.depth"),
    ({"arms": ARMS, "seeds": 1}, "got one seed, but an interval needs two at least"),
    ({"arms": ARMS, "seeds": 0}, r"study\.seeds: got \[\], expected at least one"),
    ({"arms": ARMS, "seeds": [1, 1]}, "each once"),
    ({"arms": ARMS, "budget": {"steps": 0}}, r"study\.budget\.steps: got 0, expected at least 1"),
    ({"arms": ARMS, "budget": {"steps": 1, "images": 3}}, "got several of steps, images and flops"),
    ({"arms": ARMS, "budget": {"flops": 1}}, "less than one step of arm 'a'"),
    ({"arms": {"a": {}, "b": {"train.steps": 9}}}, "the arms take different train.steps"),
    ({"arms": ARMS, "spent": {"a": 3}}, r"study\.spent: set study\.budget"),
    ({"arms": ARMS, "budget": {"steps": 5}, "spent": {"a": 5}}, "got 5 without the 5 that it has spent"),
    ({"arms": ARMS, "budget": {"steps": 5}, "spent": {"c": 5}}, "there is no arm 'c'"),
    ({"arms": ARMS, "baseline": "c"}, "there is no arm 'c'"),
    ({"arms": ARMS, "planted": "a"}, "'a' is the baseline"),
    ({"arms": ARMS, "metrics": ["validation_eror"]}, "did you mean 'validation_error'"),
    ({"arms": ARMS, "margin": {"fid": 1}}, r"study\.margin: the runs compute no 'fid'"),
    ({"arms": {"a": {}, "b": {"diffusion.prediction": "v"}}, "metrics": ["validation_loss"]}, "prediction differ;"),
    ({"arms": {"a": {}, "b": {"data.validation": 0.5}}}, "nothing can be compared: .*data.validation differ"),
]  # fmt: skip


@pytest.mark.parametrize(("study", "message"), WRONG)
def test_a_wrong_study_is_one_line_before_any_training(tmp_path, base, study, message):
    file = study_file(tmp_path, base, study)
    with pytest.raises(InputError, match=message) as error:
        plan_study(file)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_no_metric_no_output_and_no_section_are_told(tmp_path, base):
    with pytest.raises(InputError, match="the runs compute no metric"):
        plan_study(study_file(tmp_path, base, {"arms": ARMS}, train__validate_every=0))
    file = study_file(tmp_path, base, {"arms": ARMS})
    without = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({key: value for key, value in without.items() if key != "output"}))
    with pytest.raises(InputError, match="output: got None, expected a folder"):
        plan_study(file)
    file.write_text(yaml.safe_dump(base))
    with pytest.raises(InputError, match="study: got None, expected a section"):
        plan_study(file)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_studies_that_come_with_pixart_are_complete(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "\nstudy:" not in file.read_text():
        return  # the first stage of one
    study = plan_study(file)
    assert study.config.planted in study.arms and len(study.config.seeds) >= 3 and study.config.margin
    assert file.stem in (file.parent / "README.md").read_text()


def test_equal_arms_are_allowed_for_a_null_study(tmp_path, base):
    study = plan_study(study_file(tmp_path, base, {"arms": {"a": {}, "b": {}}, "null": True}))
    assert study.config.null and study.arms["b"].differing == {}


def test_shuffled_captions_are_all_anothers_and_the_same_in_every_run():
    records = [Record(str(i), Path(f"{i}.png"), (f"caption {i}",), (1.0,), None, 8, 8) for i in range(50)]
    found = exchange_captions(records, 0)
    assert [record.id for record in found] == [record.id for record in records]
    assert sorted(record.captions for record in found) == sorted(record.captions for record in records)
    assert all(a.captions != b.captions for a, b in zip(records, found, strict=True))
    assert exchange_captions(records, 0) == found != exchange_captions(records, 1)


# ------------------------------------------------------------------------------------------------------------- reports


def pretend(study, values: dict[str, list[float | None]]) -> None:
    """Write the folders that runs with these last errors would have left; None is a run that failed."""
    for arm, errors in values.items():
        for run, error in zip(study.arms[arm].runs, errors, strict=True):
            run.folder.mkdir(parents=True)
            if error is None:
                write_json(run.folder / "failed.json", {"reason": "the disk is full"})
                continue
            data = replace(run.config.data, split_seed=0, draws="by_name")  # as training settles them
            write_text(run.folder / "config.yaml", dump_yaml(replace(run.config, data=data)))
            write_declarations(run.folder, open_metrics(run.config))
            rows = [{"step": 2, "images": 8, "loss": 1.0, "gpu_hours": 0.5, "images_per_second": 3.0, "memory_gb": 1.0}]
            rows += [{"step": step, "validation_error": error + 2 / step, "validation_loss": 0.5} for step in (2, 4)]
            append_rows(run.folder / "metrics.jsonl", rows)
            write_json(run.folder / "finished.json", {"seconds": 1, "revision": "abc"})


def test_the_report_says_what_the_numbers_say(tmp_path, base, capsys):
    arms = {"a": {}, "b": {"model.depth": 3, "optimizer.lr": 0.1}, "planted": {"data.shuffle_captions": True}}
    margin = {"validation_error": 0.5}
    study = plan_study(
        study_file(tmp_path, base, {"arms": arms, "planted": "planted", "margin": margin, "metrics": [*margin]})
    )
    values = {"a": [1.0, 2.0, 3.0], "b": [1.1, 2.2, 3.0], "planted": [1.9, 3.0, None]}
    pretend(study, values)
    results = read_results(study)
    text = write_report(results, ["mine.yaml"])
    assert text == (tmp_path / "out" / "report.md").read_text()
    assert "8 of 9 runs are finished" in text and "'planted', seed 2, failed: the disk is full" in text
    assert "'b' changes 2 settings at once (model.depth, optimizer.lr): none alone explains it" in text
    reference = stats.ttest_rel(values["b"], values["a"])
    low, high = reference.confidence_interval(0.95)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    b, planted = record["comparisons"]
    assert (b["mean"], b["low"], b["high"], b["p"]) == pytest.approx((0.1, low, high, reference.pvalue))
    assert b["verdict"] == "no difference shown; at most 0.5 worse" and b["seeds"] == [0, 1, 2]
    assert f"| b | validation_error | 3 | +0.1 | {low:+.3g} … {high:+.3g} |" in text
    # two pairs, whose interval is wide, but not as wide as their difference
    assert planted["seeds"] == [0, 1] and planted["low"] > 0 and planted["p_holm"] == pytest.approx(2 * planted["p"])
    assert planted["verdict"].startswith("worse, but") == (planted["p_holm"] > 0.05) and record["planted_was_found"]
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [row["status"] for row in rows if row["arm"] == "planted"] == ["finished"] * 2 + ["failed: the disk is full"]
    # the last value of b, seed 1, and its better one
    assert [float(row["validation_error"]) for row in rows if (row["arm"], row["seed"]) == ("b", "1")] == [2.7]
    mean = mean_over_seeds([1.5, 2.5, 3.5], 0.95)
    assert f"2.5 $\\pm$ {mean.high - 2.5:.2g}" in (tmp_path / "out" / "table.tex").read_text()
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    said = compare_runs([run.folder for arm in ("a", "b") for run in study.arms[arm].runs])
    half = mean_over_seeds([1.6, 2.7, 3.5], 0.95).high - 2.6
    assert f"| 0.5 ± 0 | +0 (+0 … +0) | 2.6 ± {half:.2g} | +0.1 ({low:+.3g} … {high:+.3g}) |" in said


def test_identical_arms_and_no_results_at_all_are_reported(tmp_path, base):
    study = plan_study(study_file(tmp_path, base, {"arms": {"a": {}, "b": {}}, "null": True, "seeds": 2}))
    assert "No pair of runs of one seed is finished yet." in write_report(read_results(study))
    pretend(study, {"a": [1.0, 2.0], "b": [1.0, 2.0]})
    text = write_report(read_results(study))
    assert "- **b**, validation_error: +0 (+0 … +0): identical in every seed." in text
    assert "All arms have the same settings." in text


# ---------------------------------------------------------------------------------------------------------------- runs

BROKEN = """
from pixart.diffusion.objective import OBJECTIVES, Denoising

@OBJECTIVES.register("broken")
class Broken(Denoising):
    def forward(self, network, example):
        raise RuntimeError("this idea does not work")
"""


def test_a_study_trains_reports_and_goes_on(tmp_path, base):
    (tmp_path / "broken.py").write_text(BROKEN)
    arms = {"a": {}, "broken": {"objective.name": "broken"}}
    file = study_file(
        tmp_path, base, {"arms": arms, "seeds": [4], "confidence": None, "metrics": ["validation_error"]},
        extensions=["broken.py"],
    )  # fmt: skip
    dry = run_command("study", file, "--dry-run")
    assert dry.returncode == 0 and not (tmp_path / "out").exists()
    assert re.search(r"\| a \| 1 of 1 \| 0\.10\d+ M \|", dry.stdout) and "baseline: a" in dry.stdout
    done = run_command("study", file, "--jobs", 2)
    assert done.returncode == 1, done.stderr
    assert "broken, seed 4: failed" in done.stdout and "this idea does not work" in done.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 of 2 runs are finished" in report and "'broken', seed 4, failed: " in report
    # an arm is added, the broken one is taken out; what is finished is not trained again
    log = tmp_path / "out" / "a" / "seed_4" / "training.log"
    before = log.read_bytes()
    file = study_file(tmp_path, base, {"arms": ARMS, "seeds": [4], "confidence": None}, extensions=["broken.py"])
    done = run_command("study", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs: 1 finished, 1 to train here" in done.stdout and log.read_bytes() == before
    assert "one seed, so no interval" in done.stdout
    # other settings under the same name are no part of this study
    changed = run_command("study", file, "optimizer.lr=0.5")
    assert (
        changed.returncode == 2
        and "a, seed 4 was begun with other settings (optimizer.lr 0.001 → 0.5)" in changed.stderr
    )
    trained = run_command("train", file)
    assert trained.returncode == 2 and "is a study" in trained.stderr and "pixart study" in trained.stderr


TIMES = {"gpu_hours", "images_per_second", "memory_gb", "versions", "study"}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return value


@pytest.mark.slow
def test_a_study_killed_three_times_gives_the_report_of_one_left_alone(tmp_path, base):
    records = []
    for name, kills in (("alone", 0), ("killed", 3)):
        folder = tmp_path / name
        folder.mkdir()
        file = study_file(folder, base, {"arms": ARMS, "seeds": 2}, train__steps=20, train__validate_every=10)
        for kill in range(kills):
            process = subprocess.Popen(command("study", file), env=environment(), stdout=subprocess.DEVNULL)
            # in the middle of the run number `kill`: its first checkpoints are there
            run = [*plan_study(file).runs][kill].folder
            deadline = time.monotonic() + 120
            while not [*run.glob("checkpoints/step_*")] and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = run_command("study", file)
        assert done.returncode == 0, done.stdout + done.stderr
        records.append(without_times(json.loads((folder / "out" / "results.json").read_text())))
    assert records[0] == records[1]
    assert records[0]["arms"]["b"]["runs"]["1"]["status"] == "finished"


@pytest.mark.slow
def test_an_interrupted_study_saves_and_says_so(tmp_path, base):
    file = study_file(tmp_path, base, {"arms": ARMS, "seeds": 2}, train__steps=4000)
    process = subprocess.Popen(
        command("study", file), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = plan_study(file).runs[0].folder
    deadline = time.monotonic() + 120
    while not [*run.glob("checkpoints/step_*")] and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 75, out + error
    assert "trainings are saved, and the same command goes on" in error
    assert "stopped by a signal; saved at step" in (run / "training.log").read_text()
    assert not (run / "failed.json").exists() and not (run / "finished.json").exists()
