"""One file a command: it adds its options, calls one function and prints what this returns.

A command is a module with a docstring (its help, with examples), `add_arguments(parser)` and `main(arguments)`. Modules
import what is slow to import inside `main`, so that help comes at once. Nothing that a program in Python could want may
enter it.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import NoReturn

from pixart import __version__, cli
from pixart.errors import did_you_mean
from pixart.invocation import command

COMMANDS = (
    "train", "estimate", "sample", "app", "evaluate", "compare", "study",
    "extract", "caption", "class_captions",
    "convert", "describe", "configs", "completion",
    "benchmark", "benchmark_data",
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> NoReturn:
    """`pixart NAME …`: run the command that the first word names and exit; without one, list all commands."""
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in COMMANDS:
        run(name, rest)
    if name in ("-h", "--help", "help", "--version"):
        with cli.closed_pipe_ends():
            print(__version__ if name == "--version" else overview())
        sys.exit(0)
    print(f"error: there is no command '{name}'{did_you_mean(name, COMMANDS)} ({', '.join(COMMANDS)})", file=sys.stderr)
    sys.exit(2)


def run(name: str, words: Sequence[str] | None = None) -> NoReturn:
    """Run one command with these words, by default this process's arguments, and exit as `cli.run` does.

    OpenMP's threads sleep while they wait for work, unless the environment says otherwise: threads that spin are hardly
    faster alone (a few %), and slow down whatever else runs on the same cores several times. OpenMP's library reads
    this once, when torch loads it, so it is set before a command imports torch.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with cli.closed_pipe_ends():
        arguments = make_parser(name).parse_intermixed_args(words)
    module = load(name)
    cli.run(partial(module.main, arguments), keep_memory=getattr(module, "KEEPS_MEMORY", False))


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"pixart.commands.{name}")


def make_parser(name: str) -> argparse.ArgumentParser:
    """The options of a command and its help, the module's docstring; its examples are written as for this process."""
    module = load(name)
    here = re.compile(r"^    pixart (\w+)", re.MULTILINE)
    parser = argparse.ArgumentParser(
        prog=command(name),
        description=here.sub(lambda example: f"    {command(example[1])}", module.__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def overview() -> str:
    """One line a command."""
    width, call = max(map(len, COMMANDS)), command("COMMAND")
    lines = [f"  {name:{width}}  {load(name).__doc__.splitlines()[0]}" for name in COMMANDS]
    return "\n".join([f"usage: {call} …", "", *lines, "", f"{call} --help explains a command, with examples."])
