"""Several runs in one table: what differs in their configurations, and what came of it."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from pixart.config import flatten, meaning, to_dict
from pixart.errors import InputError
from pixart.files import read_rows
from pixart.model import PixArt
from pixart.model.flops import forward_flops
from pixart.study.plots import name_runs
from pixart.train.config import TrainConfig
from pixart.train.history import CONFIG, FILE, read_run_config
from pixart.train.log import BY_RATIO, ERROR, find_ratios, is_number, last_and_best, last_value, read_metrics

COLUMNS = ("run", "parameters", "GFLOP", "step", "images", "hours", "images/s", "loss", "validation_loss",
           "validation_error", "its best, at step")  # and the errors at every ratio of noise to signal  # fmt: skip


def compare_runs(runs: Sequence[str | Path]) -> str:
    """A Markdown table of results and one of the settings that differ.

    "GFLOP" is a forward of one image with a full caption; "hours" are device-hours. `validation_error` is the geometric
    mean of the errors "at" every ratio of noise to signal.

    Raises:
        InputError: a folder is no run of ours.
    """
    names, configs = name_runs(runs), [_config(Path(run)) for run in runs]
    metrics = [read_metrics(Path(run)) for run in runs]
    ratios = find_ratios(name for rows in metrics for row in rows for name in row)
    head = (*COLUMNS, *(f"at {ratio}" for ratio in ratios))
    lines = _table([head, *(_row(*of, ratios) for of in zip(names, configs, metrics, strict=True))])
    flat = [flatten(to_dict(config)) for config in configs]
    keys = [key for key in dict.fromkeys(key for of in flat for key in of) if _meaning(key) != "quiet"]
    differing = [key for key in keys if len({json.dumps(of.get(key)) for of in flat}) > 1]
    if differing:
        rows = [(key, *(json.dumps(of.get(key), ensure_ascii=False) for of in flat)) for key in differing]
        lines += ["", *_table([("setting", *names), *rows])]
    if measured := [key for key in differing if _meaning(key) == "loss"]:
        lines.append(
            f"\nloss and validation_loss measure another thing in each of these runs ({', '.join(measured)} differ): "
            "compare validation_error"
        )
    other = [key for key in differing if _meaning(key) == "images"]
    if len({_held_out(Path(run)) for run in runs}) > 1:
        other.append("the fingerprints in history.jsonl")
    if other:
        lines.append(
            "\nvalidation_error may be of other images, latents or captions in each of these runs "
            f"({', '.join(other)} differ), and then it cannot be compared either"
        )
    return "\n".join(lines)


def _meaning(key: str) -> str:
    return meaning(TrainConfig, key, "compare")


def _config(run: Path) -> TrainConfig:
    if not (run / CONFIG).is_file():
        raise InputError(f"{run}: there is no config.yaml in it; expected a run's folder")
    return read_run_config(run)


def _held_out(run: Path) -> str | None:
    """The fingerprint of what a run was validated on last; in runs of earlier versions, of what it was trained on."""
    rows = list(read_rows(run / FILE))
    return last_value(rows, "held_out") or last_value(rows, "samples")


def _row(name: str, config: TrainConfig, rows: list[dict], ratios: Sequence[str]) -> tuple[str, ...]:
    c = config.model
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in PixArt(c).parameters())
    flops = forward_flops(c, c.latent_size, c.latent_size, config.text.length)
    _, value, step = last_and_best(rows, ERROR).values()
    return (
        name, f"{parameters / 1e6:.1f} M", f"{flops / 1e9:.3g}",
        *(str(last_value(rows, key) or 0) for key in ("step", "images")),
        *(_number(last_value(rows, key)) for key in ("gpu_hours", "images_per_second")),
        *(_number(last_value(rows, key)) for key in ("loss", "validation_loss", ERROR)),
        "" if value is None else f"{_number(value)}, {step}",
        *(_number(last_value(rows, BY_RATIO + ratio)) for ratio in ratios),
    )  # fmt: skip


def _number(value: float | None) -> str:
    return f"{value:.4g}" if is_number(value) else ""


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|" + " --- |" * len(rows[0]), *body]
