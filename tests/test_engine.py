"""The training engine: no device synchronisation, saving in the background, sharded state in files, orderly exits."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import pixart.diffusion.objective as objective_module
import pixart.train.loop as loop_module
import pixart.train.saving as saver_module
from chaos import tensors
from pixart.checkpoint.files import checkpoints, newest_checkpoint, verify
from pixart.errors import InputError
from pixart.train.config import OptimizerConfig
from pixart.train.distributed import lost_process
from pixart.train.loop import train
from pixart.train.optimizer import make_optimizer
from pixart.train.optimizer_state import MomentFiles, Moments, read_moments, take_moments, write_moments
from pixart.train.setup import start
from pixart.train.state import load_checkpoint
from pixart.train.step import apply_update, judge, read_results, train_step
from runs import ROOT, build, command, environment, make_pictures, settings, write


@pytest.fixture
def base(tmp_path, text_encoder) -> dict:
    return settings(tmp_path / "run", make_pictures(tmp_path / "pictures"), text_encoder)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- one step


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a device: a value that is read, or a tensor that is copied off it."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{function} waits for the device")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer__skip_above": 1e-9}, {"diffusion": {}, "model__learn_sigma": True}]
)
def test_a_step_never_waits_for_the_device(base, changes):
    config = build(base, **changes)
    session = start(config)
    batches = iter(session.loader)
    arguments = session.autoencoder, config
    train_step(session.state, [next(batches)], *arguments)  # the optimizer's state is made here, once
    micro_batches = [next(batches)]
    with NoWaiting():
        result = train_step(session.state, micro_batches, *arguments)
    assert read_results([result])[0].applied == ("optimizer__skip_above" not in changes)


def test_the_guard_sees_an_optimizer_that_cannot_skip_on_the_device(base):
    config = build(base, optimizer__name="muon")
    session = start(config)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        train_step(session.state, [next(iter(session.loader))], session.autoencoder, config)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("kind", ["non-finite", "spike", "unreadable"])
def test_a_skipped_step_leaves_every_bit_as_it_was(base, name, kind):
    config = build(base, optimizer__name=name, optimizer__skip_above=1e4)
    session = start(config)
    state, arguments = session.state, (session.autoencoder, config)
    batches = iter(session.loader)
    train_step(state, [next(batches)], *arguments)

    def everything():
        moments = take_moments(
            state.optimizer, dict(state.parts.named_parameters()), lambda _, value: value.clone(), main=True
        )
        weights = {
            f"{i}{name}": v.clone()
            for i, m in enumerate((state.parts.network, state.parts.average))
            for name, v in m.state_dict().items()
        }
        return {**weights, **moments.tensors}

    before = everything()
    batch = next(batches)
    if kind == "unreadable":
        batch.weight.zero_()
    else:
        batch.pixels[0] *= math.nan if kind == "non-finite" else 1e6
    (report,) = read_results([train_step(state, [batch], *arguments)])
    after = everything()
    assert report.outcome == kind
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (report,) = read_results([train_step(state, [next(batches)], *arguments)])
    assert report.applied and not all(torch.equal(before[name], value) for name, value in everything().items())


def test_the_loss_scaler_and_the_skipping_go_together():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer({"weight": parameter}, OptimizerConfig(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, expected in ((1.0, 8.0), (math.inf, 4.0)):
        before = parameter.detach().clone()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([parameter.grad])
        apply_update(optimizer, judge(torch.zeros(()), norm, torch.ones(()), None) == 0)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == expected
        assert torch.equal(before, parameter) == math.isinf(factor)


def test_skipped_steps_are_named_with_their_samples(base, monkeypatch, capsys):
    original, calls = objective_module.diffusion_loss, []

    def poisoned(*arguments):
        losses = original(*arguments)
        calls.append(1)
        return {**losses, "loss": losses["loss"] * {3: math.nan, 5: 1e9}.get(len(calls), 1)}

    monkeypatch.setattr(objective_module, "diffusion_loss", poisoned)
    result = train(build(base, train__log_every=4, train__steps=8, optimizer__skip_above=1e6))
    skipped = [json.loads(line) for line in (result.run / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reason"], len(row["ids"])) for row in skipped] == [(3, "non-finite", 4), (5, "spike", 4)]
    text = capsys.readouterr().out
    assert f"gradient norm (nan) is not finite; skipped. Its samples: {skipped[0]['ids'][0]}" in text
    assert "step 5: its gradient norm" in text
    assert [row["skipped"] for row in metrics(result.run)] == [1, 2]
    record = torch.load(checkpoints(result.run)[-1] / "training.pt", weights_only=True)
    assert record["progress"]["skipped"] == 2 and record["progress"]["spikes"] == 1


# ---------------------------------------------------------------------------------------------------------- saving


def test_training_goes_on_while_a_save_is_written(base, monkeypatch):
    written, during = [], []
    original, original_step = saver_module.write_folder, loop_module.train_step
    finish = threading.Event()

    def slow(target, fill):
        if target.name == "step_00000002":
            finish.wait(20)
        original(target, fill)
        written.append(target.name)

    def noting(state, *arguments):
        during.append((state.progress.step, len(written)))
        if state.progress.step == 3:  # the save of step 2 is still under way; the one of step 4 must wait for it
            finish.set()
        return original_step(state, *arguments)

    monkeypatch.setattr(saver_module, "write_folder", slow)
    monkeypatch.setattr(loop_module, "train_step", noting)
    run = train(build(base)).run
    assert during[2:4] == [(2, 0), (3, 0)]
    assert written == ["step_00000002", "step_00000004", "step_00000006"]
    assert all(verify(path) is None for path in checkpoints(run))
    stalls = [row["save_stall"] for row in metrics(run) if "save_stall" in row]
    assert len(stalls) == 2 and all(0 < stall < 20 for stall in stalls)


def test_what_is_saved_is_the_state_at_the_save(base, monkeypatch):
    original = saver_module.write_folder

    def late(target, fill):  # the next steps change weights, moments and counters meanwhile
        time.sleep(0.3)
        original(target, fill)

    reference = train(build(base, output=f"{base['output']}_reference")).run
    monkeypatch.setattr(saver_module, "write_folder", late)
    run = train(build(base)).run
    for step in ("step_00000002", "step_00000004"):
        one, other = tensors(run / "checkpoints" / step), tensors(reference / "checkpoints" / step)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        records = [torch.load(r / "checkpoints" / step / "training.pt", weights_only=True) for r in (run, reference)]
        assert records[0]["progress"]["images"] == records[1]["progress"]["images"]


def test_a_checkpoint_brings_back_the_loss_scale(base):
    config, scales = build(base), []
    for scale in (64.0, 2.0):
        session = start(config)
        state = session.state
        state.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        state.accelerator.scaler.scale(torch.zeros(()))  # it has no scale before its first loss
        if not checkpoints(session.run):
            with saver_module.Saver(session.run, config, state.processes, -1) as saver:
                saver.save(state)
        load_checkpoint(state, checkpoints(session.run)[-1])
        scales.append(state.accelerator.scaler.get_scale())
    assert scales == [64.0, 64.0]


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_a_save_that_fails_is_told_and_training_does_as_configured(base, monkeypatch, capsys, choice):
    original = saver_module.write_folder

    def full(target, fill):
        if target.name == "step_00000004":
            raise OSError(28, "No space left on device")
        original(target, fill)

    monkeypatch.setattr(saver_module, "write_folder", full)
    config = build(base, train__on_save_error=choice, train__steps=30, train__save_every=2, train__keep=30)
    if choice == "stop":
        with pytest.raises(InputError, match=r"step 4 could not be saved .*No space left.*; training stops"):
            train(config)
    else:
        train(config)
        text = capsys.readouterr().out
        assert "step 4 could not be saved ([Errno 28] No space left on device); training continues" in text
        assert checkpoints(Path(base["output"]))[-1].name == "step_00000030"
    names = [path.name for path in checkpoints(Path(base["output"]))]
    assert names[0] == "step_00000002" and "step_00000004" not in names


def test_a_torn_save_is_removed_at_the_next_start(base):
    run = train(build(base)).run
    for name in (".step_00000008.partial", ".step_00000008.part1"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "training.pt").write_bytes(b"torn")
    train(build(base, train__steps=8))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000006",
        "step_00000008",
    ]


def test_a_checkpoint_says_where_it_comes_from(base):
    run = train(build(base)).run
    record = torch.load(checkpoints(run)[-1] / "training.pt", weights_only=True)
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["config"]["optimizer"]["lr"] == 1e-3
    git, tracked = (
        subprocess.run(["git", *question], cwd=ROOT, capture_output=True, text=True)
        for question in (["rev-parse", "HEAD"], ["ls-files", "--error-unmatch", "pixart/train/state.py"])
    )
    expected = git.stdout.strip() if git.returncode == tracked.returncode == 0 else "unknown"
    assert record["revision"] == expected


@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_rows_of_the_moments_can_be_read_whoever_wrote_them(tmp_path, writers):
    torch.manual_seed(0)
    parameters = {"a": torch.nn.Parameter(torch.randn(7, 3)), "b": torch.nn.Parameter(torch.randn(2))}
    optimizer = make_optimizer(parameters, OptimizerConfig(lr=0.1))
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    full = take_moments(optimizer, parameters, lambda _, value: value.clone(), main=True)
    for rank in range(writers):
        mine, first = {}, {}
        for name, value in full.tensors.items():
            parts = value.chunk(writers) if value.ndim else (value,)
            if rank < len(parts):
                mine[name], first[name] = parts[rank].clone(), rank * (len(parts[0]) if value.ndim else 0)
        write_moments(tmp_path, Moments(mine, first, {}), rank, writers)
    files = MomentFiles(tmp_path)
    for name, value in full.tensors.items():
        assert files.shape(name) == value.shape
        if not value.ndim:
            assert torch.equal(files.read(name, 0, 0), value)
            continue
        for low, high in itertools.combinations_with_replacement(range(len(value) + 1), 2):
            assert torch.equal(files.read(name, low, high), value[low:high])
    other = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in parameters.values()], fused=True)
    named = dict(zip(parameters, other.param_groups[0]["params"], strict=True))
    read_moments(tmp_path, full.record, other, named)
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[named[name]][key], value)
    with pytest.raises(InputError, match=r"other parameters than this run's: \['a'\]"):
        read_moments(tmp_path, full.record, torch.optim.AdamW([named["b"]]), {"b": named["b"]})
    (tmp_path / f"optimizer-{writers:05d}-of-{writers:05d}.safetensors").unlink()
    with pytest.raises(InputError, match="optimizer files, found"):
        read_moments(tmp_path, full.record, optimizer, parameters)


# ------------------------------------------------------------------------------------------------- leaving in order


def test_a_data_folder_that_vanishes_ends_the_run_with_one_error_and_a_saved_state(base, monkeypatch, capsys):
    folder, original = Path(base["data"]["folder"]), loop_module.train_step
    away = folder.with_name("away")

    def vanishing(state, *arguments):
        if state.progress.step == 3 and not away.exists():
            folder.rename(away)
        return original(state, *arguments)

    reference = train(build(base, train__save_every=1, train__keep=9, output=f"{base['output']}_reference")).run
    monkeypatch.setattr(loop_module, "train_step", vanishing)
    config = build(base, train__steps=500, train__save_every=0)
    with pytest.raises(InputError, match=r"images are no longer there.*Saved at step 5; the same command resumes"):
        train(config)
    text = capsys.readouterr()
    assert "unreadable" not in text.out + text.err
    saved = newest_checkpoint(Path(base["output"]), pytest.fail)
    before = reference / "checkpoints" / "step_00000004"  # the fifth step had nothing to learn from
    one, other = tensors(saved), tensors(before)
    assert all(torch.equal(one[name], other[name]) for name in other)
    away.rename(folder)
    assert train(build(base, train__save_every=0, train__steps=8)).step == 8


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one(base, tmp_path):
    if sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    disk = tmp_path / "disk"
    disk.mkdir()
    config = write(tmp_path / "config.yaml", base, train__steps=40, train__save_every=4, train__keep=20)
    train_command = " ".join(command("train", str(config), f"output={disk}/run"))
    look = f"from pixart.checkpoint.files import *; print('newest', newest_checkpoint(Path('{disk}/run'), print))"
    script = (
        f"mount -t tmpfs -o size=4m none {disk}; {train_command}; echo code $?; "
        f'{sys.executable} -c "{look}"; ls -A {disk}/run/checkpoints; '
        f"mount -o remount,ro {disk}; {train_command}; echo code $?"
    )
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], env=environment(), capture_output=True, text=True, timeout=240
    )
    text = result.stdout
    assert text.count("code 2") == 2, text + result.stderr
    assert "training continues" in text and "No space left" in text
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2, errors
    assert "step 40 could not be saved" in errors[0] and "earlier checkpoints are unchanged" in errors[0]
    assert "cannot be written" in errors[1] and "Read-only file system" in errors[1]
    left = text.split("newest ")[1].split("code")[0].split()
    assert left[0].endswith(left[-1]) and all(name.startswith("step_") for name in left[1:]), left


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train__parallel": "fsdp", "optimizer__name": "muon"}, "optimizer 'muon' needs whole matrices"),
        ({"train__parallel": "fsdp", "train__mixed_precision": "fp16"}, "bf16 or no, not fp16"),
        ({"train__timeout": 0.0}, "train.timeout: got 0.0, expected a number above 0 to 1000000000"),
        ({"optimizer__skip_above": -1.0}, "expected a positive number"),
    ],
)
def test_impossible_settings_are_refused_at_once(base, changes, match):
    with pytest.raises(InputError, match=match):
        train(build(base, **changes))


def test_only_errors_of_other_processes_count_as_lost_processes():
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 9) is None
    closed = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"
    assert "has ended" in str(lost_process(RuntimeError(closed), 9))
    late = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9000ms for recv operation"
    assert "did not respond for 9 s" in str(lost_process(RuntimeError(late), 9))
    assert late in str(lost_process(RuntimeError(late), 9)), "and what torch said"
    for gone in (
        dist.DistNetworkError(
            "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"
        ),
        RuntimeError("[../gloo/transport/tcp/pair.cc:144] connect: Connection refused"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
    ):
        assert "has ended" in str(lost_process(gone, 9))
    for own in (
        "NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage, Duplicate GPU detected : rank 1 and rank 0",
        "NCCL error: ncclUnhandledCudaError: Call to CUDA function failed. Cuda failure 2 'out of memory'",
        "[enforce fail at gloo/transport/tcp/device.cc:83] Unable to find address for: ib0",
    ):
        assert lost_process(RuntimeError(own), 9) is None, "told as it is"


def test_one_sharded_process_gives_the_numbers_of_one_that_is_not(base):
    plain = train(build(base)).run
    changes = {"train__parallel": "fsdp", "train__gradient_checkpointing": True, "train__accumulation": 2}
    sharded = train(build(base, **changes, output=f"{base['output']}_fsdp")).run
    for row, reference in zip(metrics(sharded), metrics(plain), strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    one, other = tensors(checkpoints(sharded)[-1]), tensors(checkpoints(plain)[-1])
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    assert train(build(base, train__parallel="fsdp", train__steps=8)).step == 8, "either goes on from the other"
    assert train(build(base, train__steps=8, output=f"{base['output']}_fsdp")).step == 8


def test_a_sharded_run_in_bf16_gives_the_numbers_of_one_that_is_not(base):
    plain = train(build(base, train__mixed_precision="bf16")).run
    changes = {"train__parallel": "fsdp", "output": f"{base['output']}_fsdp"}
    sharded = train(build(base, train__mixed_precision="bf16", **changes)).run
    for row, reference in zip(metrics(sharded), metrics(plain), strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_deterministic_kernels_change_no_number_on_a_cpu_and_are_of_one_run(base, monkeypatch):
    plain = train(build(base)).run
    original, seen = loop_module.train_step, []

    def step(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(*arguments)

    monkeypatch.setattr(loop_module, "train_step", step)
    run = train(build(base, train__deterministic=True, output=f"{base['output']}_same")).run
    assert seen == [True] * 6
    assert not torch.are_deterministic_algorithms_enabled()
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(plain)]


@pytest.mark.slow
def test_sharding_bf16_compiled_blocks_and_gradient_checkpointing_go_together(base):
    changes = {"train__parallel": "fsdp", "train__mixed_precision": "bf16", "train__gradient_checkpointing": True}
    eager = train(build(base, **changes)).run
    compiled = train(build(base, **changes, train__compile=True, output=f"{base['output']}_compiled")).run
    exact = train(build(base, output=f"{base['output']}_exact")).run
    for row, other, reference in zip(metrics(compiled), metrics(eager), metrics(exact), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.01)
        assert row["loss"] == pytest.approx(reference["loss"], rel=0.03)
    found = tensors(checkpoints(compiled)[-1])
    assert not any("_orig_mod" in name for name in found)
    assert all(value.dtype == torch.float32 for value in found.values()), "the masters stay fp32"


# srun as it is: tasks side by side, all killed when one ends with anything but 0; python as training ends
STAND_INS = {
    "srun": """import os, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
         for i in range(3)]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks if task.poll() is None])
open("pid", "w").write(str(os.getpid()))
while any(task.poll() is None for task in tasks):
    if any(task.poll() not in (None, 0) for task in tasks):
        [task.kill() for task in tasks]
        sys.exit(143)
    time.sleep(0.02)
sys.exit(0 if all(task.returncode == 0 for task in tasks) else 143)
""",
    "python": """import os, signal, sys, time
rank = os.environ["RANK"]
def stop(*_):
    time.sleep(0.3 * int(rank))
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
open(f"task{rank}.txt", "w").write(" ".join([*sys.argv[1:], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"],
                                             os.environ["MASTER_ADDR"]]))
while os.environ["END"] == "signal":
    time.sleep(0.05)
sys.exit(1 if os.environ["END"] == "crash" and rank == "1" else 0)
""",
    "scancel": """import os, signal, sys
open("scancel.txt", "w").write(" ".join(sys.argv[1:]))
os.kill(int(open("pid").read()), signal.SIGUSR1)
""",
    "scontrol": """import sys
if sys.argv[1] == "show":
    print("node7", "node8", sep=chr(10))
else:
    open("scontrol.txt", "w").write(" ".join(sys.argv[1:]))
""",
}


@pytest.mark.parametrize(("end", "code"), [("now", 0), ("signal", 75), ("crash", 143)])
def test_the_slurm_script_requeues_only_after_a_signal(tmp_path, end, code):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!{sys.executable}\n{body}")
        (tmp_path / name).chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), "CONFIG.yaml", "train.steps=9"], cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_NTASKS": "3",
             "SLURM_JOB_NODELIST": "node[7-8]", "END": end},
    )  # fmt: skip
    deadline = time.monotonic() + 20
    started = [tmp_path / name for name in ("task0.txt", "task1.txt", "task2.txt", "pid")] * (end == "signal")
    while not all(path.exists() and path.read_text() for path in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if end == "signal":
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == code
    for rank in (0, 1, 2) if end != "crash" else ():
        text = (tmp_path / f"task{rank}.txt").read_text()
        assert text == f"-m pixart train CONFIG.yaml train.steps=9 {rank} 3 node7"
    assert (tmp_path / "scontrol.txt").exists() == (end == "signal")
    assert not list(tmp_path.glob(".requeue*"))
    if end == "signal":
        assert (tmp_path / "scancel.txt").read_text() == "--signal=USR1 41"
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 41"
