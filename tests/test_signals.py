"""Signals, killed workers, closed pipes and second starts: real processes, with workers and trackers as by default."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

import pixart.train.lock as lock_module
import pixart.train.setup as start_module
from chaos import tensors
from pixart.checkpoint.files import newest_checkpoint
from pixart.errors import InputError
from pixart.train.lock import RunLock
from pixart.train.loop import train
from pixart.train.signals import REQUEUE
from runs import build, command, environment, write

LONG = {"train__steps": 100_000, "train__save_every": 0, "train__trackers": ["tensorboard"], "data__workers": 2}
ENVIRONMENT = {**environment(), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def started(config: Path, wait_for: Path):
    """`train` on its own, its output in a pipe, in a group of its own; nothing of it outlives the test."""
    process = subprocess.Popen(
        command("train", config),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    family = []
    try:
        wait(lambda: wait_for.exists() and wait_for.stat().st_size > 300, process)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.kill()
        process.wait()


def wait(until, process=None, within: float = 120) -> None:
    deadline = time.monotonic() + within
    while not until():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_saved(run: Path, output: str) -> int:
    step = int(output.split(" saved at step ")[-1].split(";")[0])
    assert newest_checkpoint(run, pytest.fail).name == f"step_{step:08d}" and step > 0
    assert not (run / "run.lock").exists()
    return step


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_signal_to_the_whole_group_saves_and_ends_the_run(base, tmp_path, number):
    run = Path(base["output"])
    with started(write(tmp_path / "c.yaml", base, **LONG), wait_for=run / "metrics.jsonl") as process:
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        for _ in range(1 if number == signal.SIGINT else 3):  # a second Ctrl-C means at once
            os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, errors
    assert "stopped by a signal; saved at step" in output and "Traceback" not in errors
    assert_saved(run, output)
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_worker_that_is_killed_ends_the_run_saved_with_one_line(base, tmp_path):
    run = Path(base["output"])
    with started(write(tmp_path / "c.yaml", base, **LONG), wait_for=run / "metrics.jsonl") as process:
        psutil.Process(process.pid).children()[0].kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "killed from outside" in line and "fewer data.workers" in line and "Traceback" not in errors
    step = assert_saved(run, line.replace("Saved", "saved"))
    whole = train(build(base, train__steps=step, output=f"{run}_whole"), onednn=True).run
    one, other = (tensors(newest_checkpoint(found, pytest.fail)) for found in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in other), "the step under way was done as it should be"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_the_start(base, monkeypatch, capsys, number):
    def load(*_):
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("the start goes on")

    if (before := signal.getsignal(number)) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup")
    monkeypatch.setattr(start_module, "load_images", load)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected) as caught:
        train(build(base))
    if expected is SystemExit:
        assert caught.value.code == REQUEUE
        assert f"stopped by {number.name} before the first step" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert not (Path(base["output"]) / "run.lock").exists()


def test_under_nohup_a_terminal_that_hangs_up_means_nothing(base):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(build(base), on_step=lambda *_: os.kill(os.getpid(), signal.SIGHUP)).finished
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_output_that_nobody_reads_ends_nothing_and_leaves_no_traceback(base, tmp_path):
    config = write(tmp_path / "c.yaml", base, train__trackers=["tensorboard"], data__workers=2)
    line = " ".join(command("train", str(config)))
    result = subprocess.run(
        ["bash", "-c", f"{{ {line}; echo code $? >&2; }} | head -1"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert len(result.stdout.splitlines()) == 1
    assert "code 0" in result.stderr and "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert result.stderr.count("<stdout> cannot be written ([Errno 32] Broken pipe); training continues") == 1
    assert json.loads((Path(base["output"]) / "summary.json").read_text())["finished"]


# ---------------------------------------------------------------------------------------------- one start in a folder


@pytest.mark.slow
def test_a_second_start_is_told_who_has_the_folder_and_a_kill_gives_it_back(base, tmp_path, capsys):
    run = Path(base["output"])
    with started(write(tmp_path / "c.yaml", base, **LONG), wait_for=run / "metrics.jsonl") as process:
        before = (run / "config.yaml").read_bytes()
        with pytest.raises(
            InputError, match=rf"process {process.pid} on .*, since 20.* is training into it; wait for its end"
        ):
            train(build(base, train__steps=8))
        assert (run / "config.yaml").read_bytes() == before and process.poll() is None
        process.kill()
        began = time.monotonic()
        assert train(build(base, train__steps=8)).finished
        assert time.monotonic() - began < 15 and "still running" not in capsys.readouterr().out
    assert not (run / "run.lock").exists()


def test_two_threads_of_a_process_do_not_share_a_folder_either(base):
    problems = []

    def second() -> None:
        with pytest.raises(InputError) as caught:
            train(build(base))
        problems.append(str(caught.value))

    def begin(step: int, _) -> None:
        if step == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    assert train(build(base), on_step=begin).finished
    assert f"process {os.getpid()} on" in problems[0]


def test_without_locks_of_the_disk_a_start_watches_for_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "_lock", lambda _: None)
    monkeypatch.setattr(lock_module, "BEAT", 0.05)
    monkeypatch.setattr(lock_module, "WATCH", 0.5)
    with RunLock() as first:
        first.take(tmp_path, 1, print)
        monkeypatch.setattr(lock_module, "_here", set())  # as in another process
        with pytest.raises(InputError, match=f"process {os.getpid()} on .* is training into it"):
            RunLock().take(tmp_path, 1, print)
        first._over.set()  # killed: it beats no more, and its file stays
        time.sleep(0.2)
        said: list[str] = []
        monkeypatch.setattr(time, "strftime", lambda _: "later")
        with RunLock() as other:
            other.take(tmp_path, 1, said.append)
            assert json.loads((tmp_path / "run.lock").read_text())["since"] == "later"
        assert "waiting 0.5 s to see whether it is still running" in said[0]
    assert not (tmp_path / "run.lock").exists()


def test_of_two_that_find_a_folder_free_at_once_the_later_one_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "_lock", lambda _: None)
    monkeypatch.setattr(lock_module, "WATCH", 1.0)
    path, other = tmp_path / "run.lock", {"host": "elsewhere", "process": 7, "since": "now"}

    def overtake() -> None:
        wait(lambda: path.exists() and path.stat().st_size)
        path.write_text(json.dumps(other))

    thread = threading.Thread(target=overtake)
    thread.start()
    with pytest.raises(InputError, match="process 7 on elsewhere, since now is training into it"), RunLock() as lock:
        lock.take(tmp_path, 1, print)
    thread.join()
    assert json.loads(path.read_text()) == other, "whose lock it is now"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "accident"), [("torchrun", "kill"), ("accelerate", "kill"), ("torchrun", "group")]
)
def test_processes_whose_launcher_is_killed_or_whose_group_is_told_to_save_and_end(base, tmp_path, launcher, accident):
    run = Path(base["output"])
    config = write(tmp_path / "c.yaml", base, **LONG)
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    }[launcher]
    process = subprocess.Popen(
        [*start, *command("train", config)[1:]],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    ranks = []
    try:
        wait(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 300, process)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == (6 if launcher == "torchrun" else 3), "each with two workers"
        process.kill() if accident == "kill" else os.killpg(process.pid, signal.SIGTERM)
        assert not psutil.wait_procs(ranks, timeout=60)[1], "all have ended"
    finally:
        for one in ranks:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.kill()
    step = int(newest_checkpoint(run, pytest.fail).name[5:])
    assert step > 0 and not (run / "run.lock").exists()
    assert json.loads((run / "summary.json").read_text())["why"] == "stopped by a signal"
    assert train(build(base, train__steps=step + 2)).step == step + 2
