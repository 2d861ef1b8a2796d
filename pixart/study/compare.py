"""Several runs in one table: their results, and the settings that differ."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from pixart.config import flatten, meaning, to_dict
from pixart.errors import InputError
from pixart.evaluate.metric import Declaration, Score
from pixart.files import read_rows
from pixart.model import PixArt
from pixart.model.flops import forward_flops
from pixart.study.groups import describe_groups
from pixart.study.plots import name_runs
from pixart.study.tables import markdown_table
from pixart.train.config import TrainConfig
from pixart.train.history import CONFIG, FILE, read_run_config
from pixart.train.metrics import (
    best_value,
    headlines,
    is_number,
    last_value,
    merge_declarations,
    read_declarations,
    read_metrics,
)

# followed by those of the metrics
COLUMNS = ("run", "parameters", "GFLOP", "step", "images", "hours", "images/s", "loss")


def compare_runs(runs: Sequence[str | Path]) -> str:
    """A Markdown table of results, one of means over seeds if some runs differ in their seed alone, and one of the
    settings that differ.

    "GFLOP" is the forward of one image with a caption of full length; "hours" are device-hours. For each metric, the
    last value is followed by its best value and its parts. A metric of the training objective itself has no best value,
    because it cannot be compared between objectives.

    Raises:
        InputError: a folder is not a run.
    """
    names, configs = name_runs(runs), [_config(Path(run)) for run in runs]
    metrics, declared = [read_metrics(Path(run)) for run in runs], merge_declarations(runs)
    head = (*COLUMNS, *(name for of in declared.values() for score in of.scores for name in _columns(of, score)))
    lines = markdown_table(head, [_row(*of, declared) for of in zip(names, configs, metrics, strict=True)])
    lines += describe_groups(names, configs, metrics, declared)
    flat = [flatten(to_dict(config)) for config in configs]
    keys = [key for key in dict.fromkeys(key for of in flat for key in of) if _meaning(key) != "quiet"]
    differing = [key for key in keys if len({json.dumps(of.get(key)) for of in flat}) > 1]
    if differing:
        rows = [(key, *(json.dumps(of.get(key), ensure_ascii=False) for of in flat)) for key in differing]
        lines += ["", *markdown_table(("setting", *names), rows)]
    other = [key for key in differing if _meaning(key) == "images"]
    if len({_held_out(Path(run)) for run in runs}) > 1:
        other.append("the fingerprints in history.jsonl")
    measured = [key for key in differing if _meaning(key) == "loss"]
    lines += _warnings(declared.values(), measured, other)
    lines += _contradictions(runs)
    return "\n".join(lines)


def _warnings(declared: Collection[Declaration], measured: Sequence[str], other: Sequence[str]) -> list[str]:
    """What cannot be compared because of differing settings: `measured` are those of the loss, `other` of the data."""
    lines = []
    of_losses = ["loss", *(score.key for score in headlines(of for of in declared if of.of_objective))]
    comparable = [of for of in declared if not of.of_objective]
    if measured:
        verb = "measure" if len(of_losses) > 1 else "measures"
        instead = f": compare {_join([score.key for score in headlines(comparable)])}" if comparable else ""
        lines.append(
            f"\n{_join(of_losses)} {verb} another thing in each of these runs ({', '.join(measured)} differ){instead}"
        )
    held_out = headlines(of for of in (comparable if measured else declared) if "held_out" in of.needs)
    if other and held_out:
        lines.append(
            f"\n{_join([score.key for score in held_out])} may be of other images, latents or captions in each of "
            f"these runs ({', '.join(other)} differ), and then cannot be compared{' either' * bool(measured)}"
        )
    return lines


def _contradictions(runs: Sequence[str | Path]) -> list[str]:
    """Scores that the runs declare under one name with different meanings."""
    said: dict[str, set] = {}
    for run in map(Path, runs):
        for declaration in read_declarations(run).values():
            for score in declaration.scores:
                said.setdefault(score.key, set()).add((score.better, declaration.of_objective))
    return [
        f"\n{key} is not the same metric in each of these runs: the metrics.json of each says what it is"
        for key, meanings in said.items()
        if len(meanings) > 1
    ]


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _columns(declaration: Declaration, score: Score) -> tuple[str, ...]:
    if score.part:
        return (score.part,)
    return (score.key, "its best, at step") if _has_best(declaration, score) else (score.key,)


def _has_best(declaration: Declaration, score: Score) -> bool:
    return not score.part and score.better is not None and not declaration.of_objective


def _meaning(key: str) -> str:
    return meaning(TrainConfig, key, "compare")


def _config(run: Path) -> TrainConfig:
    if not (run / CONFIG).is_file():
        raise InputError(f"{run}: there is no config.yaml in it; expected a run's folder")
    return read_run_config(run)


def _held_out(run: Path) -> str | None:
    """The fingerprint of the data of a run's last validation; in runs of earlier versions, of its training data."""
    rows = list(read_rows(run / FILE))
    return last_value(rows, "held_out") or last_value(rows, "samples")


def _row(name: str, config: TrainConfig, rows: list[dict], declared: Mapping[str, Declaration]) -> tuple[str, ...]:
    c = config.model
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in PixArt(c).parameters())
    flops = forward_flops(c, c.latent_size, c.latent_size, config.text.length)
    cells = [
        name,
        f"{parameters / 1e6:.1f} M",
        f"{flops / 1e9:.3g}",
        *(str(last_value(rows, key) or 0) for key in ("step", "images")),
        *(_number(last_value(rows, key)) for key in ("gpu_hours", "images_per_second", "loss")),
    ]
    for declaration in declared.values():
        for score in declaration.scores:
            cells.append(_number(last_value(rows, score.key)))
            if _has_best(declaration, score):
                value, step = best_value(rows, score)
                cells.append("" if value is None else f"{_number(value)}, {step}")
    return tuple(cells)


def _number(value: float | None) -> str:
    return f"{value:.4g}" if is_number(value) else ""
