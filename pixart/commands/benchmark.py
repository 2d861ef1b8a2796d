"""Ours and diffusers side by side: python scripts/benchmark.py forward backward --preset alpha-256 --size 256"""

import argparse
import os

from pixart import cli
from pixart.benchmark.cases import CASES
from pixart.benchmark.measure import Settings
from pixart.benchmark.run import run


def main() -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", metavar="case", help=", ".join(CASES))
    parser.add_argument("--preset", default=default.preset, help="XL/2, S/2, alpha-256, sigma-1024, …")
    parser.add_argument("--size", default="256", help="of pictures in pixels, 512 or 384x672 (height x width)")
    parser.add_argument("--batch", help="pictures, or largest: the most that fit a GPU; default 2")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of a caption")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default.dtype)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--text-width", type=int, default=default.text_width, help="of the random T5")
    parser.add_argument("--text-layers", type=int, default=default.text_layers)
    parser.add_argument("--config", default=default.config, help="of the case train")
    parser.add_argument("--source", help="of the case load, as load_model takes it; random weights by default")
    parser.add_argument("--programs", nargs="*", default=[], help="those to run, such as ours ours-compiled diffusers")
    parser.add_argument("--no-memory", action="store_true", help="leave out the run for peak memory")
    parser.add_argument("--return-memory", action="store_true", help="give freed memory back, as other programs do")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--compare", metavar="OLD", help="say what changed since a file of --json")
    parser.add_argument("--profile", metavar="FOLDER", help="write a trace and the top kernels instead")
    a = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a first call is one that compiles
    height, width = cli.read_size(a.size)
    settings = Settings(
        preset=a.preset, height=height, width=width, batch=cli.read_batch(a.batch), tokens=a.tokens, dtype=a.dtype,
        device=a.device, rounds=a.rounds, text_width=a.text_width, text_layers=a.text_layers, config=a.config,
        source=a.source, programs=tuple(a.programs), memory=not a.no_memory, keep_memory=not a.return_memory,
    )  # fmt: skip
    print(run(a.cases, settings, json=a.json, compare_with=a.compare, profile_into=a.profile))
