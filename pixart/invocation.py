"""How this process was started, so that messages name commands that work in the same place."""

import os
import shutil
import sys
from pathlib import Path


def command(name: str) -> str:
    """What the user types to run the command `name` of pixart, without its arguments, as this process was started.

    "python -m pixart sample" and "python scripts/sample.py" if that is how this process was started, else "pixart
    sample". A program that is not the one on the PATH, e.g. that of an environment that is not activated, keeps its
    folder: ".venv/bin/pixart sample".
    """
    started, spec = sys.argv[0], getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name == "pixart.__main__":
        return f"{_typed(sys.orig_argv[0])} -m pixart {name}"
    script = Path(started)
    if script.parent.name == "scripts" and script.suffix == ".py":
        return f"{_typed(sys.orig_argv[0])} {script.with_name(name)}.py"
    return f"{_typed(started) if script.stem == 'pixart' else 'pixart'} {name}"


def _typed(program: str) -> str:
    """The shortest name that starts a program: without its folder if the PATH leads to it."""
    name = os.path.basename(program)
    found = shutil.which(name)
    return name if found is not None and os.path.abspath(found) == os.path.abspath(program) else program
