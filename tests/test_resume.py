"""A run that was interrupted and resumed draws, logs and reports the numbers of an uninterrupted run."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart.checkpoint.files import checkpoints
from pixart.files import read_rows
from pixart.train.loop import train
from runs import build, make_pictures, settings

CLOCK = {"images_per_second", "data_wait", "model_tflops", "memory_gb", "seconds", "gpu_hours", "save_stall", "mfu"}


@pytest.fixture
def base(tmp_path, text_encoder) -> dict:
    base = settings(tmp_path / "run", make_pictures(tmp_path / "images"), text_encoder)
    base["train"] |= {"trackers": ["tensorboard"], "steps": 14, "log_every": 4, "save_every": 3}
    base["data"] |= {"workers": 2}
    return base


class Ended(Exception):
    """Raised instead of a kill."""


def interrupted(config, at: int, on_step=lambda *_: None) -> Path:
    """Train until a step and no further, then go on from the last checkpoint."""

    def end(step: int, result) -> None:
        on_step(step, result)
        if step == at:
            raise Ended

    seed()
    with pytest.raises(Ended):
        train(config, on_step=end)
    return train(config, on_step=on_step).run


def seed() -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002


def draws(found: dict):
    def draw(step: int, _) -> None:  # what a user's own code may draw
        found[step] = (torch.rand(()).item(), random.random(), np.random.rand())  # noqa: NPY002

    return draw


def rows(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_rows(run / "metrics.jsonl")]


@pytest.mark.parametrize(("workers", "at"), [(2, 8), (0, 11)])
def test_generators_rows_and_tensorboard_go_on_as_if_nothing_had_been(base, workers, at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base["data"] |= {"workers": workers}
    base["train"] |= {"peak_tflops": "measure"}
    one, other = {}, {}
    seed()
    whole = train(build(base, output=f"{base['output']}_whole"), on_step=draws(one)).run
    run = interrupted(build(base), at, draws(other))
    assert [path.name for path in checkpoints(run)][-1] == "step_00000014"
    assert other == one, "torch's, Python's and numpy's global generators"
    assert rows(run) == rows(whole), "also the row after the resume, of steps before and after it"
    assert [row["step"] for row in rows(run)] == [4, 8, 12, 14]
    shown = {}
    for name, place in (("whole", whole), ("run", run)):
        events = EventAccumulator(str(place / "tracker")).Reload()
        shown[name] = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown["run"] == shown["whole"] and [step for step, _ in shown["run"]] == [4, 8, 12, 14]


def test_a_checkpoint_of_an_earlier_version_has_no_open_row(base):
    run = train(build(base, train__steps=6)).run
    path = checkpoints(run)[-2] / "training.pt"
    record = torch.load(path, weights_only=True)
    assert len(record["progress"].pop("unlogged")["applied"]) == 3
    torch.save(record, path)
    from pixart.train.state import Progress

    assert Progress(**record["progress"]).unlogged == {}
