"""Faults around a run of one process: nothing is lost, restarted or saved broken, and one line reports the fault."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pixart.train.log as log_module
import pixart.train.saving as saving_module
import pixart.train.validate as validate_module
from chaos import tensors
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.errors import InputError
from pixart.files import append_rows, cut_rows, read_rows, verify
from pixart.train.loop import train
from runs import build, environment


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def break_checkpoint(path: Path) -> None:
    weights = path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


# -------------------------------------------------------------------------------------- checkpoints that are not there


def test_a_run_whose_checkpoints_cannot_be_read_is_never_begun_anew(base, capsys):
    whole = train(build(base, output=f"{base['output']}_whole", train__steps=8)).run
    run = train(build(base)).run
    kept = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "config.yaml", "history.jsonl")}
    folder, away = run / "checkpoints", run / "away"
    folder.rename(away)
    folder.symlink_to(folder.name)  # to list it fails, whoever asks: "Too many levels of symbolic links"
    with pytest.raises(InputError, match=r"checkpoints: cannot be read \(.*Too many levels"):
        train(build(base, train__steps=8))
    folder.unlink()
    away.rename(folder)
    for path in folder.iterdir():
        (path / "manifest.json").rename(path / "manifest.away")
        (path / "manifest.json").symlink_to("manifest.json")
    with pytest.raises(
        InputError, match=r"3 checkpoints, and none of them is complete and readable .*not started again"
    ):
        train(build(base, train__steps=8))
    said = capsys.readouterr().out
    assert said.count("manifest.json cannot be read: ") == 3 and "is damaged" not in said
    assert {name: (run / name).read_bytes() for name in kept} == kept, "nothing has changed meanwhile"
    for path in folder.iterdir():
        (path / "manifest.away").replace(path / "manifest.json")
    assert train(build(base, train__steps=8)).step == 8
    one, other = (tensors(newest_checkpoint(found, pytest.fail)) for found in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_keep_counts_good_checkpoints_and_no_copy_of_a_users_is_pruned_or_taken(base, capsys):
    run = train(build(base, train__keep=9)).run
    break_checkpoint(run / "checkpoints" / "step_00000006")
    for name in ("step_00000002_best", "step_000000099", "step_99"):
        shutil.copytree(run / "checkpoints" / "step_00000002", run / "checkpoints" / name)
    mine = ["step_000000099", "step_00000002_best", "step_99"]

    class Enough(Exception):
        pass

    def stop(step: int, _) -> None:
        if step == 5:
            raise Enough

    # goes on from 4, the newest good one, and is ended after its save of 5; 6 is newer by name, and damaged
    with pytest.raises(Enough):
        train(build(base, train__keep=1, train__save_every=5), on_step=lambda step, _: None if step < 6 else stop(5, _))
    assert "resuming from" in capsys.readouterr().out
    assert names(run) == sorted(["step_00000005", "step_00000006", *mine])
    assert verify(run / "checkpoints" / "step_00000005") is None
    train(build(base, train__keep=1))
    assert names(run) == sorted(["step_00000006", *mine]), "made anew, and the only one to keep"
    assert [path.name for path in checkpoints(run)] == ["step_00000006"]


def test_rows_are_cut_in_place_and_never_below_the_step(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": step} for step in (1, 2, 3, 4, 5)])
    with open(path, "ab") as file:
        file.write(b'{"step": 6, "lo')
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("written anew"))
    cut_rows(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' and path.stat().st_ino == inode
    path.write_bytes(b'{"step": 1}\nrubbish\n{"step": 2}\n{"step": 9}\n{"step": 3}\n{"step": 4}\n')
    cut_rows(path, 3)  # two starts that wrote at once: what is at or below the step stays
    assert [row["step"] for row in read_rows(path)] == [1, 2, 9, 3]
    cut_rows(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------- full disks


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_with_tensorboard_costs_a_line_and_not_the_run(base, monkeypatch, capfd):
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    monkeypatch.setattr(LocalFileSystem, "append", full)
    config = build(
        base, train__trackers=["tensorboard"], train__sample_every=2, prompts=["red"], data__workers=2, train__steps=12
    )
    assert train(config).finished
    text = "".join(capfd.readouterr())
    assert (
        text.count("warning: tracker tensorboard: OSError: [Errno 28] No space left on device; training continues") == 1
    )
    assert "Traceback" not in text and "Exception" not in text
    run = Path(base["output"])
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, 13))
    assert len(list((run / "samples").iterdir())) == 6


def test_rows_that_a_full_disk_did_not_take_are_written_once_there_is_room(base, monkeypatch, capsys):
    def scarce(path, rows, **options):
        if len(names(path.parent)) == 1:  # from the first save to the second
            full()
        append_rows(path, rows, **options)

    monkeypatch.setattr(log_module, "append_rows", scarce)
    run = train(build(base)).run
    assert capsys.readouterr().out.count("metrics.jsonl could not be written") == 1
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_rows_are_appended_all_or_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": 1}])
    code = (
        "import resource, sys; from pathlib import Path; from pixart.files import append_rows\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "append_rows(Path(sys.argv[1]), [{'step': i} for i in range(9)])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], env=environment(), capture_output=True, text=True)
    assert "File too large" in result.stderr and path.read_text() == '{"step": 1}\n'


def test_a_full_disk_during_a_sample_grid_costs_a_line(base, monkeypatch, capsys):
    monkeypatch.setattr(validate_module, "write_png", full)
    assert train(build(base, train__sample_every=3, prompts=["red"])).finished
    said = capsys.readouterr().out
    assert said.count(".png could not be written ([Errno 28] No space left on device); training continues") == 2


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_no_save_counts_as_failed(base, monkeypatch, capsys):
    def denied(path, *_, **__):
        if path.name.endswith(".old"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        original(path, *_, **__)

    original = shutil.rmtree
    monkeypatch.setattr(saving_module.shutil, "rmtree", denied)
    assert train(build(base, train__keep=1)).finished
    said = capsys.readouterr().out
    assert "warning: an old checkpoint could not be removed ([Errno 13]" in said and "could not be saved" not in said


# ----------------------------------------------------------------------------------------------------- broken numbers


@pytest.mark.parametrize("where", ["network", "average"])
def test_weights_that_are_not_finite_are_never_saved(base, where):
    seen = {}

    def spoil(step: int, _) -> None:
        if step == 3:
            with torch.no_grad():
                next(seen["state"].parts.__getattribute__(where).blocks.parameters()).view(-1)[5] = math.inf

    original = saving_module.take_snapshot
    import pixart.train.loop as loop_module

    step = loop_module.train_step

    def noting(state, *arguments):
        seen["state"] = state
        return step(state, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "train_step", noting)
        with pytest.raises(
            InputError,
            match=r"step 4 could not be saved \(weights are not finite: (model|ema)/blocks.*"
            r"training stops. Lower optimizer.lr",
        ):
            train(build(base, train__steps=30), on_step=spoil)
    assert saving_module.take_snapshot is original
    assert names(Path(base["output"])) == ["step_00000002"]


# ------------------------------------------------------------------------------------------------------------- trackers


def test_a_tracker_that_is_asked_for_and_missing_is_refused_by_its_name(base, monkeypatch):
    import accelerate.utils

    for name, package in (("wandb", "wandb"), ("comet_ml", "comet-ml"), ("mlflow", "mlflow")):
        monkeypatch.setattr(accelerate.utils, f"is_{name}_available", lambda: False)
        with pytest.raises(InputError, match=rf"train.trackers: '{name}' needs the package '{package}': pip install"):
            train(build(base, train__trackers=["tensorboard", name]))
    monkeypatch.setattr(accelerate.utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(
        InputError, match=r"'tensorboard' .*needs the package 'tensorboard': pip install 'pixart\[train\]'"
    ):
        train(build(base, train__trackers=["tensorboard"]))
    with pytest.raises(InputError, match=r"there is no 'wandbb'; did you mean 'wandb'"):
        train(build(base, train__trackers=["wandbb"]))
    assert not Path(base["output"]).exists()


@pytest.mark.parametrize("seed", [2**64, -(2**70), 10**40, -1])
def test_a_seed_may_have_any_size(base, seed):
    run = train(build(base, seed=seed, data__split_seed=seed, data__validation=0.3, train__batch_size=2)).run
    assert (
        train(
            build(base, seed=seed, data__split_seed=seed, data__validation=0.3, train__batch_size=2, train__steps=8)
        ).step
        == 8
    )
    assert json.loads((run / "summary.json").read_text())["finished"]


def test_a_network_larger_than_memory_is_refused_in_one_line(base):
    sizes = {"model__hidden_size": 65536, "model__depth": 64, "model__num_heads": 16}
    with pytest.raises(InputError, match=r"hidden_size 65536 and depth 64 make weights of .* GB, and this machine has"):
        train(build(base, **sizes))


COMMANDS_ON_A_FULL_DISK = """
import json, resource, sys
from contextlib import redirect_stderr
from io import StringIO
from pixart import commands
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
for words in json.loads(sys.argv[1]):
    said = StringIO()
    with redirect_stderr(said):
        try:
            commands.main(words)
        except SystemExit as end:
            code = end.code
    print("RESULT " + json.dumps([code, said.getvalue()]))
"""


@pytest.mark.slow
def test_every_command_says_in_one_line_that_the_disk_is_full_and_leaves_no_half_of_a_file(base, tmp_path):
    run = str(train(build(base, train__steps=2)).run)
    out = tmp_path / "out"
    out.mkdir()
    calls = {
        "m": ["convert", run, f"{out}/m", "--to", "diffusers"],
        "m.pth": ["convert", run, f"{out}/m.pth", "--to", "official"],
        "ours": ["convert", run, f"{out}/ours", "--to", "ours"],
        "scores": [
            "evaluate",
            run,
            "--data",
            base["data"]["folder"],
            "--metrics",
            "denoising_error",
            "--out",
            f"{out}/e",
        ],
        "samples": ["sample", "--model", run, "a cat", "--out", f"{out}/s", "--set", "steps=2"],
        "plot": ["compare", run, "--output", f"{out}/plot.png"],
        "costs": ["estimate", f"{run}/config.yaml", "--json", f"{out}/costs.json"],
    }
    words = [sys.executable, "-c", COMMANDS_ON_A_FULL_DISK, json.dumps(list(calls.values()))]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(found) == len(calls), done.stderr
    for name, (code, said) in zip(calls, found, strict=True):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and "File too large" in errors[0], (name, said)
        assert str(out) in errors[0], (name, said)
    assert not [path for path in out.rglob("*") if path.is_file() and path.stat().st_size >= 300]
    assert not list(out.rglob("*.partial")) and not [path.name for path in out.iterdir() if path.name in calls]
