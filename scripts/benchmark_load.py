"""Time and memory of loading: python scripts/benchmark_load.py SOURCE. Run it twice; the first may read the disk."""

import argparse
import re
import time
from pathlib import Path

import torch

from pixart import cli
from pixart.checkpoint.load import load_model
from pixart.checkpoint.locate import locate
from pixart.model import PixArt, PixArtConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="as load_model takes it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="cast; the file's own by default")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="what no file tells: num_heads=12")
    a = parser.parse_args()
    files = locate(a.source).weights.files
    buffer, start = bytearray(64 << 20), time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    read = time.perf_counter() - start
    del buffer
    PixArt(PixArtConfig(hidden_size=48, num_heads=4, depth=1))  # what the first network of a process imports
    before = _status("VmRSS")
    start = time.perf_counter()
    model = load_model(a.source, dtype=getattr(torch, a.dtype) if a.dtype else None, overrides=cli.read_settings(a.set))
    load = time.perf_counter() - start
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(f"weights {size / 2**20:,.0f} MB, peak over what was there {(_status('VmHWM') - before) / size:.3f} × them")
    print(f"load {load:.2f} s, reading the bytes {read:.2f} s, ratio {load / read:.2f}")


def _status(key: str) -> int:
    """Resident size now (VmRSS) or at its peak (VmHWM) in bytes, mapped pages included; Linux only. getrusage's peak
    starts at that of the process that forked this one."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    cli.run(main)
