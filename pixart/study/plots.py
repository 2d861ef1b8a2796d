"""Curves of several runs in one figure: losses, validation and throughput over steps, images or device-hours."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart.errors import InputError, missing_extra
from pixart.evaluate.metric import Declaration, Score
from pixart.files import write_file
from pixart.train.metrics import METRICS_FILE, is_number, merge_declarations, read_metrics

LOSS, SPEED = "loss", "images_per_second"  # of training: the first and the last panel
AXES = {"step": "optimizer step", "images": "training images", "gpu_hours": "device-hours"}
STYLES = ("-", "--", "-.", ":")  # line styles of the parts that share a panel
SMOOTHED = 0.02  # window of the running mean, as a share of a curve's points

Curve = tuple[list[float], list[float]]  # x values and y values
Curves = Mapping[str, Mapping[str, Curve]]  # run → key → curve


def plot_runs(runs: Sequence[str | Path], output: str | Path, *, x: str = "step", log_x: bool = False) -> None:
    """Plot metrics.jsonl of one or more runs into a PNG, over one of `AXES`.

    The training loss is drawn as a thin line, with its running mean (see `smooth`) on top.

    Raises:
        InputError: a folder has no metrics.jsonl or an empty one; matplotlib is not installed; `output` is not a PNG or
            cannot be written; there is no such axis.
    """
    if x not in AXES:
        raise InputError(f"x: got '{x}', expected one of {', '.join(AXES)}")
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise InputError(f"output {output}: expected the name of a .png file")
    curves = {name: read_curves(Path(run), x) for name, run in zip(name_runs(runs), runs, strict=True)}
    figure = draw_curves(curves, merge_declarations(runs), x=x, log_x=log_x)
    try:
        write_file(output, lambda path: figure.savefig(path, dpi=120, format="png"))
    except OSError as error:
        raise InputError(f"output {output}: cannot be written ({error})") from None


def draw_curves(curves: Curves, declared: Mapping[str, Declaration], *, x: str = "step", log_x: bool = False):
    """A matplotlib Figure: training loss, a panel for each headline of a metric and one for its parts, throughput.

    Args:
        curves: of each run, from `read_curves`.
        declared: the metrics that the runs declare, from `merge_declarations`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "drawing curves") from None
    panels = [panel for declaration in declared.values() for panel in make_panels(declaration.scores)]
    figure = Figure(figsize=(8, 3 * (2 + len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 + len(panels), 1, sharex=True)
    _draw(axes[0], Score(LOSS, f"training loss, running mean over {SMOOTHED:.0%} of its points"), curves)
    for axis, panel in zip(axes[1:-1], panels, strict=True):
        if panel[0].part:
            _draw_parts(axis, panel, curves)
        else:
            _draw(axis, panel[0], curves)
    _draw(axes[-1], Score(SPEED, "images per second"), curves)
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel(AXES[x])
    if log_x:
        axes[-1].set_xscale("log")
    else:
        axes[-1].set_xlim(left=0)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles = {name: handles[name] for name in curves if name in handles}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def make_panels(scores: Iterable[Score]) -> list[list[Score]]:
    """Group a metric's scores into panels: a headline alone, parts with the same label together."""
    panels: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        panels.setdefault(("", score.label) if score.part else (score.key, ""), []).append(score)
    return list(panels.values())


def read_curves(run: Path, x: str = "step") -> dict[str, Curve]:
    """Training loss, throughput and the metrics' scores from a run's metrics.jsonl, over `x`, which is
    interpolated in rows that lack it.

    Raises:
        InputError: there is no such file, or it has no metrics.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{run}: there is no {METRICS_FILE} in it; expected a run's folder")
    rows, declared = read_metrics(run), merge_declarations([run])
    drawn = (LOSS, SPEED, *(score.key for declaration in declared.values() for score in declaration.scores))
    curves: dict[str, Curve] = {}
    found = interpolate(rows, x)
    if rows and not found:
        raise InputError(f"{path}: no row has '{x}'; take another axis, as step")
    for row, place in zip(rows, found, strict=True):
        for key in drawn:
            if not is_number(value := row.get(key)):
                continue
            places, values = curves.setdefault(key, ([], []))
            places.append(place)
            values.append(float(value))
    if not curves:
        raise InputError(f"{path}: nothing to draw in it; the first line comes after train.log_every steps")
    return curves


def interpolate(rows: Sequence[dict], x: str) -> list[float]:
    """The value of `x` at every row's step, interpolated in rows that lack it; empty if all do."""
    known = [(row["step"], row[x]) for row in rows if is_number(row.get(x))]
    return np.interp([row["step"] for row in rows], *zip(*known, strict=True)).tolist() if known else []


def smooth(values: Sequence[float], share: float = SMOOTHED) -> list[float]:
    """A centred running mean over an odd number of points, about `share` of them; fewer near the ends."""
    reach = int(len(values) * share / 2)
    result = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)  # equally far to both sides, so that the ends do not lag
        window = values[i - near : i + near + 1]
        result.append(sum(window) / len(window))
    return result


def _draw(axis, score: Score, curves: Curves) -> None:
    drawn = False
    for number, (name, of_run) in enumerate(curves.items()):
        if score.key not in of_run:
            continue
        # a run has the same colour in all panels
        (places, values), colour, drawn = of_run[score.key], f"C{number}", True
        if score.key == LOSS:
            axis.plot(places, smooth(values), linewidth=1.6, label=name, zorder=3, color=colour)
            axis.plot(places, values, linewidth=0.6, alpha=0.3, color=colour)
        else:
            marker = "." if len(places) < 40 else None
            axis.plot(places, values, linewidth=1.4, marker=marker, label=name, color=colour)
    if not drawn:
        axis.text(0.5, 0.5, "not logged by these runs", transform=axis.transAxes, ha="center", color="grey")
        axis.set_yticks([])
    _finish(axis, score, f" ({score.better} is better)" if score.better else "")


def _draw_parts(axis, parts: Sequence[Score], curves: Curves) -> None:
    """Draw parts in one panel: one line style per part, one colour per run."""
    from matplotlib.lines import Line2D

    styles = dict(zip((score.key for score in parts), itertools.cycle(STYLES)))
    for number, of_run in enumerate(curves.values()):
        for key, style in styles.items():
            if key in of_run:
                axis.plot(*of_run[key], style, linewidth=1.2, color=f"C{number}")
    lines = [Line2D([], [], linestyle=style, color="grey") for style in styles.values()]
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1)}  # above the panel, beside its title
    names = [score.part for score in parts]
    axis.legend(lines, names, ncols=len(names), fontsize=8, frameon=False, borderaxespad=0, **place)
    _finish(axis, parts[0])


def _finish(axis, score: Score, direction: str = "") -> None:
    axis.set_title(score.label + direction, loc="left", fontsize=10)
    axis.set_ylabel(score.unit)
    if score.log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def name_runs(runs: Sequence[str | Path]) -> list[str]:
    """The shortest trailing parts of the runs' paths that are distinct."""
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    if len(set(parts)) < len(parts):
        raise InputError(f"a run is named twice: {', '.join(map(str, runs))}")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]
