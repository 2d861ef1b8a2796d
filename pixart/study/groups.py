"""Runs that differ in their seed alone, as one group: means with intervals, and paired differences between groups."""

import json
from collections.abc import Mapping, Sequence

from pixart.config import flatten, meaning, to_dict
from pixart.evaluate.metric import Declaration
from pixart.study.plan import differences, why_incomparable
from pixart.study.statistics import mean_over_seeds, paired_difference
from pixart.study.tables import markdown_table
from pixart.train.config import TrainConfig
from pixart.train.metrics import is_number, last_value

CONFIDENCE = 0.95


def group_runs(names: Sequence[str], configs: Sequence[TrainConfig]) -> dict[str, list[int]]:
    """The numbers of the runs of each group, by the name of its first run. Runs of one group have equal settings, but
    for the seed and what does not change the experiment; a seed that occurs twice starts a group of its own."""
    groups: dict[str, list[int]] = {}
    found: dict[tuple[str, int], str] = {}
    for i, (name, config) in enumerate(zip(names, configs, strict=True)):
        settings = flatten(to_dict(config))
        kept = {k: v for k, v in settings.items() if k != "seed" and meaning(TrainConfig, k, "compare") != "quiet"}
        text, place = json.dumps(kept, sort_keys=True, default=str), 0
        while config.seed in {configs[j].seed for j in groups.get(found.get((text, place), ""), ())}:
            place += 1
        groups.setdefault(found.setdefault((text, place), name), []).append(i)
    return groups


def describe_groups(
    names: Sequence[str],
    configs: Sequence[TrainConfig],
    rows: Sequence[list[dict]],
    declared: Mapping[str, Declaration],
) -> list[str]:
    """The lines of a table of groups: of every headline score the mean ± the half-width of its interval, and the paired
    difference to the first group. Empty if no group has two runs."""
    groups = group_runs(names, configs)
    if all(len(runs) < 2 for runs in groups.values()):
        return []
    scores = [(of, score) for of in declared.values() for score in of.scores if not score.part]
    head = ["runs that differ in their seed alone", "seeds"]
    head += [title for _, score in scores for title in (score.key, "difference to the first")]
    body, first = [], next(iter(groups.values()))
    for name, runs in groups.items():
        row = [name, " ".join(str(configs[i].seed) for i in runs)]
        for declaration, score in scores:
            here, there = (
                {configs[i].seed: v for i in of if is_number(v := last_value(rows[i], score.key))}
                for of in (runs, first)
            )
            row += [_mean([*here.values()]), ""]
            keys = [*differences(configs[first[0]], configs[runs[0]])]
            if runs is not first and why_incomparable(declaration, keys) is None:
                row[-1] = _difference(here, there)
        body.append(row)
    note = "means ± the half-width of Student's 95 % interval; differences are of pairs of runs with the same seed"
    return ["", *markdown_table(head, body), "", note]


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = mean_over_seeds(values, CONFIDENCE)
    return f"{mean.value:.4g}" + ("" if mean.high is None else f" ± {mean.high - mean.value:.2g}")


def _difference(here: Mapping[int, float], there: Mapping[int, float]) -> str:
    found = paired_difference(here, there, CONFIDENCE)
    if found is None:
        return "no seed in common"
    return f"{found.mean:+.3g}" + ("" if found.low is None else f" ({found.low:+.3g} … {found.high:+.3g})")
