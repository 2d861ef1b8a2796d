"""What the commands share: options, errors as one line, prompts from files, shares of work. It imports no torch."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pixart.console import print_anything
from pixart.errors import InputError, LostProcess, disk_problem
from pixart.files import read_bytes
from pixart.unicode import decode_text

if TYPE_CHECKING:
    import torch


@contextmanager
def closed_pipe_ends() -> Iterator[None]:
    """A context in which a reader of standard output that has enough, as `| head -1`, ends the process without a
    message, as it ends other programs: with 128 + SIGPIPE."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        sys.exit(141)


def run(main: Callable[[], int | None], *, keep_memory: bool = True) -> NoReturn:
    """Call `main` and exit with what it returns. For wrong input, or a disk that cannot be written, one line is
    printed, with PIXART_TRACEBACK=1 a traceback.

    With `keep_memory` the process keeps memory that it has freed for its next allocations, see `keep_freed_memory`.
    """
    print_anything()
    if keep_memory:
        from pixart.cpu import keep_freed_memory

        keep_freed_memory()
    try:
        with closed_pipe_ends():
            code = main()
    except InputError as error:
        if os.environ.get("PIXART_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        problem = disk_problem(error)
        if problem is None or os.environ.get("PIXART_TRACEBACK"):
            raise
        print(f"error: {problem}", file=sys.stderr)
        code = 2
    except LostProcess as error:
        if os.environ.get("PIXART_TRACEBACK"):
            raise
        resume = "The checkpoints are unchanged; the same command resumes the run"
        print(f"error: {error}. {resume}", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary exit may wait for the process that is gone
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def add_share(parser: argparse.ArgumentParser) -> None:
    """Options for `find_rank`."""
    parser.add_argument(
        "--rank", type=int, metavar="N", help="this process's share, from 0; by default from its environment"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="number of processes")


def add_extension(parser: argparse.ArgumentParser) -> None:
    """An option for `load_extensions`."""
    text = "a Python file of your own that registers parts of the model; may be repeated"
    parser.add_argument("--extension", action="append", default=[], metavar="FILE", help=text)


def add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """An option for `read_settings`."""
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="key=value", help=f"e.g. {example}")


def add_no_onednn(parser: argparse.ArgumentParser) -> None:
    text = "on a CPU in fp32: use torch's own matrix product, which is nearer to the authors' numbers but slower"
    parser.add_argument("--no-onednn", dest="onednn", action="store_false", help=text)


def find_rank(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """(rank, number of processes): those given, else those of torchrun, a Slurm array or srun, else (0, 1).

    Raises:
        InputError: one of the two is missing, or they do not fit together.
    """
    if rank is None and ranks is None:
        environment = os.environ
        try:
            if "RANK" in environment:
                rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            elif "SLURM_ARRAY_TASK_ID" in environment:
                first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{n}", d)) for n, d in (("MIN", 0), ("STEP", 1)))
                rank = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
                ranks = int(environment["SLURM_ARRAY_TASK_COUNT"])
            elif "SLURM_STEP_NUM_TASKS" in environment:  # which srun sets, and a batch script does not have
                rank, ranks = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
            else:
                rank, ranks = 0, 1
        except (KeyError, ValueError) as error:
            raise InputError(f"rank: the environment does not say it ({error}); give --rank and --ranks") from None
    if rank is None or ranks is None or not 0 <= rank < ranks:
        raise InputError(f"rank: got {rank} of {ranks}, expected both --rank and --ranks, with 0 ≤ rank < ranks")
    return rank, ranks


def find_device() -> "torch.device":
    """This process's GPU, or the CPU if there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(place) % torch.cuda.device_count())


def name_device(asked: str | None) -> str:
    """The device asked for, by default that of `find_device`; "cuda" without a number is this process's own GPU."""
    device = find_device()
    return str(device) if asked is None or (asked == "cuda" and device.type == "cuda") else asked


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a dict; values as in YAML."""
    import yaml

    settings = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InputError(f"--set {text}: expected key=value, as in num_heads=12")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {text}: '{value}' is not a YAML value") from None
    return settings


def split_settings(texts: Sequence[str], names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """(`key=value` arguments whose key is one of `names`, as a dict; the other arguments, unchanged)."""
    mine = read_settings([text for text in texts if text.partition("=")[0] in names])
    return mine, [text for text in texts if text.partition("=")[0] not in mine]


def read_size(text: str) -> tuple[int, int]:
    """ "512" or "384x672" → height and width."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise InputError(f"--size {text}: expected pixels, as in 512 or 384x672 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def read_batch(text: str | None) -> int | Literal["largest"] | None:
    """ "4", "largest" or None."""
    if text is None:
        return None
    if text != "largest" and not text.isdecimal():
        raise InputError(f"--batch {text}: expected a number of images, or largest")
    return "largest" if text == "largest" else int(text)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file, one a line; empty lines and lines that start with # are ignored."""
    try:
        text, encoding = decode_text(read_bytes(path))
    except (OSError, ValueError) as error:
        raise InputError(f"prompt file {path}: cannot be read ({error})") from None
    if encoding != "UTF-8":
        print(f"{path}: read as {encoding}, since it is not UTF-8", file=sys.stderr)
    if text.lstrip().startswith(("{", "[")) or Path(path).suffix.lower() in (".json", ".jsonl", ".csv", ".tsv"):
        raise InputError(f"prompt file {path}: expected a plain text of one prompt a line, got JSON or a table")
    lines = text.splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise InputError(f"prompt file {path}: no prompt in it; expected one a line")
    return prompts


def add_lora(parser: argparse.ArgumentParser, text: str) -> None:
    """An option for `split_strength`; may be repeated."""
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:X]", help=text)


def split_strength(words: str) -> tuple[str, float]:
    """FILE[:STRENGTH] → the file and the strength, 1 if there is none.

    Raises:
        InputError: what follows the last colon is neither a number nor a part of a file's name.
    """
    source, colon, number = words.rpartition(":")
    if not colon or Path(words).exists():
        return words, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise InputError(f"--lora {words}: expected FILE or FILE:STRENGTH, got the strength '{number}'")
    return source, strength
