"""Compare runs: a table of results and differing settings, and their curves in one PNG.

Records of `pixart evaluate`, or folders of them, are compared instead if all arguments are such; records that were
taken in different ways are refused.

examples:
    pixart compare runs/a runs/b
    pixart compare runs/a runs/b --output loss.png --x gpu_hours --log-x
    pixart compare runs/a/evaluation/fid runs/b/evaluation/fid
"""

import argparse

from pixart import cli

AXES = ("step", "images", "gpu_hours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a record of scores")
    parser.add_argument("--output", default="compare.png", metavar="FILE", help="the PNG (default: compare.png)")
    parser.add_argument("--x", default="step", choices=AXES, help="horizontal axis of the curves (default: step)")
    parser.add_argument("--log-x", action="store_true", help="make it logarithmic")
    cli.add_extension(parser)


def main(arguments: argparse.Namespace) -> None:
    from pixart.extensions import load_extensions
    from pixart.study.compare import compare_runs
    from pixart.study.plots import plot_runs
    from pixart.study.scores import are_records, compare_scores

    if are_records(arguments.runs):
        print(compare_scores(arguments.runs))
        return
    load_extensions(arguments.extension)
    print(compare_runs(arguments.runs), flush=True)
    plot_runs(arguments.runs, arguments.output, x=arguments.x, log_x=arguments.log_x)
    print(f"\n{arguments.output}")
