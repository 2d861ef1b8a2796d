"""Samples a second from a feature store and from the authors' layout; memory and start of an index of 25 M samples."""

import argparse
import json
import tempfile
from pathlib import Path

from pixart.benchmark.features import compare_layouts, simulate_index

CASES = [(256, (8, 32)), (256, (120, 120)), (1024, (8, 32)), (1024, (120, 120))]  # pixels, tokens from … to


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where to build the files (several GB); by default the system's for such")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--index", type=int, default=25_000_000, help="samples of the simulated index; 0 leaves it out")
    arguments = parser.parse_args()
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.index:  # first: it looks at the process's peak memory
            print(json.dumps(simulate_index(Path(folder) / "index", arguments.index)))
        for resolution, tokens in CASES:
            result = compare_layouts(Path(folder) / "data", resolution, arguments.samples, tokens, **options)
            size, rates = result["bytes"], result["samples_per_second"]
            print(
                f"{resolution} px, {tokens[0]}–{tokens[1]} tokens: store {size['store']:,.0f} bytes a sample, official "
                f"{size['official']:,.0f}; "
                + "; ".join(
                    f"{when} {rate['store']:,.0f} against {rate['official']:,.0f} samples/s, "
                    f"× {rate['store'] / rate['official']:.1f}"
                    for when, rate in rates.items()
                ),
                flush=True,
            )
    return 0
