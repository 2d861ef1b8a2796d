"""What the commands share: errors as one line, prompts from files, sizes at their ends, shares of work."""

import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from pixart.cpu import keep_freed_memory
from pixart.errors import InputError, LostProcess

EXTENSION = "a file of one's own that registers what the model is made of; may be given several times"
NO_ONEDNN = "on a CPU in fp32: torch's own matrix product, as from Python, which is nearer to the authors' numbers"


def run(main: Callable[[], int | None], *, keep_memory: bool = True) -> None:
    """Call `main` and exit with what it returns. Wrong input prints one line; PIXART_TRACEBACK=1 shows where.

    With `keep_memory` the process keeps what it frees, as `keep_freed_memory` says.
    """
    if keep_memory:
        keep_freed_memory()
    try:
        code = main()
    except InputError as error:
        if os.environ.get("PIXART_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except LostProcess as error:
        if os.environ.get("PIXART_TRACEBACK"):
            raise
        print(f"error: {error}. Checkpoints are as they were; the same command goes on", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary exit may wait for the process that is gone
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def find_rank(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """Which of how many processes this is: as told, else as torchrun, a Slurm array or srun tell, else the only one.

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
            raise InputError(f"rank: the environment's is not whole ({error}); give --rank and --ranks") from None
    if rank is None or ranks is None or not 0 <= rank < ranks:
        raise InputError(f"rank: got {rank} of {ranks}, expected both --rank and --ranks, with 0 ≤ rank < ranks")
    return rank, ranks


def find_device() -> torch.device:
    """This process's GPU, if there is any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(place) % torch.cuda.device_count())


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a dict; values as in YAML."""
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
    """`key=value` arguments: those with a key among `names` as a dict, and the others as they are."""
    mine = read_settings([text for text in texts if text.partition("=")[0] in names])
    return mine, [text for text in texts if text.partition("=")[0] not in mine]


def read_size(text: str) -> tuple[int, int]:
    """ "512" or "384x672" → height and width."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise InputError(f"--size {text}: expected pixels, as in 512 or 384x672 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def read_batch(text: str | None) -> int | Literal["largest"] | None:
    """ "4" or "largest", or nothing."""
    if text is None:
        return None
    if text != "largest" and not text.isdecimal():
        raise InputError(f"--batch {text}: expected a number of pictures, or largest")
    return "largest" if text == "largest" else int(text)


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines and lines that start with # are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {path}: cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise InputError(f"prompt file {path}: no prompt in it; expected one a line")
    return prompts


def split_prompt(line: str) -> tuple[str, dict[str, float]]:
    """A prompt and the size that its end may ask for, as arguments of `Pipeline.__call__`.

    "a cat --ar 3:4" asks for an aspect ratio, height to width; "a cat --hw 768:1024" for pixels.
    """
    text, *asked = re.split(r"(?:^|\s)--(?=(?:ar|hw)(?:\s|$))", line)
    text = text.strip()
    if not asked:
        return text, {}
    match = re.fullmatch(r"(ar|hw)\s+(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)\s*", asked[0])
    if len(asked) > 1 or not match or not text:
        raise InputError(f"prompt '{line[:80]}': expected a text that ends in one --ar h:w or --hw h:w")
    high, wide = float(match[2]), float(match[3])
    if high == 0 or wide == 0 or (match[1] == "hw" and not (high.is_integer() and wide.is_integer())):
        raise InputError(f"prompt '{line[:80]}': --ar takes positive numbers, --hw whole pixels")
    return text, {"aspect_ratio": high / wide} if match[1] == "ar" else {"height": int(high), "width": int(wide)}
