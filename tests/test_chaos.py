"""Several processes on CPU with gloo: the numbers of one process, killed or not, and the messages when one is lost."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import pixart.train.loop as loop_module
from chaos import FAULTS, chaos, launch, note_samples, read_samples, tensors
from pixart.checkpoint import load_model
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.train.loop import train
from runs import ROOT, build, change, command, environment, make_pictures, make_text_encoder, settings, write
from toy import relative

pytestmark = pytest.mark.slow

SGD = {"optimizer__name": "sgd", "optimizer__lr": 1.0, "optimizer__warmup": 0, "optimizer__weight_decay": 0.0,
       "optimizer__clip": 1e9, "train__steps": 1,
       "data__validation": 0.3, "train__validate_every": 1}  # fmt: skip
LONG = {"train__steps": 50, "train__save_every": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data")
    text = make_text_encoder(folder / "encoder")
    base = settings(folder / "run", make_pictures(folder / "pictures", count=16), text)
    return change(base, train__batch_size=8, train__keep=9)


@dataclass
class Runs:
    folder: Path
    one: dict[str, Path]  # by one process
    many: dict[tuple[str, str, int], Path]  # kind of run, way to share the work, processes


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Runs:
    """Every comparison of this file, in one launch of two processes and one of four: starting them takes longest."""
    folder = tmp_path_factory.mktemp("runs")
    runs = Runs(folder, {}, {})
    original = loop_module.train_step
    for kind, changes in {"sgd": SGD, "long": LONG, "six": {"train__save_every": 3}}.items():
        run = runs.one[kind] = folder / f"{kind}-one"
        loop_module.train_step = original
        note_samples(run, 0)
        train(build(base, **changes, output=str(run)))
    loop_module.train_step = original
    for count in (2, 4):
        configs = []
        for parallel in ("ddp", "fsdp"):
            for kind, changes in {"sgd": SGD, "long": LONG}.items():
                run = runs.many[kind, parallel, count] = folder / f"{kind}-{parallel}-{count}"
                changes = {**changes, "train__parallel": parallel, "output": str(run)}
                if parallel == "fsdp":  # with all else that could come between
                    changes |= {"train__gradient_checkpointing": True, "train__accumulation": 8 // count}
                configs.append(write(folder / f"{run.name}.yaml", base, **changes))
        for first, then in (("ddp", "fsdp"), ("fsdp", "fsdp"), ("fsdp", "ddp")):
            run = runs.many["six", f"{first}-{then}", count] = folder / f"six-{first}-{then}"
            parallel, steps = (first, 3) if count == 2 else (then, 6)
            configs.append(write(folder / f"{run.name}-{count}.yaml", base, train__steps=steps, train__save_every=3,
                                 train__parallel=parallel, output=str(run)))  # fmt: skip
        start(configs, count, folder / f"logs{count}")
    return runs


def start(configs: list[Path], count: int, logs: Path, accident: str = "none", within: float = 400) -> list:
    """Run the worker in `count` processes, and demand that all end well unless they have an accident."""
    worker = [sys.executable, str(ROOT / "tests" / "engine_worker.py"), accident, *map(str, configs)]
    ranks = launch(worker, count, logs, environment())
    try:
        codes = [rank.wait(timeout=within) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert accident != "none" or not any(codes), "\n".join(rank.log.read_text()[-3000:] for rank in ranks)
    return ranks


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run: Path) -> dict[int, dict]:
    return {row["step"]: row for row in rows(run) if "loss" in row}


def samples(run: Path, count: int) -> dict[int, list[tuple]]:
    """Step → its samples with their times and noise, over all processes."""
    found: dict[int, list] = {}
    for rank in range(count):
        for row in read_samples(run, rank):
            found.setdefault(row["step"], []).extend(zip(row["ids"], row["time"], row["noise"], strict=True))
    return {step: sorted(values) for step, values in found.items()}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_sgd_step_of_many_processes_equals_that_of_one(runs, parallel, count):
    one, many = runs.one["sgd"], runs.many["sgd", parallel, count]
    first, second = metrics(one)[1], metrics(many)[1]
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    (first,), (second,) = ([row for row in rows(run) if "validation_loss" in row] for run in (one, many))
    assert len(first) > 8
    assert second == pytest.approx(first, rel=1e-5)
    expected, found = (tensors(run / "checkpoints" / "step_00000001") for run in (one, many))
    for kind in ("model", "ema"):
        names = [name for name in expected if name.startswith(kind)]
        assert names
        for name in names:
            assert relative(found[name], expected[name]) < 1e-5 or torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fifty_steps_of_many_processes_see_the_samples_and_losses_of_one(runs, parallel, count):
    one, many = runs.one["long"], runs.many["long", parallel, count]
    assert samples(many, count) == samples(one, 1)
    first, second = metrics(one), metrics(many)
    assert first.keys() == second.keys() and len(first) == 50
    for step in first:
        assert second[step]["loss"] == pytest.approx(first[step]["loss"], rel=1e-5)
        assert second[step]["grad_norm"] == pytest.approx(first[step]["grad_norm"], rel=1e-4)
        assert second[step]["lr"] == first[step]["lr"]


@pytest.mark.parametrize("way", ["ddp-fsdp", "fsdp-fsdp", "fsdp-ddp"])
def test_four_processes_resume_where_two_ended_sharded_or_not(runs, way):
    one, many = runs.one["six"], runs.many["six", way, 4]
    first, then = way.split("-")
    assert f"written by 2 × {first}, resumed with 4 × {then}" in (runs.folder / "logs4" / "0.log").read_text()
    before, after = samples(one, 1), samples(many, 4)
    assert all(after[step] == before[step] for step in (3, 4, 5))
    for step in range(1, 7):
        assert metrics(many)[step]["loss"] == pytest.approx(metrics(one)[step]["loss"], rel=1e-5)
        assert metrics(many)[step]["grad_norm"] == pytest.approx(metrics(one)[step]["grad_norm"], rel=1e-4)
    files = len(list((many / "checkpoints" / "step_00000006").glob("optimizer-*")))
    assert files == (4 if then == "fsdp" else 1)


def test_a_sharded_checkpoint_is_a_model_like_any_other(runs):
    run = runs.many["long", "fsdp", 4]
    network = load_model(str(run))
    found = tensors(newest_checkpoint(run, pytest.fail))
    for name, value in network.state_dict().items():
        assert torch.equal(value, found[f"ema/model.safetensors:{name}"]), name


@pytest.mark.parametrize(("parallel", "faults"), [("ddp", list(FAULTS)), ("fsdp", ["kill", "kill"])])
def test_runs_that_meet_every_fault_end_like_one_that_meets_none(base, tmp_path, parallel, faults):
    config = write(tmp_path / "chaos.yaml", base, model={**base["model"], "hidden_size": 96, "depth": 3},
                   train__steps=150 if parallel == "ddp" else 90, train__save_every=4, train__keep=2,
                   train__log_every=5, data__workers=2, train__trackers=["tensorboard"])  # fmt: skip
    verdict = chaos(config, tmp_path, processes=2, faults=faults, overrides=[f"train.parallel={parallel}"])
    assert verdict.good, str(verdict)
    assert not list(tmp_path.glob("*/checkpoints/.*"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("accident", "says"),
    [("die", "another process of this job has ended"), ("hang", "did not respond for 4 s (train.timeout)")],
)
def test_a_lost_process_ends_the_others_with_one_message(base, tmp_path, parallel, accident, says):
    config = write(tmp_path / "config.yaml", base, train__steps=10_000, train__save_every=2, train__timeout=4.0,
                   train__parallel=parallel, output=str(tmp_path / "run"))  # fmt: skip
    began = time.monotonic()
    ranks = start([config], 2, tmp_path / "logs", accident, within=90)
    assert ranks[0].returncode == 1
    lines = ranks[0].log.read_text().splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error:") and says in errors[0], errors
    assert "Traceback" not in "".join(lines)
    assert time.monotonic() - began < 75
    assert newest_checkpoint(tmp_path / "run", pytest.fail).name == "step_00000004"


def test_a_signal_to_one_process_saves_and_ends_all(base, tmp_path):
    config = write(tmp_path / "config.yaml", base, train__steps=10_000, train__save_every=0, train__parallel="fsdp",
                   output=str(tmp_path / "run"))  # fmt: skip
    ranks = start([config], 2, tmp_path / "logs", "signal", within=90)
    ends = [rank.log.read_text() for rank in ranks]
    steps = [int(text.split(" at step ")[-1].split(",")[0]) for text in ends]
    assert steps[0] == steps[1] <= 8 and all("finished: False" in text for text in ends)
    assert "stopped by a signal; saved" in ends[0]
    assert newest_checkpoint(tmp_path / "run", pytest.fail).name == f"step_{steps[0]:08d}"


def test_torchrun_starts_training_and_exit_code_75_asks_for_a_requeue(base, tmp_path):
    config = write(tmp_path / "config.yaml", base, train__steps=5, output=str(tmp_path / "run"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, *command("train", config, "train.parallel=fsdp")[1:]],
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "2 × cpu (fsdp)" in result.stdout
    assert checkpoints(tmp_path / "run")[-1].name == "step_00000005"


@pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")
def test_two_thousand_steps_with_saves_leave_memory_and_files_as_they_were(base, tmp_path, monkeypatch):
    original, trace = loop_module.train_step, []

    def noting(state, *arguments):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        result = original(state, *arguments)
        trace.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))))
        return result

    monkeypatch.setattr(loop_module, "train_step", noting)
    config = build(
        base, train__steps=2000, train__save_every=50, train__keep=3, train__log_every=20, output=str(tmp_path / "run")
    )
    train(config)
    memory, files = zip(*trace, strict=True)
    print(f"memory {memory[500]:.0f} → {memory[-1]:.0f} MB")
    assert max(memory[-200:]) < memory[500] + 8
    assert sorted(files[-200:])[100] <= sorted(files[200:400])[100]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step_00001900",
        "step_00001950",
        "step_00002000",
    ]
