"""Training: it learns, survives interruptions, and gives the right numbers."""

import json
import math
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pixart.diffusion.objective as objective_module
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.errors import InputError
from pixart.train.config import OptimizerConfig
from pixart.train.ema import ema_decay, make_ema, update_ema
from pixart.train.loop import train
from pixart.train.optimizer import learning_rate, make_optimizer
from pixart.train.signals import REQUEUE
from runs import build, command, environment, make_pictures, run_command, write


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[tuple]:
    """What must repeat exactly: everything but the clock's."""
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("lr")) for row in metrics(run)]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, averages, optimizer."""
    found = {}
    for name in ("model", "ema"):
        weights = load_file(checkpoint / name / "model.safetensors")
        found.update({f"{name}.{key}": value for key, value in weights.items()})
    for path in sorted(checkpoint.glob("optimizer-*.safetensors")):
        found.update({f"optimizer.{path.name}.{key}": value for key, value in load_file(path).items()})
    return found


def assert_same_run(one: Path, other: Path, step: int) -> None:
    first, second = (tensors(run / "checkpoints" / f"step_{step:08d}") for run in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert numbers(one) == numbers(other)


def test_training_overfits_one_batch(base):
    result = train(build(
        base, train__steps=300, data__every=2, train__log_every=10, train__save_every=0, optimizer__lr=5e-3,
        optimizer__schedule="cosine", train__caption_dropout=0.0,
    ))  # fmt: skip
    losses = [row["loss"] for row in metrics(result.run)]
    assert losses[-1] < 0.06 * losses[0]


def test_a_run_leaves_what_it_should(base):
    result = train(build(
        base, train__trackers=["tensorboard"], train__sample_every=4, prompts=["a red square, number 0"],
        data__validation=0.3, train__validate_every=3, train__batch_size=2,
    ))  # fmt: skip
    assert result.finished
    assert {p.name for p in (result.run / "samples").iterdir()} == {"step_00000004.png", "step_00000006.png"}
    assert [p.name for p in checkpoints(result.run)] == ["step_00000002", "step_00000004", "step_00000006"]
    assert list(result.run.rglob("events.out.tfevents*"))
    assert (result.run / "config.yaml").exists()
    rows = metrics(result.run)
    validations = [row for row in rows if "validation_loss" in row]
    assert len(validations) == 2
    parts = [row for row in validations[0] if re.fullmatch(r"validation_loss_q[1-4]", row)]
    assert parts and all(math.isfinite(validations[0][name]) for name in parts)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"images_per_second", "data_wait", "grad_norm", "lr"} <= rows[0].keys()


def test_the_oldest_checkpoints_go(base):
    result = train(build(base, train__keep=2, train__save_every=1))
    assert [p.name for p in checkpoints(result.run)] == ["step_00000005", "step_00000006"]


def test_a_killed_run_goes_on_bit_for_bit(base, tmp_path):
    # eight images a batch of three: the kill falls into the middle of an epoch
    changes = {"train__steps": 40, "train__batch_size": 3, "train__save_every": 7, "train__keep": 9}
    config = write(tmp_path / "config.yaml", base, **changes)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        command("train", config, f"output={killed}"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while time.time() < deadline and not (killed / "checkpoints" / "step_00000014").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert checkpoints(killed)[-1].name < "step_00000040"
    again = run_command("train", config, f"output={killed}")
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert run_command("train", config, f"output={whole}").returncode == 0
    assert_same_run(killed, whole, 40)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_saves_and_leaves_cleanly(base, tmp_path, number):
    config = write(tmp_path / "config.yaml", base, train__steps=100_000, train__save_every=0)
    run = Path(base["output"])
    process = subprocess.Popen(
        command("train", config), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 120
    while time.time() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, errors
    assert "stopped by a signal; saved" in output
    last = metrics(run)[-1]["step"]
    assert newest_checkpoint(run, pytest.fail).name == f"step_{last:08d}"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(base, capsys):
    whole = train(build(base)).run
    damaged = Path(base["output"]).with_name("damaged")
    shutil.copytree(whole, damaged)
    weights = damaged / "checkpoints" / "step_00000006" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train(build(base, output=str(damaged)))
    text = capsys.readouterr().out
    assert "step_00000006 is damaged (model/model.safetensors has changed" in text
    assert "resuming from" in text and "step_00000004" in text
    assert_same_run(whole, damaged, 6)


def test_a_full_disk_ends_with_one_error_and_loses_nothing(base, tmp_path):
    config = write(tmp_path / "config.yaml", base)
    run = Path(base["output"])
    assert run_command("train", config, "train.steps=2").returncode == 0
    before = tensors(run / "checkpoints" / "step_00000002")
    # files may not grow past 20 KB: writing fails inside the checkpoint, as on a full disk
    full = run_command(
        "train",
        config,
        "train.steps=6",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
    )
    assert full.returncode == 2
    assert "warning: step 4 could not be saved" in full.stdout + full.stderr
    error = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "step 6 could not be saved" in error[0]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"]
    after = tensors(run / "checkpoints" / "step_00000002")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run_command("train", config, "train.steps=6").returncode == 0


def test_accumulation_changes_no_number(base):
    plain = {"optimizer__name": "sgd", "optimizer__lr": 1.0, "optimizer__clip": 1e9, "optimizer__warmup": 0,
             "optimizer__weight_decay": 0.0, "train__steps": 2}  # fmt: skip
    runs = {n: train(build(base, **plain, train__accumulation=n, output=f"{base['output']}{n}")).run for n in (1, 2, 4)}
    reference = tensors(checkpoints(runs[1])[-1])
    start = next(row for row in metrics(runs[1]))
    for n in (2, 4):
        other = tensors(checkpoints(runs[n])[-1])
        for name in reference:
            if name.startswith("model."):
                assert torch.allclose(other[name], reference[name], rtol=1e-4, atol=1e-5), (n, name)
        row = next(row for row in metrics(runs[n]))
        assert row["loss"] == pytest.approx(start["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(start["grad_norm"], rel=1e-5)


def test_gradient_checkpointing_and_workers_change_no_number(base):
    reference = train(build(base)).run
    for name, changes in {
        "a": {"train__gradient_checkpointing": True},
        "b": {"data__workers": 2},
        "c": {"data__cache": True},
    }.items():
        other = train(build(base, **changes, output=f"{base['output']}{name}")).run
        assert_same_run(reference, other, 6)


def test_a_non_finite_step_is_skipped_and_counted(base, monkeypatch):
    original, calls = objective_module.diffusion_loss, []

    def poisoned(*arguments):
        losses = original(*arguments)
        calls.append(1)
        return {**losses, "loss": losses["loss"] * math.nan} if len(calls) == 3 else losses

    monkeypatch.setattr(objective_module, "diffusion_loss", poisoned)
    result = train(build(base, train__save_every=1, train__keep=9))
    before, after = (tensors(result.run / "checkpoints" / f"step_0000000{i}") for i in (2, 3))
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert all(torch.isfinite(value).all() for value in tensors(checkpoints(result.run)[-1]).values())
    assert [row["skipped"] for row in metrics(result.run)] == [0, 0, 1, 1, 1, 1]
    assert "loss" not in metrics(result.run)[2]


def test_ten_non_finite_steps_in_a_row_stop_the_run(base, monkeypatch):
    monkeypatch.setattr(objective_module, "diffusion_loss", lambda *a: {"loss": a[2].flatten(1).mean(1) * math.nan})
    with pytest.raises(InputError, match="10 steps in a row were not finite, the last at step 10"):
        train(build(base, train__steps=50))


def spoil(picture: Path) -> None:
    """Cut a PNG within its pixels: the header stays good, so only decoding shows it."""
    content = picture.read_bytes()
    start = content.index(b"IDAT") + 6
    picture.write_bytes(content[:start] + bytes(8) + content[start + 8 :])


def test_an_image_that_cannot_be_decoded_is_skipped_named_and_counted(base, tmp_path, capsys):
    folder = make_pictures(tmp_path / "spoilt")
    spoil(folder / "03.png")
    result = train(build(base, data__folder=str(folder)))
    text = capsys.readouterr()
    assert "warning: 03.png: unreadable" in text.out + text.err
    state = torch.load(checkpoints(result.run)[-1] / "training.pt", weights_only=True)
    assert list(state["progress"]["unreadable"]) == ["03.png"]
    spoil(folder / "05.png")
    with pytest.raises(InputError, match=r"2 of 8 images are unreadable, more than 1 %(.|\n)*05.png"):
        train(build(base, data__folder=str(folder), output=f"{base['output']}2"))


def test_learning_rates_follow_their_closed_forms():
    warm = OptimizerConfig(lr=2.0, warmup=4, schedule="constant")
    assert [learning_rate(warm, i, 10, 64) for i in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    linear = OptimizerConfig(lr=2.0, warmup=0, schedule="linear", final_lr=0.5)
    assert [learning_rate(linear, i, 4, 64) for i in range(5)] == [2.0, 1.75, 1.5, 1.25, 1.0]
    cosine = OptimizerConfig(lr=2.0, warmup=2, schedule="cosine")
    assert learning_rate(cosine, 6, 10, 64) == pytest.approx(1.0)
    assert learning_rate(cosine, 10, 10, 64) == pytest.approx(0.0)


def test_auto_lr_is_the_root_of_the_batch_over_256_and_a_schedule_begins_after_the_warm_up():
    auto = OptimizerConfig(lr=2.0, auto_lr="sqrt", warmup=2, schedule="linear")
    assert [learning_rate(auto, i, 6, 64) for i in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert learning_rate(auto, 2, 6, 1024) == pytest.approx(4.0)


def test_the_logged_rate_is_that_of_the_logged_step(base):
    run = train(build(base, optimizer__warmup=3, optimizer__lr=0.3, optimizer__schedule="linear")).run
    assert [row["lr"] for row in metrics(run)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.2, 0.1])


def test_the_ema_follows_its_closed_form():
    model = torch.nn.Linear(3, 2)
    start = model.weight.detach().clone()
    ema = make_ema(model)
    values = []
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        values.append(model.weight.detach().clone())
        update_ema(ema, model, 0.8, torch.tensor(True))
        update_ema(ema, model, 0.8, torch.tensor(False))
    expected = start * 0.8**5 + sum(0.2 * 0.8 ** (4 - i) * value for i, value in enumerate(values))
    assert torch.allclose(ema.weight, expected, rtol=1e-6)
    assert [ema_decay(0.5, step, warmup=True) for step in (0, 2, 100)] == [0.1, 0.25, 0.5]
    half = torch.nn.Linear(3, 2).half()
    average = make_ema(half)
    assert average.weight.dtype == torch.float32
    update_ema(average, half, 0.9, torch.tensor(True))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactorbv"])
def test_optimizers_go_by_name(base, name):
    result = train(build(base, optimizer__name=name, train__steps=3))
    losses = [row["loss"] for row in metrics(result.run)]
    assert len(losses) == 3 and all(math.isfinite(value) for value in losses)


def test_unknown_optimizers_and_options_are_refused():
    parameter = {"weight": torch.nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(InputError, match="no 'adamx'; similar names:"):
        make_optimizer(parameter, OptimizerConfig(name="adamx"))
    with pytest.raises(InputError, match="does not accept its options"):
        make_optimizer(parameter, OptimizerConfig(name="sgd", options={"nonsense": 1.0}))


def test_bf16_trains(base):
    result = train(build(base, train__mixed_precision="bf16"))
    exact = train(build(base, output=f"{base['output']}32"))
    low, full = (metrics(run.run)[-1]["loss"] for run in (result, exact))  # the first output is 0 in both
    assert low != full
    assert low == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data__folder": "/nowhere/at/all"}, "no such folder"),
        ({"model__in_channels": 4}, "in_channels is 4.*set it to 3"),
        ({"model__latent_size": 16}, "set it to 8"),
        ({"model__caption_channels": 32}, "states of width 16"),
        ({"train__batch_size": 16}, "lower batch_size"),
        ({"train__batch_size": 3, "train__accumulation": 2}, "not a multiple"),
        ({"train__mixed_precision": "fp16"}, "needs a GPU"),
        ({"train__trackers": ["tensorbord"]}, "no 'tensorbord'"),
        ({"train__sample_every": 2}, "no prompts"),
        ({"train__validate_every": 2}, "there are no held-out images"),
        ({"model__learn_sigma": True}, "no variance to learn"),
        ({"text__length": 13}, "more than model.caption_length"),
        ({"text__model": "nowhere/near"}, "cannot be loaded"),
        ({"sample__sampler": "ddim"}, "does not fit this model's schedule"),
        ({"data__resolution": 16}, "latent_size is 8"),
    ],
)
def test_an_impossible_run_is_refused_before_any_work(base, changes, match):
    if "mixed_precision" in str(changes) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=match):
        train(build(base, **changes))
    assert not list(Path(base["output"]).rglob("*.safetensors"))


def test_a_folder_with_another_run_is_not_overwritten(base):
    run = train(build(base)).run
    with pytest.raises(InputError, match=r"another configuration \(optimizer.lr: 0.001 → 0.5\)"):
        train(build(base, optimizer__lr=0.5))
    with pytest.raises(InputError, match="already holds a run"):
        train(build(base, resume="never"))
    assert train(build(base, train__steps=8)).step == 8, "but a longer run goes on"
    assert checkpoints(run)[-1].name == "step_00000008"


def test_changed_settings_of_a_run_are_reported_and_recorded(base, tmp_path, capsys):
    cosine = build(base, optimizer__schedule="cosine")
    run = train(cosine).run
    capsys.readouterr()
    train(build(base, optimizer__schedule="cosine"))
    assert "changed" not in capsys.readouterr().out.replace(str(tmp_path), "")  # whose name is the test's
    longer = build(base, optimizer__schedule="cosine", train__steps=8, data__cache=True)
    train(longer)
    was, now = (learning_rate(c.optimizer, 6, c.train.steps, 4) for c in (cosine, longer))
    text = capsys.readouterr().out
    assert "changed: train.steps 6 → 8" in text
    assert f"the next step's learning rate is {now:.3g}; with 6 steps it would have been {was:.3g}" in text
    other = make_pictures(tmp_path / "other")
    next(other.glob("*.png")).unlink()
    train(build(base, optimizer__schedule="cosine", train__steps=9, data__folder=str(other)))
    text = capsys.readouterr().out
    assert "warning: the training data are not those of the steps so far (" in text
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 6, 6, 8]
    assert rows[2]["changed"] == {"train.steps": [6, 8]}
    assert rows[0]["samples"] == rows[2]["samples"] != rows[3]["samples"]


def test_wrong_config_keys_are_one_line_on_the_command_line(base, tmp_path):
    config = write(tmp_path / "config.yaml", base)
    result = run_command("train", config, "train.stepz=5")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error:")
    assert "did you mean 'train.steps'?" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_numbers(base):
    eager = train(build(base)).run
    compiled = train(build(base, train__compile=True, output=f"{base['output']}compiled")).run
    for row, reference in zip(metrics(compiled), metrics(eager), strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    names = load_file(checkpoints(compiled)[-1] / "model" / "model.safetensors").keys()
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_give_the_numbers_of_one(base, tmp_path, accumulation):
    changes = {"optimizer__name": "sgd", "optimizer__lr": 0.1, "optimizer__warmup": 0, "optimizer__clip": 1e9,
               "optimizer__weight_decay": 0.0, "train__steps": 3}  # fmt: skip
    one = train(build(base, **changes)).run
    config = write(
        tmp_path / "config.yaml", base, **changes, output=str(tmp_path / "two"), train__accumulation=accumulation
    )
    launched = subprocess.run(
        [command("train")[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *command("train", config)[1:]],
        env={**environment(), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert "; 2 × cpu" in launched.stdout, "two processes, not one"
    for row, reference in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
