"""Measures the peak memory of one program of one case in this process, which `measure_memory` starts."""

import gc
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

from pixart.benchmark.cases import CASES
from pixart.benchmark.measure import WARM_UP, Settings
from pixart.cpu import keep_freed_memory
from pixart.device import resident
from pixart.model import PixArt, PixArtConfig


def main(order: str) -> None:
    asked = json.loads(order)
    settings = Settings(**{**asked["settings"], "programs": tuple(asked["settings"]["programs"])})
    if settings.keep_memory:
        keep_freed_memory()
    PixArt(PixArtConfig(hidden_size=48, num_heads=4, depth=1))  # triggers the imports of a process's first network
    case = CASES[asked["case"]](settings)
    gc.collect()
    with suppress(OSError):  # exists only on Linux
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, to leave out what built the case
    before = resident("VmRSS")
    call = case.programs[asked["program"]]()
    if settings.cuda:  # compiling and tuning use memory that later calls do not need
        for _ in range(1 + WARM_UP):
            call()
        torch.cuda.reset_peak_memory_stats(settings.device)
    for _ in range(case.steps):
        call()
    peak = torch.cuda.max_memory_allocated(settings.device) if settings.cuda else resident("VmHWM")
    print(json.dumps([peak, 0 if settings.cuda else before]))


if __name__ == "__main__":
    main(sys.argv[1])
