"""Samples a second from a feature store and from the authors' layout; memory and start of an index of 25 M samples."""

from pixart.commands import run

if __name__ == "__main__":
    run("benchmark_data")
