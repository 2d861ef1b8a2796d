"""Curves of several runs in one picture: losses, validation and throughput over steps, pictures or device-hours."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart.errors import InputError, missing_extra
from pixart.train.log import BY_RATIO, ERROR, METRICS, find_ratios, is_number, read_metrics

PANELS = {
    "loss": "training loss", "validation_loss": "validation loss",
    ERROR: "error of clean images, comparable between runs: geometric mean over the ratios",
    BY_RATIO: "the same at every ratio of noise to signal", "images_per_second": "images per second",
}  # fmt: skip
AXES = {"step": "optimizer step", "images": "training images", "gpu_hours": "device-hours"}
STYLES = ("-", "--", "-.", ":")  # of the ratios, the least noisy first
SMOOTHED = 0.02  # share of a curve's points in the window of its running mean

Curve = tuple[list[float], list[float]]  # places on the x-axis and values


def plot_runs(runs: Sequence[str | Path], output: str | Path, *, x: str = "step", log_x: bool = False) -> None:
    """Draw metrics.jsonl of one or more runs into one PNG, over one of `AXES`.

    The training loss is drawn thin as it was logged, and over it its running mean (see `smooth`).

    Raises:
        InputError: a folder without a metrics.jsonl or with nothing in it; matplotlib is not installed; `output` is no
            PNG or cannot be written; there is no such axis.
    """
    if x not in AXES:
        raise InputError(f"x: got '{x}', expected one of {', '.join(AXES)}")
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise InputError(f"output {output}: expected the name of a .png file")
    curves = {name: read_curves(Path(run), x) for name, run in zip(name_runs(runs), runs, strict=True)}
    figure = draw_curves(curves, x=x, log_x=log_x)
    try:
        figure.savefig(output, dpi=120)
    except OSError as error:
        raise InputError(f"output {output}: cannot be written ({error})") from None


def draw_curves(curves: Mapping[str, Mapping[str, Curve]], *, x: str = "step", log_x: bool = False):
    """Curves of each run by its name, as `read_curves` gives them → a matplotlib Figure with a panel for each of
    `PANELS`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "drawing curves") from None
    figure = Figure(figsize=(8, 15), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        if key == BY_RATIO:
            _draw_ratios(axis, curves)
        else:
            _draw(axis, key, curves)
        smoothed = f", running mean over {SMOOTHED:.0%} of its points" if key == "loss" else ""
        axis.set_title(title + smoothed, loc="left", fontsize=10)
    axes[-1].set_xlabel(AXES[x])
    if log_x:
        axes[-1].set_xscale("log")
    else:
        axes[-1].set_xlim(left=0)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles = {name: handles[name] for name in curves if name in handles}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def read_curves(run: Path, x: str = "step") -> dict[str, Curve]:
    """The panels' curves in a run's metrics.jsonl over `x`, which is interpolated where a row has none.

    Raises:
        InputError: no such file, or no metrics in it.
    """
    path = run / METRICS
    if not path.is_file():
        raise InputError(f"{run}: there is no {METRICS} in it; expected a run's folder")
    rows = read_metrics(run)
    known = [(row["step"], row[x]) for row in rows if is_number(row.get(x))]
    curves: dict[str, Curve] = {}
    if rows and not known:
        raise InputError(f"{path}: no row has '{x}'; take another axis, as step")
    found = np.interp([row["step"] for row in rows], *zip(*known, strict=True)).tolist() if known else []
    for row, place in zip(rows, found, strict=True):
        for key in (*PANELS, *(BY_RATIO + ratio for ratio in find_ratios(row))):
            if not is_number(value := row.get(key)):
                continue
            places, values = curves.setdefault(key, ([], []))
            places.append(place)
            values.append(float(value))
    if not curves:
        raise InputError(f"{path}: nothing to draw in it; the first line comes after train.log_every steps")
    return curves


def smooth(values: Sequence[float], share: float = SMOOTHED) -> list[float]:
    """A centred running mean over the nearest `share` of the points, an odd number of them, fewer at the ends."""
    reach = int(len(values) * share / 2)
    result = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)  # as far to either side: else the ends would lag behind
        window = values[i - near : i + near + 1]
        result.append(sum(window) / len(window))
    return result


def _draw(axis, key: str, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    for number, (name, of_run) in enumerate(curves.items()):
        if key not in of_run:
            continue
        (places, values), colour = of_run[key], f"C{number}"  # a run has one in all panels
        if key == "loss":
            axis.plot(places, smooth(values), linewidth=1.6, label=name, zorder=3, color=colour)
            axis.plot(places, values, linewidth=0.6, alpha=0.3, color=colour)
        else:
            marker = "." if len(places) < 40 else None
            axis.plot(places, values, linewidth=1.4, marker=marker, label=name, color=colour)
    _finish(axis, [name for name, of_run in curves.items() if key in of_run])
    if key == "images_per_second":
        axis.set_ylim(bottom=0)


def _draw_ratios(axis, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    """A ratio has its style, a run its colour."""
    from matplotlib.lines import Line2D

    ratios = find_ratios(key for of_run in curves.values() for key in of_run)
    for number, of_run in enumerate(curves.values()):
        for i, ratio in enumerate(ratios):
            if BY_RATIO + ratio in of_run:
                style = STYLES[i % len(STYLES)]
                axis.plot(*of_run[BY_RATIO + ratio], style, linewidth=1.2, color=f"C{number}")
    if ratios:
        lines = [Line2D([], [], linestyle=STYLES[i % len(STYLES)], color="grey") for i in range(len(ratios))]
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1)}  # above the panel, beside its title
        axis.legend(lines, ratios, ncols=len(ratios), fontsize=8, frameon=False, borderaxespad=0, **place)
        axis.set_yscale("log")
    _finish(axis, ratios)


def _finish(axis, drawn: Collection) -> None:
    if not drawn:
        axis.text(0.5, 0.5, "not logged by these runs", transform=axis.transAxes, ha="center", color="grey")
        axis.set_yticks([])
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def name_runs(runs: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the runs' paths that tell them apart."""
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    if len(set(parts)) < len(parts):
        raise InputError(f"a run is named twice: {', '.join(map(str, runs))}")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]
