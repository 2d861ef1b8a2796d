"""Files and folders that are written whole or not at all, and their checksums."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


def write_folder(target: Path, fill: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Create `target` whole or not at all: filled under another name, hashed into its manifest, synced, renamed.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, `target` is as it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        if manifest:
            digests = {path.relative_to(partial).as_posix(): digest_file(path) for path in files}
            (partial / MANIFEST).write_text(json.dumps({"blake2b": digests}, indent=2) + "\n", encoding="utf-8")
            files.append(partial / MANIFEST)
        for path in [*files, partial]:
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_file(target: Path, write: Callable[[Path], None]) -> None:
    """Create the file `target` whole or not at all, as `write_folder` does.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, `target` is as it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        sync(partial)
        os.rename(partial, target)
        sync(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_json(path: Path, values: dict) -> None:
    """Write a JSON file so that a reader finds the old one or the new one, never half of it.

    Raises:
        OSError: the disk is full or not writable; the old file is as it was.
    """
    part = path.with_name(path.name + ".part")
    part.write_text(to_json(values, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as its standard has it (RFC 8259), which knows neither NaN nor infinity: null stands for them."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def append_line(path: Path, line: str) -> None:
    """Add a line, on a line of its own also where a full disk has torn the last one.

    Raises:
        OSError: the disk is full or not writable.
    """
    with open(path, "a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = "\n" + line
        file.write(line.encode() + b"\n")


def read_rows(path: Path) -> Iterator[dict]:
    """Rows of a metrics.jsonl that are whole: a kill or a full disk can tear a line."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
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
