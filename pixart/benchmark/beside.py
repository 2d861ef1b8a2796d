"""The case of two trainings on the same cores: the cost of OpenMP threads that spin, or sleep, while they wait.

How threads wait is fixed when torch is loaded, so each training is a separate process, which waits for a line on its
standard input, takes its steps, and answers with a line.
"""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from pixart.benchmark.measure import Call, Case, Settings
from pixart.benchmark.training import train_case
from pixart.cpu import keep_freed_memory
from pixart.errors import InputError

STEPS = 10
COMMAND = (sys.executable, "-m", "pixart.benchmark.beside")
SPIN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment variables that control how threads wait


def beside_case(settings: Settings) -> Case:
    """Ten steps of the case "train", alone and beside a second training that does the same; with threads that sleep
    while they wait, as in our commands, and with threads that spin, OpenMP's default.

    Raises:
        InputError: the device is not a CPU.
    """
    if settings.cuda:
        raise InputError(f"case beside: it is about a CPU's threads; expected device cpu, got {settings.device}")
    programs = {
        f"{'beside another' if count == 2 else 'alone'}, {waiting}": _trainings(settings, count, waiting)
        for waiting in ("sleeping", "spinning")
        for count in (1, 2)
    }
    note = f"{STEPS} steps of {settings.config}"
    return Case("beside", programs, note=note, memory=False)


def _trainings(settings: Settings, count: int, waiting: str) -> Callable[[], Call]:
    """`count` trainings that take their steps at the same time; a call returns when all have finished."""
    environment = {name: value for name, value in os.environ.items() if name not in SPIN}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    if waiting == "sleeping":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    command = [*COMMAND, json.dumps([STEPS, asdict(settings)])]

    def make() -> Call:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        # in their own session, so that an interrupt of this process does not reach them; `_end` ends them
        start = partial(subprocess.Popen, command, env=environment, start_new_session=True, **pipes)
        trainings = [start() for _ in range(count)]

        def call() -> None:
            for training in trainings:
                with suppress(BrokenPipeError):  # a training that has ended; `_await` reports it
                    training.stdin.write("go\n")
            _await(trainings, "done")

        weakref.finalize(call, _end, trainings)
        _await(trainings, "ready")
        return call

    return make


def _await(trainings: list[subprocess.Popen], word: str) -> None:
    for training in trainings:
        if training.stdout.readline() != f"{word}\n":
            raise InputError(f"case beside: a training ended before it was {word}; what it said stands above")


def _end(trainings: list[subprocess.Popen]) -> None:
    for training in trainings:
        training.terminate()
        training.wait()
        training.stdout.close()
        with suppress(BrokenPipeError):
            training.stdin.close()


def main(order: str) -> None:
    steps, fields = json.loads(order)
    settings = replace(Settings(**fields), programs=())
    if settings.keep_memory:
        keep_freed_memory()
    step = train_case(settings).programs["ours"]()
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(steps):
            step()
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
