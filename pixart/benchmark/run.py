"""Measures cases one after the other and returns a report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pixart.benchmark.cases import CASES
from pixart.benchmark.measure import (
    COMPILED,
    WARM_UP,
    Result,
    Settings,
    free,
    largest_batch,
    measure,
    measure_memory,
)
from pixart.benchmark.report import compare, profile, table, write_json
from pixart.cpu import keep_freed_memory
from pixart.errors import InputError


def run(
    names: Sequence[str],
    settings: Settings,
    *,
    json: str | None = None,
    compare_with: str | None = None,
    profile_into: str | None = None,
) -> str:
    """Measure, or with `profile_into` trace, and return the text to print.

    Raises:
        InputError: there is no such case or program, or `compare_with` holds nothing to compare.
    """
    if unknown := [name for name in names if name not in CASES]:
        raise InputError(f"there is no case '{unknown[0]}'; there are {', '.join(CASES)}")
    if compare_with is not None and not Path(compare_with).is_file():
        raise InputError(f"{compare_with}: there is no such file; expected one that --json wrote")
    if settings.keep_memory:
        keep_freed_memory()
    if profile_into is not None:
        return "\n\n".join(_profile(name, settings, Path(profile_into)) for name in names)
    results: list[Result] = []
    for name in names:
        chosen = _sized(name, settings)
        case = CASES[name](chosen).choose(settings.programs)
        found, memory = measure(case, chosen), settings.memory and case.memory
        results += found
        case = None
        free()
        for result in found if memory else []:
            if not result.failed:
                _add_memory(result, chosen)
    text = table(results)
    if json is not None:
        write_json(results, Path(json))
    if compare_with is not None:
        text += "\n\n" + compare(results, Path(compare_with))
    return text


def _sized(name: str, settings: Settings) -> Settings:
    """The settings with a number instead of "largest"."""
    if settings.batch != "largest":
        return settings
    if name in ("optimizer", "load", "lora-load"):
        raise InputError(f"batch largest: case {name} has no images")
    return replace(settings, batch=largest_batch(lambda batch: _fits(name, settings, batch)))


def _add_memory(result: Result, settings: Settings) -> None:
    """Add a program's peak memory, or a note why it could not be measured; its times are kept either way."""
    try:
        result.memory, result.before = measure_memory(result.case, result.program, settings)
    except InputError as error:
        result.note = "; ".join(filter(None, [result.note, str(error)]))


def _profile(name: str, settings: Settings, folder: Path) -> str:
    settings = _sized(name, settings)
    case = CASES[name](settings).choose(settings.programs)
    tables = []
    for program, make in case.programs.items():
        call = make()
        for _ in range(1 + (WARM_UP if program in COMPILED else 0)):
            call()
        top = profile(call, f"{name}-{program}".replace(" ", "-"), folder, cuda=settings.cuda)
        tables.append(f"{name}, {program}\n{top}")
        free()
    return "\n".join(tables)


def _fits(name: str, settings: Settings, batch: int) -> bool:
    """Whether all programs of a case fit the device at the same time, as needed for timing. Only the eager programs
    are tried, because compiling takes minutes."""
    try:
        case = CASES[name](replace(settings, batch=batch))
        calls = {}
        for program in case.choose(settings.programs).programs:
            eager = COMPILED.get(program, program)
            calls[program] = case.programs[eager]()
            for _ in range(case.steps):
                calls[program]()
    except torch.OutOfMemoryError:
        return False
    finally:
        case = calls = None
        free()
    return True
