"""A study's curves: the mean over seeds of every score, with a band for its interval, and its sheets of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pixart.errors import missing_extra
from pixart.evaluate.metric import Score
from pixart.files import write_file, write_png
from pixart.study.plan import Arm, step_flops
from pixart.study.plots import AXES, LOSS, SMOOTHED, interpolate, smooth
from pixart.study.results import Results, RunValues
from pixart.study.statistics import mean_over_seeds
from pixart.train.metrics import is_number

COLUMNS = {"step": AXES["step"], "images": AXES["images"], "flops": "training FLOPs", "gpu_hours": AXES["gpu_hours"]}
LABEL = 18  # height of an arm's name above its sheet, in pixels

Point = tuple[float, float, float, float]  # x, mean, and the interval's ends


def mean_curve(arm: Arm, runs: Sequence[RunValues], key: str, x: str, confidence: float | None) -> list[Point]:
    """The mean of a logged number over an arm's runs at every step that all of them logged."""
    logged = []  # of each run: step → (x, value)
    for run in runs:
        places = interpolate(run.rows, "step" if x == "flops" else x)
        logged.append({
            row["step"]: (place, row[key])
            for row, place in zip(run.rows, places, strict=False)
            if is_number(row.get(key))
        })  # fmt: skip
    scale = step_flops(arm.config) if x == "flops" else 1
    found: list[Point] = []
    for step in sorted(set.intersection(*(set(of) for of in logged))) if logged else ():
        places, values = zip(*(of[step] for of in logged), strict=True)
        mean = mean_over_seeds(values, confidence)
        ends = (mean.value, mean.value) if mean.low is None or mean.high is None else (mean.low, mean.high)
        found.append((scale * sum(places) / len(places), mean.value, *ends))
    return found


def draw_study(results: Results, target: Path) -> None:
    """Draw the training loss and every score but parts over steps, images, FLOPs and device-hours into one PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "drawing curves") from None
    scores = [score for score in results.scores.values() if not score.part]
    shown = [Score(LOSS, f"training loss, running mean over {SMOOTHED:.0%} of its points"), *scores]
    figure = Figure(figsize=(4 * len(COLUMNS), 3 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), len(COLUMNS), squeeze=False, sharey="row", sharex="col")
    for axis, label in zip(axes[-1], COLUMNS.values(), strict=True):
        axis.set_xlabel(label)
    for score, row in zip(shown, axes, strict=True):
        for x, axis in zip(COLUMNS, row, strict=True):
            _draw_arms(axis, results, score, x)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if score.log:
                axis.set_yscale("log")
        better = f" ({score.better} is better)" if score.better else ""
        row[0].set_title(score.label + better, loc="left", fontsize=10)
        row[0].set_ylabel(score.unit)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    write_file(target, lambda path: figure.savefig(path, dpi=90, format="png"))


def _draw_arms(axis: Any, results: Results, score: Score, x: str) -> None:
    for number, arm in enumerate(results.study.arms.values()):
        runs = results.finished(arm.name)
        curve = mean_curve(arm, runs, score.key, x, results.study.config.confidence)
        if not curve:
            continue
        places, means, low, high = (list(part) for part in zip(*curve, strict=True))
        if score.key == LOSS:
            means, low, high = smooth(means), smooth(low), smooth(high)
        marker = "." if len(places) < 40 else None
        axis.plot(places, means, marker=marker, linewidth=1.4, color=f"C{number}", label=arm.name)
        if len(runs) > 1 and len(places) == 1:  # a band would have no width
            bars = [[means[0] - low[0]], [high[0] - means[0]]]
            axis.errorbar(places, means, yerr=bars, color=f"C{number}", capsize=3, linewidth=1)
        elif len(runs) > 1:
            axis.fill_between(places, low, high, alpha=0.2, color=f"C{number}", linewidth=0)


def write_study_sheets(results: Results, folder: Path) -> list[str]:
    """Sheets of the same prompts and seeds side by side, one PNG for each kind of sheet that the runs wrote at their
    end, of the first seed that all arms have finished → their names."""
    arms = [arm for arm in results.study.arms if results.finished(arm)]
    seeds = [seed for seed in results.study.config.seeds if all(results.values[arm][seed].finished for arm in arms)]
    if not arms or not seeds:
        return []
    kinds: dict[str, dict[str, Path]] = {}
    for arm in arms:
        for kind, path in _last_sheets(results.values[arm][seeds[0]].run.folder).items():
            kinds.setdefault(kind, {})[arm] = path
    for kind, sheets in kinds.items():
        _join(sheets, folder / f"{kind}.png")
    return [f"{kind}.png" for kind in kinds]


def _last_sheets(run: Path) -> dict[str, Path]:
    """The newest sheet of each kind in a run's folder: "samples", and those of its metrics."""
    found = {path.stem.rpartition("_")[0]: path for path in sorted((run / "evaluation").glob("*_*.png"))}
    samples = sorted((run / "samples").glob("step_*.png"))
    return found | ({"samples": samples[-1]} if samples else {})


def _join(sheets: dict[str, Path], target: Path) -> None:
    images = {arm: Image.open(path) for arm, path in sheets.items()}
    texts = {key: str(text) for image in images.values() for key, text in getattr(image, "text", {}).items()}
    width = max(image.width for image in images.values())
    whole = Image.new("RGB", (width, sum(image.height + LABEL for image in images.values())), "white")
    draw, font, top = ImageDraw.Draw(whole), ImageFont.load_default(size=13), 0
    for arm, image in images.items():
        draw.text((5, top + 2), arm, fill="black", font=font)
        whole.paste(image.convert("RGB"), (0, top + LABEL))
        top += LABEL + image.height
    write_png(target, whole, texts, durable=False)
