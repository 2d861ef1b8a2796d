"""One process of several: trains each config in turn, noting its samples; then, if told so, dies or hangs."""

import os
import signal
import sys
import time
from pathlib import Path

import pixart.train.loop as loop
from chaos import note_samples
from pixart import cli
from pixart.config import load_config
from pixart.train.config import TrainConfig


def main() -> int:
    port, rank, original = int(os.environ["MASTER_PORT"]), int(os.environ["RANK"]), loop.train_step
    accident, *configs = sys.argv[1:]
    for i, path in enumerate(configs):
        os.environ["MASTER_PORT"] = str(port + i)  # each run has its own group of processes
        loop.train_step = original
        config = load_config(TrainConfig, path)
        note_samples(Path(config.output), rank)
        if accident != "none" and rank == 1:
            _have(accident)
        result = loop.train(config)
        print(f"end of {config.output} at step {result.step}, finished: {result.finished}", flush=True)
    return 0


def _have(accident: str) -> None:
    going = loop.train_step

    def step(state, *arguments):
        if state.progress.step == 5 and accident == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if state.progress.step == 5 and accident == "hang":
            time.sleep(12)
        if state.progress.step == 5 and accident == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        return going(state, *arguments)

    loop.train_step = step


if __name__ == "__main__":
    cli.run(main)
