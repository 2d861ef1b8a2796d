"""Runs side by side, as a table and as curves in one PNG: python scripts/plot.py RUN … --output plot.png"""

from pixart.commands import run

if __name__ == "__main__":
    run("plot")
