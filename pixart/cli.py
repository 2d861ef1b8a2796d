"""What the scripts share: errors as one line, prompts from files."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from pixart.errors import InputError


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with what it returns. Wrong input prints one line; PIXART_TRACEBACK=1 shows where."""
    try:
        code = main()
    except InputError as error:
        if os.environ.get("PIXART_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


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
