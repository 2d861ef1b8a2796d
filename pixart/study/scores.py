"""Comparison of records of `pixart evaluate`, and the reasons why some of them cannot be compared."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from pixart.errors import InputError
from pixart.evaluate.record import SCORES, read_scores, why_incomparable


def are_records(sources: Sequence[str | Path]) -> bool:
    """Whether these are records of scores, or folders with one, and not runs."""
    return all((path / SCORES).is_file() or path.suffix == ".json" for path in map(Path, sources))


def compare_scores(sources: Sequence[str | Path]) -> str:
    """A Markdown table with a row for each record, and for each pair whether their intervals overlap.

    Raises:
        InputError: they have no metric in common, or were computed in ways that cannot be compared; says which.
    """
    records = {str(source): read_scores(source) for source in sources}
    if len(records) < 2:
        raise InputError("scores: got one record, expected at least two to compare")
    names = list(next(iter(records.values()))["metrics"])
    shared = [name for name in names if all(name in record["metrics"] for record in records.values())]
    if not shared:
        raise InputError(f"{' and '.join(records)} have no metric in common")
    for (a, first), (b, second) in combinations(records.items(), 2):
        for name in shared:
            if (why := why_incomparable(first, second, name)) is not None:
                raise InputError(f"{name} of {a} and of {b} cannot be compared: {why}; take both alike")
    keys = [key for key, score in next(iter(records.values()))["scores"].items() if score["metric"] in shared]
    lines = [f"| record | {' | '.join(keys)} |", "|" + " --- |" * (len(keys) + 1)]
    for source, record in records.items():
        lines.append(f"| {source} | {' | '.join(_cell(record['scores'][key]) for key in keys)} |")
    for key in keys:
        for (a, first), (b, second) in combinations(records.items(), 2):
            x, y = first["scores"][key], second["scores"][key]
            if None not in (x["low"], y["low"]) and x["better"] and (x["high"] < y["low"] or y["high"] < x["low"]):
                wins = a if (x["value"] < y["value"]) == (x["better"] == "lower") else b
                lines.append(f"\n{key}: {wins} is better; its 95 % interval and that of the other do not overlap")
    return "\n".join(lines)


def _cell(score: dict) -> str:
    interval = "" if score["low"] is None else f" ({score['low']:.4g} … {score['high']:.4g})"
    return f"{score['value']:.4g}{interval}"
