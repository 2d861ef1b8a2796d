"""Say what a checkpoint is, and what would be refused: python scripts/describe.py SOURCE"""

import argparse

from pixart import cli
from pixart.checkpoint.describe import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="file, model, run, diffusers folder, or Hub id: owner/name[/file.pth]")
    parser.add_argument("--raw", action="store_true", help="a checkpoint's raw weights, not the averaged ones")
    parser.add_argument("--revision", help="of a Hub repository")
    parser.add_argument("--extension", action="append", default=[], metavar="FILE", help=cli.EXTENSION)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="what no file tells: num_heads=12")
    a = parser.parse_args()
    overrides = cli.read_settings(a.set)
    print(describe(a.source, ema=not a.raw, revision=a.revision, overrides=overrides, extensions=a.extension))
