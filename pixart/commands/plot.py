"""Runs side by side, as a table and as curves in one PNG: python scripts/plot.py RUN … --output plot.png"""

import argparse

from pixart import cli
from pixart.extensions import load_extensions
from pixart.study.compare import compare_runs
from pixart.study.plots import AXES, plot_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", default="plot.png", help="the PNG to write")
    parser.add_argument("--x", default="step", choices=AXES, help="what to draw over")
    parser.add_argument("--log-x", action="store_true", help="a logarithmic axis")
    parser.add_argument("--extension", action="append", default=[], metavar="FILE", help=cli.EXTENSION)
    arguments = parser.parse_args()
    load_extensions(arguments.extension)
    plot_runs(arguments.runs, arguments.output, x=arguments.x, log_x=arguments.log_x)
    print(compare_runs(arguments.runs), arguments.output, sep="\n\n")
