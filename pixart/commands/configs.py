"""List the configurations that come with pixart, or print one.

A configuration of your own starts from one of them with the line `base: pixart:NAME`.

examples:
    pixart configs
    pixart configs openmoji
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")


def main(arguments: argparse.Namespace) -> None:
    from pixart.shipped import PREFIX, find_shipped, shipped_configs

    if arguments.name is not None:
        print(find_shipped(arguments.name.removeprefix(PREFIX)).read_text(encoding="utf-8"), end="")
        return
    known = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in shipped_configs().items()}
    for name, first in known.items():
        print(f"{name:{max(map(len, known))}}  {first.lstrip('# ')}")
