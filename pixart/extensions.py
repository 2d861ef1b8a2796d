"""Files of one's own that register ideas: variants of the network, objectives, solvers, data sources, metrics.

A configuration names them (`extensions: [my_idea.py]`, relative to it), other commands take `--extension my_idea.py`.
They are code and are run: a checkpoint or a run never brings its own, whoever loads it passes the file.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pixart.errors import InputError

FOLDER = "extensions"  # in a run: copies of the files that it was trained with


@dataclass(frozen=True)
class Extension:
    path: Path
    digest: str  # blake2b of its bytes, 16 bytes in hex


def load_extensions(paths: Iterable[str | Path]) -> list[Extension]:
    """Run each file once in this process, in order, and again only if its content has changed.

    Raises:
        InputError: a file is not there, is no Python file, two have one name, or it raises; names the line.
    """
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
    sys.modules[name] = module  # dataclasses and pickles of data loaders look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = f":{lines[-1]}" if lines else f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"extension {extension.path}{line}: {type(error).__name__}: {error}") from error
