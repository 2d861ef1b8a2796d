"""What a run logs, compared with what it did."""

import hashlib
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pixart.diffusion.objective as objective_module
import pixart.train.log as log_module
import pixart.train.loop as loop_module
from pixart.config import load_config
from pixart.diffusion.objective import TrainingModule
from pixart.diffusion.timestep_bins import bin_means, sum_by_bin
from pixart.errors import InputError
from pixart.files import read_rows
from pixart.model import PixArt
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes
from pixart.train.log import read_gpu_hours
from pixart.train.loop import train
from pixart.train.setup import make_accelerator
from pixart.train.state import Progress
from pixart.train.step import StepResult
from pixart.train.throughput import measure_peak
from runs import build


def rows(run: Path) -> list[dict]:
    return list(read_rows(run / "metrics.jsonl"))


def read(run: Path, name: str) -> dict:
    return json.loads((run / name).read_text())


def test_losses_in_timestep_bins_are_those_of_a_direct_count(base, monkeypatch):
    original, seen = TrainingModule.forward, []

    def spy(module, example):
        losses = original(module, example)
        seen.extend(zip(example.time.tolist(), losses["loss"].tolist(), strict=True))
        return losses

    monkeypatch.setattr(TrainingModule, "forward", spy)
    run = train(build(base, train__log_every=3, train__accumulation=2)).run
    for row, pictures in zip(rows(run), (seen[:12], seen[12:]), strict=True):
        for i in range(4):
            inside = [loss for time, loss in pictures if i / 4 <= time < (i + 1) / 4]
            if inside:
                assert row[f"loss_q{i + 1}"] == pytest.approx(sum(inside) / len(inside), rel=1e-5)
            else:
                assert f"loss_q{i + 1}" not in row
        assert row["loss"] == pytest.approx(sum(loss for _, loss in pictures) / 12, rel=1e-5)


def test_an_image_without_weight_counts_in_no_bin_even_if_its_loss_is_not_finite():
    losses, time = torch.tensor([1.0, math.nan, 3.0, 5.0]), torch.tensor([0.0, 0.1, 0.99999, 0.99999])
    sums = sum_by_bin(losses, time, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert sums.tolist() == [[1, 0, 0, 8], [1, 0, 0, 2]]
    assert bin_means(sums, "loss") == {"loss_q1": 1.0, "loss_q4": 4.0}


def test_model_tflops_are_those_of_the_batches_and_mfu_their_share_of_the_peak(base, monkeypatch):
    forward, shapes = TrainingModule.forward, []

    def spy(module, example):
        shapes.append(example.inputs["caption"].shape[:2])
        return forward(module, example)

    monkeypatch.setattr(TrainingModule, "forward", spy)
    config = build(base, train__log_every=6, train__peak_tflops=0.5)
    (row,) = rows(train(config).run)
    flops = 0
    for count, length in shapes:
        with torch.device("meta"):
            inputs = torch.empty(count, 3, 8, 8), torch.empty(count), torch.empty(count, length, 16)
            with FlopCounterMode(display=False) as counter:
                PixArt(config.model)(*inputs)
        flops += 3 * counter.get_total_flops()
    seconds = sum(count for count, _ in shapes) / row["images_per_second"]
    assert row["model_tflops"] == pytest.approx(flops / seconds / 1e12, rel=1e-5)
    assert row["mfu"] == pytest.approx(row["model_tflops"] / 0.5)
    assert 0 < row["memory_gb"] < 64
    assert 0 <= row["data_wait"] < 1


def test_a_window_counts_applied_steps_and_the_seconds_that_were_trained(base, monkeypatch):
    config, clock = build(base), [100.0]
    accelerator = make_accelerator(config)
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: clock[0])
    run = Path(base["output"])
    run.mkdir()
    with log_module.Watch(Processes(accelerator, 9), accelerator, config, run, Progress(step=3)) as watch:
        for loss, outcome, images in ((2.0, 0, 8), (1e9, 2, 8), (4.0, 0, 6), (math.nan, 1, 2)):
            loss, norm, *numbers = (torch.tensor(float(value)) for value in (loss, loss / 2, images, outcome))
            terms, quarters = {"loss": loss, "term": 2 * loss}, torch.full((2, 4), 1.0 + outcome)
            watch.add(StepResult(terms, norm, *numbers, quarters), wait=0.5, flops=0)
        clock[0] += 10.0
        watch.pause(6.0)
        watch.log(Progress(step=3), 0.1, {})
    (row,) = rows(run)
    assert (row["loss"], row["term"], row["grad_norm"], row["loss_q1"]) == (3.0, 6.0, 1.5, 1.0)
    assert row["images_per_second"] == pytest.approx(24 / 4) and row["data_wait"] == pytest.approx(2.0 / 4)


def test_a_measured_peak_is_said_and_is_what_a_product_reaches(base, capsys):
    run = train(build(base, train__steps=1, train__peak_tflops="measure")).run
    assert "measured here in torch.float32" in capsys.readouterr().out
    summary = read(run, "summary.json")
    assert summary["peak_is"] == "measured" and summary["peak_tflops"] > 0
    assert rows(run)[0]["mfu"] == pytest.approx(rows(run)[0]["model_tflops"] / summary["peak_tflops"])
    left = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(5):
        left @ left
    reached = 5 * 2 * 1024**3 / (time.perf_counter() - start) / 1e12
    assert reached / 5 < measure_peak(torch.device("cpu"), torch.float32) < reached * 5


def test_a_peak_that_is_neither_a_number_nor_measure_is_refused(base):
    with pytest.raises(InputError, match=r"train.peak_tflops: got 'guess', expected a number or measure"):
        build(base, train__peak_tflops="guess")
    with pytest.raises(InputError, match=r"train.peak_tflops: got -1.0"):
        build(base, train__peak_tflops=-1)


def test_a_finished_run_leaves_a_summary_and_a_last_heartbeat(base):
    config = build(base, data__validation=0.3, train__validate_every=2, train__batch_size=2)
    run = train(config).run
    summary, beat, last = read(run, "summary.json"), read(run, "heartbeat.json"), rows(run)
    validations = {row["step"]: row["validation_loss"] for row in last if "validation_loss" in row}
    best = min(validations, key=validations.get)
    assert summary["finished"] and summary["why"] == "finished"
    assert (summary["step"], summary["steps"], summary["images"], summary["skipped"]) == (6, 6, 12, 0)
    assert summary["loss"] == [row["loss"] for row in last if "loss" in row][-1]
    assert summary["validation_loss"] == validations[6]
    assert (summary["best_validation_loss"], summary["best_validation_loss_step"]) == (validations[best], best)
    errors = {row["step"]: row["validation_error"] for row in last if "validation_error" in row}
    assert summary["best_validation_error"] == min(errors.values())
    assert summary["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert summary["seconds"] / 3600 <= summary["gpu_hours"]
    assert (beat["step"], beat["steps"], beat["loss"]) == (6, 6, summary["loss"])
    assert abs(beat["time"] - time.time()) < 60
    assert not list(run.glob("*.part*")) and not list(run.glob(".*"))
    assert summary["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    settled = replace(config, data=replace(config.data, split_seed=0, draws="by_name"))
    assert load_config(TrainConfig, run / "config.yaml") == settled


def test_a_stopped_run_says_so_and_its_continuation_replaces_that(base, monkeypatch):
    original = loop_module.train_step

    def step(state, *arguments):
        if state.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "train_step", step)
        run = train(build(base)).run
    summary = read(run, "summary.json")
    assert (summary["finished"], summary["why"], summary["step"]) == (False, "stopped by a signal", 3)
    before = read_gpu_hours(run)
    assert before > 0
    train(build(base))
    summary = read(run, "summary.json")
    assert (summary["finished"], summary["step"]) == (True, 6)
    assert summary["gpu_hours"] > before


def test_training_runs_in_any_thread_and_leaves_signals_alone_outside_the_main_one(base):
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(train(build(base))))
    thread.start()
    thread.join()
    assert found and found[0].finished
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_run_says_why_and_no_summary_of_an_earlier_start_stays(base, monkeypatch):
    monkeypatch.setattr(objective_module, "diffusion_loss", lambda *a: {"loss": a[2].flatten(1).mean(1) * math.nan})
    with pytest.raises(InputError):
        train(build(base, train__steps=20))
    run = Path(base["output"])
    summary = read(run, "summary.json")
    assert not summary["finished"] and summary["why"].startswith("InputError: 10 steps in a row were not finite")
    assert (summary["step"], summary["skipped"], summary["loss"]) == (10, 10, None)

    def killed(*_):
        assert not (run / "summary.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_module, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(build(base, train__steps=20))
    assert read(run, "summary.json")["why"] == "KeyboardInterrupt"


def test_the_heart_beats_between_logging_points(base, monkeypatch):
    monkeypatch.setattr(log_module, "BEAT", 0)
    original, beats = loop_module.train_step, []

    def step(*arguments):
        beats.append(read(Path(base["output"]), "heartbeat.json"))
        return original(*arguments)

    monkeypatch.setattr(loop_module, "train_step", step)
    train(build(base, train__log_every=4))
    assert [beat["step"] for beat in beats] == [0, 1, 2, 3, 4, 5]
    assert [beat["loss"] is None for beat in beats] == [True] * 4 + [False] * 2


def test_small_files_that_cannot_be_written_cost_a_warning_not_the_run(base, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_module, "append_rows", full)
    monkeypatch.setattr(log_module, "write_json", full)
    assert train(build(base)).finished
    text = capsys.readouterr()
    assert (text.out + text.err).count("metrics.jsonl could not be written ([Errno 28] No space left on device)") == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"gpu_hours": "Infinity"}', '{"gpu_hours": -1}', '{"gpu_hours": null}'])
def test_a_damaged_heartbeat_is_told_and_blocks_no_start(base, capsys, text):
    run = train(build(base)).run
    hours = rows(run)[-1]["gpu_hours"]
    capsys.readouterr()
    (run / "heartbeat.json").write_text(text)
    assert train(build(base, train__steps=8)).step == 8
    said = capsys.readouterr().out
    assert "heartbeat.json: cannot be read" in said and f"device-hours continue from {hours:.4g}" in said
    assert read(run, "heartbeat.json")["gpu_hours"] > hours
