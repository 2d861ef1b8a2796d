"""Describe a checkpoint: what it is, and what of it would be refused.

examples:
    pixart describe runs/openmoji
    pixart describe PixArt-XL-2-512x512.pth
    pixart describe PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
"""

import argparse

from pixart import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="file, model, run, diffusers folder, or Hub id: owner/name[/file.pth]")
    parser.add_argument("--raw", action="store_true", help="a training checkpoint's raw weights, not the averaged ones")
    parser.add_argument("--revision", help="of a Hub repository")
    cli.add_extension(parser)
    cli.add_settings(parser, "num_heads=12, which no file says")


def main(arguments: argparse.Namespace) -> None:
    from pixart.checkpoint.describe import describe

    a = arguments
    overrides = cli.read_settings(a.set)
    print(describe(a.source, ema=not a.raw, revision=a.revision, overrides=overrides, extensions=a.extension))
