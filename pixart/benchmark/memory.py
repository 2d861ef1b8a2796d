"""The peak memory of one program of one case, in this process: `measure_memory` starts it."""

import gc
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

from pixart.benchmark.cases import CASES
from pixart.benchmark.measure import WARM_UP, Settings, resident
from pixart.cpu import keep_freed_memory
from pixart.model import PixArt, PixArtConfig


def main(order: str) -> None:
    asked = json.loads(order)
    settings = Settings(**{**asked["settings"], "programs": tuple(asked["settings"]["programs"])})
    if settings.keep_memory:
        keep_freed_memory()
    PixArt(PixArtConfig(hidden_size=48, num_heads=4, depth=1))  # what the first network of a process imports
    case = CASES[asked["case"]](settings)
    gc.collect()
    with suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: what made the case is none of the program
    before = resident("VmRSS")
    call = case.programs[asked["program"]]()
    if settings.cuda:  # compiling and tuning take memory of their own, which no later call needs
        for _ in range(1 + WARM_UP):
            call()
        torch.cuda.reset_peak_memory_stats(settings.device)
    for _ in range(case.steps):
        call()
    peak = torch.cuda.max_memory_allocated(settings.device) if settings.cuda else resident("VmHWM")
    print(json.dumps([peak, 0 if settings.cuda else before]))


if __name__ == "__main__":
    main(sys.argv[1])
