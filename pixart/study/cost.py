"""What a study will take, before it is begun."""

from collections.abc import Iterator

from pixart.cli import find_device
from pixart.errors import InputError
from pixart.study.plan import Study
from pixart.study.results import size_of
from pixart.study.runner import is_finished
from pixart.study.tables import markdown_table
from pixart.train.estimate import estimate
from pixart.train.rehearsal import rehearse


def describe_study(study: Study) -> Iterator[str]:
    """The lines of `pixart study --dry-run`: a table of arms with their sizes, and the time they will take.

    A few real steps of every arm are timed on this machine, on random data: validation, scores and starting up come on
    top.
    """
    head = ["arm", "runs to do", "parameters", "GFLOP forward", "TFLOP step", "memory GB", "steps", "PFLOP run", "time"]
    rows, notes, total, device = [], [], 0.0, find_device()
    for arm in study.arms.values():
        size, steps = size_of(arm.config), arm.config.train.steps
        todo = [run for run in arm.runs if not is_finished(run)]
        took = ""
        try:
            seconds = rehearse(arm.config, device=device.type, steps=3).seconds * steps
            total, took = total + seconds * len(todo), _time(seconds)
        except InputError as error:  # e.g. an objective that needs more than random data
            notes.append(f"{arm.name}: not timed: {error}")
        rows.append([
            arm.name, f"{len(todo)} of {len(arm.runs)}", f"{size['parameters'] / 1e6:.4g} M",
            f"{size['forward_flops'] / 1e9:.4g}", f"{size['step_flops'] / 1e12:.4g}",
            f"{estimate(arm.config).memory_bytes / 2**30:.3g}", str(steps),
            f"{size['step_flops'] * steps / 1e15:.4g}", took,
        ])  # fmt: skip
    yield from markdown_table(head, rows)
    yield from ("", *notes, f"baseline: {study.baseline.name}; tested: {', '.join(study.tested)}")
    yield from (f"not tested: {key}, {why}" for key, why in study.untested.items())
    yield (
        f"about {_time(total)} of training steps in all, one run after the other, on {device}; scores, validation and "
        "starting up come on top. Memory is an estimate, above what a process takes before it makes the network."
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
