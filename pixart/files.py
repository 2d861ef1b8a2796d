"""Files and folders that are written whole or not at all, lines of JSON that survive a kill, and checksums."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pixart.errors import InputError

MANIFEST = "manifest.json"


def verify(folder: Path) -> str | None:
    """What is wrong with a folder that `write_folder` wrote, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest["blake2b"].items():
            if digest_file(folder / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def _whole(target: Path, *, durable: bool, shared: bool = False) -> Iterator[Path]:
    """A path beside `target` at which to make a file or folder; it takes the target's name when all is there."""
    own = f".{os.uname().nodename}.{os.getpid()}" if shared else ""
    partial = target.with_name(f".{target.name}{own}.partial")
    _remove(partial)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if durable:
            inside = partial.rglob("*") if partial.is_dir() else ()
            for path in [*(path for path in inside if path.is_file()), partial]:
                sync(path)
        if partial.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.rename(partial, target)
        if durable:
            sync(target.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_folder(target: Path, fill: Callable[[Path], None], *, manifest: bool = True, durable: bool = True) -> None:
    """Create or replace the folder `target` whole or not at all: filled under another name, then renamed.

    Args:
        manifest: write checksums of all files into it, for `verify`.
        durable: have all of it on the disk before it takes its name; else it is there after a kill of the process, but
            perhaps not after one of the machine.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, `target` is as it was.
    """
    with _whole(target, durable=durable) as partial:
        partial.mkdir()
        fill(partial)
        if manifest:
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            digests = {path.relative_to(partial).as_posix(): digest_file(path) for path in files}
            (partial / MANIFEST).write_text(to_json({"blake2b": digests}, indent=2) + "\n", encoding="utf-8")


def write_file(target: Path, write: Callable[[Path], None], *, durable: bool = True, shared: bool = False) -> None:
    """Create or replace the file `target` whole or not at all, as `write_folder` does; a reader finds the old one or
    the new one.

    Args:
        durable: as there.
        shared: other processes may write it at the same time; the last one's stays.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, `target` is as it was.
    """
    with _whole(target, durable=durable, shared=shared) as partial:
        write(partial)


def write_text(target: Path, text: str, *, durable: bool = True, shared: bool = False) -> None:
    """`write_file` of a text in UTF-8."""
    write_file(target, lambda path: path.write_text(text, encoding="utf-8"), durable=durable, shared=shared)


def write_json(target: Path, values: Any, *, indent: int = 2, durable: bool = True, shared: bool = False) -> None:
    """`write_file` of JSON as `to_json` makes it."""
    write_text(target, to_json(values, indent=indent) + "\n", durable=durable, shared=shared)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as its standard has it (RFC 8259), which knows neither NaN nor infinity: null stands for them."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair, as in names that are no UTF-8


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_json(path: Path, *, what: str = "", expected: str = "keys and values") -> dict:
    """A JSON object from a file; `what` it is and what was `expected` of it are for the errors.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds another value than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {what + ' ' if what else ''}cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected {expected}, got a {type(values).__name__}")
    return values


def append_rows(path: Path, rows: Iterable[Any], *, durable: bool = False) -> None:
    """Add lines of JSON; a last line that a kill or a full disk has torn is cut off first.

    Args:
        durable: have them on the disk when this returns.

    Raises:
        OSError: the disk is full or not writable.
    """
    mend_lines(path)
    with open(path, "ab") as file:
        file.write(b"".join(to_json(row).encode() + b"\n" for row in rows))
        if durable:
            file.flush()
            os.fsync(file.fileno())


def mend_lines(path: Path) -> None:
    """Cut off a last line of JSON that is torn, or end it if only its end is missing; creates the file."""
    with open(path, "a+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        whole = 0
        while end and not whole:
            start = max(end - 65536, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            end, whole = start, start + found + 1 if found >= 0 else 0
        if whole == size:
            return
        file.seek(whole)
        try:
            json.loads(file.read())
        except ValueError:
            file.truncate(whole)
        else:
            file.write(b"\n")


def read_lines(path: Path, *, skip_damaged: bool = False) -> Iterator[tuple[int, Any]]:
    """(number, value) of the lines of a JSON lines file; a last line that a kill has torn does not count.

    Raises:
        InputError: another line is damaged, unless `skip_damaged`.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                if skip_damaged or not line.endswith(b"\n"):
                    continue
                raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
            yield number, value


def read_rows(path: Path) -> Iterator[dict]:
    """A run's rows with a step, as metrics.jsonl has them; none if there is no such file."""
    if path.exists():
        for _, row in read_lines(path, skip_damaged=True):
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def digest_file(path: Path) -> str:
    """blake2b of a file, 16 bytes in hex."""
    digest, buffer = hashlib.blake2b(digest_size=16), bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def digest_text(text: str) -> str:
    """blake2b of a text, 16 bytes in hex."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
