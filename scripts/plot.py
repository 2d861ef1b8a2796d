"""Curves of runs in one PNG: python scripts/plot.py RUN … --output plot.png"""

import argparse

from pixart import cli
from pixart.evaluate.plots import plot_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", default="plot.png", help="the PNG to write")
    parser.add_argument("--log-x", action="store_true", help="steps on a logarithmic axis")
    arguments = parser.parse_args()
    plot_runs(arguments.runs, arguments.output, log_x=arguments.log_x)
    print(arguments.output)


if __name__ == "__main__":
    cli.run(main)
