"""A study's report: report.md with PNGs, results.csv, results.json and table.tex in the study's folder."""

import csv
import io
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pixart.errors import InputError
from pixart.evaluate.interval import Estimate
from pixart.evaluate.metric import Score
from pixart.files import write_json, write_text
from pixart.invocation import command
from pixart.provenance import revision, versions
from pixart.study.curves import draw_study, write_study_sheets
from pixart.study.results import Results, confounded, size_of
from pixart.study.statistics import POWER
from pixart.study.tables import latex_table, markdown_table

REPORT, CSV, JSON, TEX, CURVES = "report.md", "results.csv", "results.json", "table.tex", "curves.png"


def write_report(results: Results, arguments: Sequence[str] = (), say: Callable[[str], None] = print) -> str:
    """Write the report of all finished runs → the text of report.md.

    Args:
        arguments: of `pixart study`, for the command that repeats the study.
    """
    study, folder = results.study, results.study.folder
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    if any(results.finished(arm) for arm in study.arms):
        try:
            draw_study(results, folder / CURVES)
            images = [CURVES]
        except InputError as error:
            say(f"warning: {CURVES} is not drawn: {error}")
        images += write_study_sheets(results, folder)
    text = "\n".join(_sections(results, images, arguments)) + "\n"
    write_text(folder / REPORT, text)
    write_text(folder / CSV, _csv(results))
    write_json(folder / JSON, to_record(results))
    write_text(folder / TEX, latex_table(*_result_table(results, exact=True)))
    return text


def to_record(results: Results) -> dict:
    """All results as JSON has them."""
    study = results.study
    arms = {}
    for name, arm in study.arms.items():
        means = {key: results.mean(name, key) for key in results.scores}
        arms[name] = {
            "settings": arm.written,
            "differs": {key: list(pair) for key, pair in arm.differing.items()},
            "confounded": list(confounded(arm)),
            "steps": arm.config.train.steps,
            **size_of(arm.config),
            "runs": {
                str(seed): {"status": v.status, "final": v.final, "best": v.best, **v.costs, "fingerprints": v.prints}
                for seed, v in results.values[name].items()
            },
            "means": {key: _interval(mean) for key, mean in means.items() if mean is not None},
        }
    comparisons = [
        {
            "arm": one.arm, "score": one.score.key, "seeds": list(one.difference.seeds), "mean": one.difference.mean,
            "low": one.difference.low, "high": one.difference.high, "p": one.difference.p, "p_holm": one.corrected,
            "detectable": one.difference.detectable, "margin": one.margin, "verdict": one.verdict,
        }
        for one in results.comparisons
    ]  # fmt: skip
    return {
        "study": str(study.file),
        "baseline": study.baseline.name,
        "planted": study.config.planted,
        "planted_was_found": results.planted_was_found,
        "confidence": study.config.confidence,
        "arms": arms,
        "comparisons": comparisons,
        "untested": study.untested,
        "versions": versions() | {"revision": revision()},
    }


def _interval(mean: Estimate) -> dict:
    return {"mean": mean.value, "low": mean.low, "high": mean.high}


# ------------------------------------------------------------------------------------------------------------ sections


def _sections(results: Results, images: Sequence[str], arguments: Sequence[str]) -> Iterable[str]:
    study, config = results.study, results.study.config
    count = sum(v.finished for of in results.values.values() for v in of.values())
    yield f"# {study.file.stem}\n"
    budget = {key: value for key, value in vars(config.budget).items() if value is not None}
    spent = (
        ", ".join(f"{value:g} {key}" for key, value in budget.items()) or f"{study.baseline.config.train.steps} steps"
    )
    yield (
        f"{len(study.arms)} arms × {len(config.seeds)} seeds, {spent} each; {count} of {len(study.runs)} runs are "
        "finished. "
        f"Baseline: {study.baseline.name}.\n"
    )
    for arm, value in config.spent.items():
        yield f"{arm} has spent {value:g} {next(iter(budget))} of its budget before its first step.\n"
    yield from _findings(results)
    yield "\n## Results\n"
    if config.confidence is not None:
        yield f"Means over seeds, ± the half-width of Student's {_percent(config.confidence)} interval.\n"
    yield from markdown_table(*_result_table(results))
    yield "\n## Differences to the baseline\n"
    yield from _differences(results)
    yield "\n## Cost\n"
    yield from markdown_table(*_cost_table(results))
    yield "\nFLOPs are those of the networks; a training step is forward and backward, of a whole batch.\n"
    for name in images:
        yield f"![{Path(name).stem}]({name})\n"
    yield "## Settings\n"
    yield from _settings(results)
    yield "\n## Provenance\n"
    yield from _provenance(results, arguments)


def _findings(results: Results) -> Iterable[str]:
    """What was found, one line for each comparison, and what the reader must know before believing it."""
    study = results.study
    for one in results.comparisons:
        found = one.difference
        interval = "" if found.low is None else f" ({_signed(found.low)} … {_signed(found.high)})"
        yield f"- **{one.arm}**, {one.score.key}: {_signed(found.mean)}{interval}: {one.verdict}."
    if study.config.planted is not None:
        text = {
            None: "has no results yet",
            True: "is found to be worse, as it must be",
            False: "is **not** found to be worse: this study is too small to show even that",
        }[results.planted_was_found]
        yield f"- The planted arm '{study.config.planted}' {text}."
    for name, arm in study.arms.items():
        if keys := confounded(arm):
            yield f"- '{name}' changes {len(keys)} settings at once ({', '.join(keys)}): none alone explains it."
        for seed, values in results.values[name].items():
            if values.failed and not values.finished:
                yield f"- '{name}', seed {seed}, failed: {values.failed}"
            elif values.finished and (lost := [key for key in study.tested if key not in values.final]):
                yield f"- '{name}', seed {seed}, has no finite {', '.join(lost)}; it is not in the means of these."


def _result_table(results: Results, *, exact: bool = False) -> tuple[list[str], list[list[str]]]:
    scores = [score for score in results.scores.values() if not exact or not score.part]
    head = ["arm", "seeds"]
    for score in scores:
        head += [_title(score)]
        if _has_best(results, score) and not exact:
            head += [f"best {score.key}"]
    rows = []
    for name in results.study.arms:
        row = [name, str(len(results.finished(name)))]
        for score in scores:
            row.append(_plus_minus(results.mean(name, score.key)))
            if _has_best(results, score) and not exact:
                row.append(_plus_minus(results.mean(name, score.key, "best")))
        rows.append(row)
    return head, rows


def _has_best(results: Results, score: Score) -> bool:
    """Whether its best value is another than its last, in some run."""
    runs = [v for of in results.values.values() for v in of.values() if v.finished]
    return not score.part and any(v.best.get(score.key) not in (None, v.final.get(score.key)) for v in runs)


def _title(score: Score) -> str:
    return score.key + (f" ({score.better} is better)" if score.better and not score.part else "")


def _differences(results: Results) -> Iterable[str]:
    if not results.comparisons:
        yield "No pair of runs of one seed is finished yet."
        return
    head = ["arm", "score", "pairs", "difference", "interval", "p", "p (Holm)", "detectable", "verdict"]
    rows = []
    for one in results.comparisons:
        found = one.difference
        interval = "" if found.low is None else f"{_signed(found.low)} … {_signed(found.high)}"
        numbers = [_number(value) for value in (found.p, one.corrected, found.detectable)]
        rows.append(
            [one.arm, one.score.key, str(len(found.seeds)), _signed(found.mean), interval, *numbers, one.verdict]
        )
    yield from markdown_table(head, rows)
    level = results.study.config.confidence
    if level is not None:
        yield (
            f"\nDifferences are means over pairs of runs with the same seed, with Student's {_percent(level)} "
            "interval. P is two-sided; p (Holm) is corrected for the number of lines of this table. A difference of "
            f'the size "detectable" is found with a probability of {_percent(POWER)} by so many pairs of this spread.'
        )
    for key, why in results.study.untested.items():
        yield f"\n{key} is not tested: {why}."


def _cost_table(results: Results) -> tuple[list[str], list[list[str]]]:
    head = [
        "arm",
        "parameters",
        "GFLOP forward",
        "TFLOP step",
        "steps",
        "images",
        "images/s",
        "device-hours",
        "memory GB",
    ]
    rows = []
    for name, arm in results.study.arms.items():
        size = size_of(arm.config)
        costs = [results.mean(name, key, "costs") for key in ("images", "images_per_second", "gpu_hours", "memory_gb")]
        numbers = ["" if mean is None else f"{mean.value:.4g}" for mean in costs]
        numbers[0] = "" if costs[0] is None else f"{costs[0].value:.0f}"
        sizes = [
            _millions(size["parameters"]),
            f"{size['forward_flops'] / 1e9:.4g}",
            f"{size['step_flops'] / 1e12:.4g}",
        ]
        rows.append([name, *sizes, str(arm.config.train.steps), *numbers])
    return head, rows


def _settings(results: Results) -> Iterable[str]:
    """Each arm's settings that differ from the baseline's."""
    study = results.study
    keys = list(dict.fromkeys(key for arm in study.arms.values() for key in arm.differing))
    if not keys:
        yield "All arms have the same settings."
        return
    base = {key: pair[0] for arm in study.arms.values() for key, pair in arm.differing.items()}
    rows = []
    for key in keys:
        values = [arm.differing[key][1] if key in arm.differing else base[key] for arm in study.arms.values()]
        rows.append([key, *(json.dumps(value, ensure_ascii=False, default=str) for value in values)])
    yield from markdown_table(["setting", *study.arms], rows)


def _provenance(results: Results, arguments: Sequence[str]) -> Iterable[str]:
    study = results.study
    finished = [v for of in results.values.values() for v in of.values() if v.finished]
    for what in ("code", "samples", "held_out"):
        prints = sorted({v.prints[what] for v in finished if what in v.prints})
        if len(prints) > 1 and what != "samples":
            yield f"- **{what}**: the runs differ: {', '.join(prints)}"
        elif prints:
            yield f"- {what}: {', '.join(prints)}"
    yield f"- packages: {', '.join(f'{name} {version}' for name, version in versions().items())}"
    yield f"- every run's full configuration: ARM/seed_N/config.yaml in this folder; numbers: {CSV}, {JSON}, {TEX}"
    words = [command("study"), *(shlex.quote(word) for word in arguments or [str(study.file)])]
    yield f"- repeat it: `{' '.join(words)}`"


def _csv(results: Results) -> str:
    keys, costs = [*results.scores], ["step", "images", "images_per_second", "gpu_hours", "memory_gb"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", "status", *costs, *keys, *(f"best_{key}" for key in keys)])
    for name, of in results.values.items():
        for seed, v in of.items():
            numbers = [v.costs.get(key, "") for key in costs]
            numbers += [v.final.get(key, "") for key in keys] + [v.best.get(key, "") for key in keys]
            writer.writerow([name, seed, v.status, *numbers])
    return text.getvalue()


def _plus_minus(mean: Estimate | None) -> str:
    if mean is None:
        return ""
    return f"{mean.value:.4g}" if mean.low is None else f"{mean.value:.4g} ± {mean.high - mean.value:.2g}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _millions(count: float) -> str:
    return f"{count / 1e6:.4g} M"
