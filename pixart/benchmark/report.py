"""Reports of measurements: a table, JSON, a comparison with an older JSON, profiles."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pixart import files
from pixart.benchmark.measure import COMPILED, Call, Result, Settings
from pixart.config import names_with
from pixart.errors import InputError

COLUMNS = ("case", "program", "median", "spread", "ours is", "memory", "GFLOP/s", "of the product", "note")


def table(results: list[Result]) -> str:
    """A Markdown table; "ours is" is the speed of ours relative to the program of the row."""
    ours = {result.case: result.median for result in results if result.program == "ours" and not result.failed}
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for r in results:
        if r.failed:
            rows.append((r.case, r.program, r.failed, *[""] * (len(COLUMNS) - 4), r.note))
            continue
        seconds = sorted(r.seconds)
        rate = r.flops / r.median
        speed = f"{rate / 1e9:,.0f}" if r.flops else f"{r.bytes / r.median / 1e9:.1f} GB/s" if r.bytes else ""
        share = f"{rate / max(r.rates.values()):.0%}" if r.rates and r.flops else ""
        ratio = f"{r.median / ours[r.case]:.2f} ×" if r.case in ours and r.program != "ours" else ""
        rows.append(
            (
                r.case,
                r.program,
                duration(r.median),
                f"{duration(seconds[0])} … {duration(seconds[-1])}",
                ratio,
                memory(r),
                speed,
                share,
                r.note,
            )
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    products = {r.case: [f"{name} {rate / 1e9:,.0f}" for name, rate in r.rates.items()] for r in results if r.rates}
    products = [f"\n{case}: products in GFLOP/s, the fastest counts: {'; '.join(of)}" for case, of in products.items()]
    return "\n".join([*lines, *products, *paired_ratios(results), *compile_costs(results)])


def paired_ratios(results: list[Result]) -> list[str]:
    """A line for each program with the ratio of its time to that of ours, round by round: the median and its 95 %
    interval; none where there are too few rounds for one. A machine's load changes both times of a round, so this is
    steadier than a ratio of medians. CPU time hardly depends on other programs, but includes no waiting."""
    ours, lines = {r.case: r for r in results if r.program == "ours" and not r.failed}, []
    for r in results:
        if r.program == "ours" or r.failed or r.case not in ours:
            continue
        mine = ours[r.case]
        found = [("time", r.seconds, mine.seconds)]
        found += [] if r.settings.get("device", "cpu") != "cpu" else [("CPU time", r.cpu_seconds, mine.cpu_seconds)]
        said = []
        for what, theirs, own in found:
            ratios = [a / b for a, b in zip(theirs, own, strict=False) if b]
            if (interval := median_interval(ratios)) is not None:
                low, high = interval
                said.append(f"{what} {statistics.median(ratios):.3f} ({low:.3f} … {high:.3f})")
        if said:
            lines.append(f"\n{r.case}, {r.program} / ours, median ratio of {len(r.seconds)} rounds and 95 % interval: "
                         f"{'; '.join(said)}")  # fmt: skip
    return lines


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """An interval for the median of any continuous distribution, between two order statistics: x_(k) … x_(n+1-k) holds
    it with probability 1 - 2 P(Binomial(n, 1/2) < k) (Conover, Practical Nonparametric Statistics, 1999, 3.2).

    Returns:
        the narrowest with at least the confidence; None where even the whole range has less: up to 5 values, for 95 %.
    """
    n, found, below = len(values), None, 0.0
    ordered = sorted(values)
    for k in range(1, (n + 1) // 2 + 1):
        below += math.comb(n, k - 1) / 2**n
        if 1 - 2 * below < confidence:
            break
        found = ordered[k - 1], ordered[n - k]
    return found


def compile_costs(results: list[Result]) -> list[str]:
    """The cost of compiling, and the number of images after which it has paid off."""
    by_name = {(r.case, r.program): r for r in results}
    lines = []
    for r in results:
        eager = by_name.get((r.case, COMPILED.get(r.program)))
        if eager is None or eager.failed or r.failed:
            continue
        gain = eager.median - r.median
        calls = (r.first - r.median) / gain if gain > 0 else float("inf")
        pays = f"pays after {calls:,.0f} calls, {calls * r.images:,.0f} images" if gain > 0 else "never pays"
        lines.append(f"\n{r.case}, {r.program}: first call {duration(r.first)}; {pays}")
    return lines


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def memory(result: Result) -> str:
    if result.memory is None:
        return ""
    text = f"{result.memory / 1e9:.2f} GB"
    if result.case == "load" and result.bytes and result.before is not None:  # relative to the file's size
        text += f" ({(result.memory - result.before) / result.bytes:.2f} × the file)"
    return text


def write_json(results: list[Result], path: Path) -> None:
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    rows = [{**asdict(result), "median": result.median} for result in results if not result.failed]
    files.write_json(path, {"machine": machine, "results": rows}, indent=1)


def compare(results: list[Result], path: Path) -> str:
    """One line for each program that both measurements have at the same size: its speed now relative to then.

    Raises:
        InputError: the file was not written by `--json`, or nothing in it can be compared.
    """
    try:
        old = {_key(row): row["median"] for row in json.loads(path.read_text(encoding="utf-8"))["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a file that --json wrote ({error!r})") from None
    pairs = [(r, old[_key(asdict(r))]) for r in results if _key(asdict(r)) in old]
    if not pairs:
        raise InputError(f"{path}: none of its programs ran at the same size just now")
    return "\n".join(
        f"{r.case}, {r.program}: {duration(before)} → {duration(r.median)}, {before / r.median:.2f} × as fast"
        for r, before in pairs
    )


def _key(row: dict) -> tuple:
    free = names_with(Settings, "compare", "quiet")  # these do not change what the numbers mean
    settings = {key: value for key, value in row["settings"].items() if key not in free}
    settings["batch"] = row["images"]  # the number that None or "largest" resulted in
    return row["case"], row["program"], json.dumps(settings, sort_keys=True)


def profile(call: Call, name: str, folder: Path, *, cuda: bool) -> str:
    """Trace one call into `folder`/`name`.json, for chrome://tracing; returns a table of the top kernels."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=kinds) as profiler:
        call()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"{name}.json"))
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    top = profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
    (folder / f"{name}.txt").write_text(top, encoding="utf-8")
    return top
