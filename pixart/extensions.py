"""Extensions: a user's own Python files that register network variants, objectives, solvers, data sources or metrics.

A configuration names them (`extensions: [my_idea.py]`, relative to it); other commands take `--extension my_idea.py`.
Since they are code that is run, they are never loaded from a checkpoint or a run: whoever loads one passes the file.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pixart.arguments import check_path, checked, say
from pixart.errors import InputError

FOLDER = "extensions"  # folder in a run with copies of the files that it was trained with


@dataclass(frozen=True)
class Extension:
    path: Path
    digest: str  # blake2b of its bytes, 16 bytes in hex


@checked
def load_extensions(paths: Iterable[str | Path]) -> list[Extension]:
    """Run each file once in this process, in order; a file is run again only if its content has changed.

    Raises:
        InputError: a file is missing or not a Python file, two files have the same name, or a file raises an exception;
            the message names the line.
    """
    paths = list(paths)
    for path in paths:
        if not isinstance(path, (str, Path)):
            raise InputError(f"extensions: got {say(path)}, expected paths of Python files")
        check_path(path, "extensions")
    found = [_read(Path(path)) for path in paths]
    names = [extension.path.name for extension in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"extensions: two files are called {min(twice)}; a run keeps a copy of each by its name")
    for extension in found:
        _run(extension)
    return found


def _read(path: Path) -> Extension:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"extension {path}: cannot be read ({error.strerror or error})") from None
    if path.suffix != ".py":
        raise InputError(f"extension {path}: expected a .py file")
    return Extension(path.resolve(), hashlib.blake2b(content, digest_size=16).hexdigest())


def _run(extension: Extension) -> None:
    name = f"pixart_extension_{extension.path.stem}"
    there = sys.modules.get(name)
    if getattr(there, "__pixart_digest__", None) == extension.digest:
        return
    spec = importlib.util.spec_from_file_location(name, extension.path)
    module = importlib.util.module_from_spec(spec)
    module.__pixart_digest__ = extension.digest
    sys.modules[name] = module  # dataclasses, and data loaders' pickles, look up their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = f":{lines[-1]}" if lines else f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"extension {extension.path}{line}: {type(error).__name__}: {error}") from error
