"""Records of scores: everything that a score depends on, its interval, and a sentence for a paper."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixart.errors import InputError
from pixart.evaluate.image_metric import ImageMetric, Item, Task
from pixart.evaluate.interval import GROUPS, Estimate
from pixart.evaluate.metric import Score
from pixart.files import digest_text, read_json, to_json

FORMAT = 1
SCORES = "scores.json"
# two records can be compared if these agree; what drew the images may differ, since that is what is compared
SAME = ("images", "size", "prompts", "protocol")
NEEDED = ("format", "scores", "images", "size", "prompts", "seeds", "drawn_with", "metrics", "protocol")


def describe_images(items: Sequence[Item], size: tuple[int, int], protocol: str | None) -> dict[str, Any]:
    """The images that were asked for: number, size, prompts, seeds, protocol."""
    prompts = [item.prompt for item in items]
    seeds = [item.seed for item in items]
    known = None not in prompts
    return {
        "images": len(items),
        "size": f"{size[0]}x{size[1]}",
        "prompts": {"distinct": len(set(prompts)), "hash": digest_text(to_json(prompts))} if known else None,
        "seeds": None if None in seeds else {"first": seeds[0], "last": seeds[-1], "hash": digest_text(to_json(seeds))},
        "protocol": protocol,
    }


def make_record(
    plan: Mapping[str, Any],
    metrics: Mapping[str, ImageMetric],
    estimates: Mapping[str, Mapping[str, Estimate]],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of finished scores; `plan` was fixed before anything was drawn."""
    scores: dict[str, dict] = {}
    for name, metric in metrics.items():
        declared = {score.key: score for score in metric.declaration.scores}
        for key, estimate in estimates[name].items():
            score = declared.get(key, Score(key, key))
            scores[key] = {"metric": name, "label": score.label, "better": score.better, **asdict(estimate)}
    record = {
        "format": FORMAT,
        "scores": scores,
        "interval": f"95 %, for the expected value at this number of images and with this reference: jackknife over "
        f"{GROUPS} groups of prompts, for rates Wilson's (widened if draws of one prompt are alike)",
        **plan,
        "run": dict(run),
    }
    record["sentences"] = {key: sentence(record, key) for key, score in scores.items() if score["better"]}
    return record


def sentence(record: Mapping[str, Any], key: str) -> str:
    """A sentence that reports one score in a paper."""
    score, drawn, prompts = record["scores"][key], record["drawn_with"], record["prompts"]
    facts = record["metrics"][score["metric"]]
    interval = "" if score["low"] is None else f" (95 % interval {score['low']:.4g} to {score['high']:.4g})"
    settings = ", ".join(
        f"{name} {drawn[name]}" if name != "sampler" else str(drawn[name])
        for name in ("sampler", "steps", "guidance", "model")
        if name in drawn
    )
    parts = [f"{record['images']} images of {record['size'].replace('x', '×')} px (height × width)"]
    parts += [f"drawn with {settings}"] if settings else ["drawn elsewhere"]
    if prompts is not None:
        parts.append(f"{prompts['distinct']} prompts (SHA-256 {prompts['hash'][:12]})")
    if (seeds := record["seeds"]) is not None:
        parts.append(f"seeds {seeds['first']} to {seeds['last']}")
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in facts.items()]
    parts += [f"protocol {record['protocol']}"] if record["protocol"] else []
    return f"{score['label']} {score['value']:.4g}{interval}: {'; '.join(parts)}."


def read_scores(source: str | Path) -> dict[str, Any]:
    """Read a record from its file, or from the folder that contains it.

    Raises:
        InputError: it is not a record.
    """
    path = Path(source)
    path = path / SCORES if path.is_dir() else path
    record = read_json(path, expected="a record of pixart evaluate")
    if missing := [key for key in NEEDED if key not in record]:
        raise InputError(f"{path}: no record of pixart evaluate: there is no '{missing[0]}'")
    return record


def why_incomparable(a: Mapping[str, Any], b: Mapping[str, Any], metric: str) -> str | None:
    """Why a metric of two records cannot be compared; None if it can."""
    for key in SAME:
        if a[key] != b[key]:
            return f"{key} differ: {_brief(a[key])} and {_brief(b[key])}"
    ours, theirs = a["metrics"][metric], b["metrics"][metric]
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            return f"{key.replace('_', ' ')} differ: {_brief(ours.get(key))} and {_brief(theirs.get(key))}"
    return None


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else to_json(value)
    return text if len(text) <= 60 else text[:57] + "…"


def describe_task(task: Task, metrics: Mapping[str, ImageMetric], protocol: str | None) -> dict[str, Any]:
    """The part of a plan that does not depend on what draws the images."""
    return {
        **describe_images(task.items, task.size, protocol),
        "metrics": {name: metric.facts() for name, metric in metrics.items()},
    }
