"""Measure the speed of pixart and of diffusers side by side.

Cases: forward, backward, attention, cross, optimizer, train, lora, lora-sample, lora-load, beside, sample, lcm, decode,
encode, text, pipeline, page, page-pixels, load. Networks have random weights. From six rounds on, the ratios of times
are given with an interval.

examples:
    pixart benchmark forward backward --preset alpha-256 --size 256
    pixart benchmark train --config mine.yaml --programs ours "plain loop"
    pixart benchmark sample --device cuda --dtype bfloat16 --batch largest --json speed.json
"""

import argparse

from pixart import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("cases", nargs="+", metavar="CASE", help="see above")
    add("--preset", help="XL/2, S/2, alpha-256, sigma-1024, … (default: alpha-256)")
    add("--size", default="256", help="of images in pixels, 512 or 384x672 (height x width; default: 256)")
    add("--batch", help="number of images, or largest: as many as fit a GPU (default: 2)")
    add("--tokens", type=int, metavar="N", help="of a caption (default: 120)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32)")
    add("--device", help="(default: cpu)")
    add("--rounds", type=int, metavar="N", help="repetitions of all programs in turn (default: 3)")
    add("--text-width", type=int, metavar="N", help="of the random T5 (default: 512; XXL has 4096)")
    add("--text-layers", type=int, metavar="N", help="of the random T5 (default: 8; XXL has 24)")
    add("--config", help="of the case train (default: pixart:openmoji)")
    add("--source", help="model of the case load (default: random weights of the preset)")
    add("--programs", nargs="*", default=[], metavar="NAME", help="those to run, such as ours ours-compiled diffusers")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--return-memory", action="store_true", help="return freed memory to the system, as other programs do")
    add("--json", metavar="FILE", help="write all results")
    add("--compare", metavar="FILE", help="print what changed since the results in a file of --json")
    add("--profile", metavar="FOLDER", help="write a trace and the slowest kernels instead")


def main(arguments: argparse.Namespace) -> None:
    import os

    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # so that a first call includes compilation
    from pixart.benchmark.measure import Settings
    from pixart.benchmark.run import run

    a = arguments
    height, width = cli.read_size(a.size)
    names = ("preset", "tokens", "dtype", "device", "rounds", "text_width", "text_layers", "config", "source")
    settings = Settings(
        height=height,
        width=width,
        batch=cli.read_batch(a.batch),
        programs=tuple(a.programs),
        memory=not a.no_memory,
        keep_memory=not a.return_memory,
        **{name: value for name in names if (value := getattr(a, name)) is not None},
    )
    print(run(a.cases, settings, json=a.json, compare_with=a.compare, profile_into=a.profile))
