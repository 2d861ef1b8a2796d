"""Measure reading from a feature store against the authors' layout, and an index of 25 million samples.

Prints samples per second for both layouts, and memory and start-up time of the simulated index.

examples:
    pixart benchmark_data
    pixart benchmark_data --samples 256 --index 0
"""

import argparse

CASES = [(256, (8, 32)), (256, (120, 120)), (1024, (8, 32)), (1024, (120, 120))]  # pixels, tokens from … to
KEEPS_MEMORY = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folder", help="where to write the files, several GB (default: the system's temporary folder)")
    add("--samples", type=int, default=1024, metavar="N", help="in each layout (default: 1024)")
    add("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read (default: 2)")
    add("--index", type=int, default=25_000_000, metavar="N", help="samples of the index; 0 leaves it out")


def main(arguments: argparse.Namespace) -> None:
    import json
    import tempfile
    from pathlib import Path

    from pixart.benchmark.features import compare_layouts, simulate_index

    options = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.index:  # first: it measures the process's peak memory
            print(json.dumps(simulate_index(Path(folder) / "index", arguments.index)))
        for resolution, tokens in CASES:
            result = compare_layouts(Path(folder) / "data", resolution, arguments.samples, tokens, **options)
            print(_describe(resolution, tokens, result), flush=True)


def _describe(resolution: int, tokens: tuple[int, int], result: dict) -> str:
    size = result["bytes"]
    rates = [
        f"{when} {of['store']:,.0f} against {of['official']:,.0f} samples/s, × {of['store'] / of['official']:.1f}"
        for when, of in result["samples_per_second"].items()
    ]
    return (
        f"{resolution} px, {tokens[0]}–{tokens[1]} tokens: store {size['store']:,.0f} bytes a sample, official "
        f"{size['official']:,.0f}; {'; '.join(rates)}"
    )
